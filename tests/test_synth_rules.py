"""Text rules: what is dropped and with which number, what stays, and what repeats what."""

import random
import re
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.synth.duplicates import Seen, comparable
from nexus.synth.records import Record, Rejected
from nexus.synth.rules import Rules, RulesConfig, build, language_of, tidy, verdict

CONFIG = RulesConfig()


def reason(text: str, language: str = "", config: RulesConfig = CONFIG) -> str:
    found = verdict(tidy(text), language, config)
    return found[0] if found else "kept"


def rules(config: RulesConfig = CONFIG) -> Rules:
    step = build(config)
    step.setup()
    return step


def records(*texts: str, language: str = "") -> list[Record]:
    return [Record(str(place), text, language) for place, text in enumerate(texts)]


@pytest.mark.parametrize(
    "text",
    [
        "What is the capital of France?",
        "Is it open 24/7, and/or on weekends?",
        "It costs between $5 and $6 today, or 7.50 w/o the tax.",
        "We met for the first time on 2024/05/01, he/she said, at 9 a.m. or so.",
        "Mr. Smith, e.g., works for the U.S. government; I <3 it!",
        "It ended.Then it began again ...and stopped.",
        "Drive at forty km/h -- no, faster!",
        "Who wrote Node.js, and what is C++ or C#?",
        "Naïve façade: São Paulo's café isn't far.",
        "今天天气怎么样？我们去公园吧。",
        "男/女都可以参加，是/否都行。",
        "我想听 Taylor Swift 的歌",
        "ＨＥＬＬＯ，全角字母也是字母。",
        "Do you prefer tea, coffee... or both (either one)?",
        "a smiley ^_^ and a heart",
        "Bring your book(s); it matters (a lot).",
        "Two is < three, and a = b; isn't it?",
    ],
)
def test_ordinary_sentences_stay(text: str) -> None:
    assert reason(text) == "kept"


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("url", "Look at https://example.org/a?b=c please"),
        ("url", "please visit www.example.org today"),
        ("url", "go to example.com and read"),
        ("url", "请访问baidu.com查看更多内容"),
        ("url", "the page example.xyz/index tells more"),
        ("email", "write to jane.doe@example.co please"),
        ("email", "邮箱是 zhang@例子.公司 谢谢你们"),
        ("path", r"open C:\Users\jane and look"),
        ("path", "open C:/Users/jane and look"),
        ("path", "the file /usr/share/dict holds words"),
        ("path", "请打开/home/user/文件看看吧朋友"),
        ("path", "put it into ~/documents for now"),
        ("path", "run ./setup after that"),
        ("path", "see src/main.py for the rest of it"),
        ("path", r"it is on \\server\share somewhere"),
        ("latex", r"show me that the number $x^2 + y$ is even"),
        ("latex", r"show that \(a\) is prime"),
        ("latex", r"compute \frac{a}{b} for me"),
        ("latex", r"\begin{align} is a beginning"),
        ("latex", "the square x^2 grows quickly"),
        ("code", "please explain what ```print this``` does"),
        ("code", "what does `ls` do in a shell"),
        ("code", "explain <b>bold</b> words to me"),
        ("code", "why is if (a == b) wrong here"),
        ("code", "def add(a, b): what does it do"),
        ("code", "console.log(hello) prints what"),
        ("code", "while (x) { go(); } never ends"),
    ],
)
def test_what_cannot_be_said_is_dropped_by_the_rule_that_names_it(rule: str, text: str) -> None:
    found = verdict(text, "", CONFIG)
    assert found is not None
    assert found[0] == rule
    assert found[1]["found"] in text


def test_exactly_two_hundred_stays_and_one_more_goes_with_its_number() -> None:
    assert reason(" ".join(["don't"] * 200)) == "kept"
    assert verdict(" ".join(["don't"] * 201), "", CONFIG) == ("too_long", {"words": 201, "limit": 200})
    assert reason("好" * 200 + "。") == "kept"
    assert verdict("好" * 201, "", CONFIG) == ("too_long", {"han": 201, "limit": 200})
    assert verdict("好" * 150 + " word" * 51, "", CONFIG) == ("too_long", {"han_and_words": 201, "limit": 200})


def test_punctuation_and_bare_numbers_are_no_words() -> None:
    assert reason("word, " * 200 + "- 12 !") == "kept"


def test_non_text_is_counted_without_white_space_and_exactly_a_fifth_stays() -> None:
    assert reason("abcd efgh 12") == "kept"
    assert verdict("abcd efgh 123", "", CONFIG) == ("non_text", {"share": round(3 / 11, 4), "limit": 0.2})
    assert reason("好好好好5") == "kept"
    assert reason("好好好55") == "non_text"
    assert reason("nice 😀😀") == "non_text"


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("control_characters", "a bell\x07 rings"),
        ("control_characters", "turned \u202eround"),
        ("control_characters", "half a pair \ud83d of surrogates"),
        ("other_script", "שלום עולם"),
        ("other_script", "Привет, друзья"),
        ("other_script", "こんにちは、世界"),
        ("other_script", "hello мир and friends"),
        ("no_words", "12 + 3"),
        ("no_words", "！？。"),
        ("no_words", "😀"),
        ("no_words", ""),
        ("too_long", "a" * 1_000_000),
    ],
)
def test_unusual_texts_have_a_defined_fate(expected: str, text: str) -> None:
    assert reason(text) == expected


def test_a_stated_language_must_be_the_one_that_is_written() -> None:
    assert verdict("good morning", "zh", CONFIG) == ("wrong_language", {"found": "en", "expected": "zh"})
    assert reason("早上好", "en") == "wrong_language"
    assert reason("guten Morgen", "de") == "unknown_language"
    assert reason("早上好", "", RulesConfig(languages=("en",))) == "wrong_language"


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "Hello"),
        ("zh", "你好"),
        ("zh", "我用 Python 写"),
        ("en", "the word 好 means good"),
        ("", "123"),
        ("", "かな"),
    ],
)
def test_the_language_follows_from_the_script(language: str, text: str) -> None:
    assert language_of(text) == language


@given(st.text(max_size=300))
def test_any_text_gets_a_verdict_with_its_numbers_and_tidying_twice_changes_nothing(text: str) -> None:
    clean = tidy(text)
    assert tidy(clean) == clean
    found = verdict(clean, "", CONFIG)
    assert found is None or (found[0] and found[1])
    assert found is not None or language_of(clean) in ("en", "zh")


@given(st.text("好天气，。？！、；：“”‘’（）《》…—", max_size=230))
def test_the_short_way_for_plain_chinese_is_the_long_way(text: str) -> None:
    config = RulesConfig(max_han=150, max_mixed=180)
    short = verdict(text, "zh", config), comparable(text)
    with pytest.MonkeyPatch.context() as patched:
        for module in ("rules", "duplicates"):
            patched.setattr(f"nexus.synth.{module}.PLAIN_CHINESE", re.compile("(?!)"))
        assert (verdict(text, "zh", config), comparable(text)) == short


@pytest.mark.parametrize(
    "unit", ["$_", "a.", "/a", "a@", "`", "<a ", "a(", "\\a", "a/b", "def a", "{'", "a_", "www", "="]
)
def test_no_text_takes_long(unit: str) -> None:
    text = unit * (CONFIG.max_characters // len(unit))
    begun = time.process_time()
    verdict(text, "", RulesConfig(max_words=10_000, max_mixed=10_000, max_non_text=0.99))
    assert time.process_time() - begun < 0.5


def test_the_step_keeps_tidy_texts_with_their_language_and_what_they_were() -> None:
    kept, chinese = rules()(records("  two \t words\u200b ", "你好，世界"))
    assert isinstance(kept, Record) and isinstance(chinese, Record)
    assert (kept.text, kept.language, kept.meta["text_given"]) == ("two words", "en", "  two \t words\u200b ")
    assert (chinese.text, chinese.language, dict(chinese.meta)) == ("你好，世界", "zh", {})


def test_the_step_answers_every_record_in_order() -> None:
    given = records("first one", "12", "FIRST one!", "a second one", "x" * 2_000_000)
    results = rules()(given)
    assert [r.record.id if isinstance(r, Rejected) else r.id for r in results] == [r.id for r in given]
    assert [r.reason if isinstance(r, Rejected) else "" for r in results] == [
        "",
        "no_words",
        "duplicate",
        "",
        "too_long",
    ]
    repeated = results[2]
    assert isinstance(repeated, Rejected) and repeated.numbers["of"] == "0"


def test_a_rejected_text_makes_no_later_one_a_duplicate() -> None:
    results = rules()([*records("good morning", language="zh"), Record("b", "good morning", "en")])
    assert isinstance(results[0], Rejected) and isinstance(results[1], Record)


def test_questions_that_differ_in_one_name_both_stay() -> None:
    pairs = [("radon", "radium"), ("Austria", "Australia"), ("tin", "zinc")]
    asked = records(*(f"What is the chemical symbol for {name}?" for pair in pairs for name in pair))
    assert all(isinstance(result, Record) for result in rules()(asked))


def test_the_fingerprint_changes_with_every_setting() -> None:
    others = [RulesConfig(max_words=100), RulesConfig(near_duplicates=None), RulesConfig(patterns=())]
    prints = {build(config).fingerprint for config in (CONFIG, *others)}
    assert len(prints) == 4
    assert build(CONFIG).fingerprint == build(RulesConfig()).fingerprint


LONG = (
    "the quick brown fox jumps over the lazy dog while the old farmer watches from his window and counts sheep all day"
)


def test_near_duplicates_are_found_and_different_questions_are_not() -> None:
    seen = Seen(0.85)
    assert (
        seen.add(
            [LONG, "What is the capital of Spain?", "今天下午三点我们在公司门口见面然后一起去机场接人"], list("abc")
        )
        == [None] * 3
    )
    near, other, chinese = seen.add(
        [
            LONG.replace("window", "windows"),
            "What is the capital of France?",
            "今天下午五点你们在学校门口见面然后自己去车站送人",
        ],
        list("def"),
    )
    assert near is not None and near.id == "a" and not near.exact and near.similarity >= 0.85
    assert other is None
    assert chinese is None


def test_without_near_duplicates_only_equal_words_repeat() -> None:
    seen = Seen(None)
    first, near, same = seen.add([LONG, LONG + "s", LONG.upper() + "!"], list("abc"))
    assert first is None and near is None
    assert same is not None and same.exact and same.id == "a"


def corpus(size: int, seed: int) -> list[str]:
    """Sentences of few words, so that many are equal or near."""
    rng = random.Random(seed)
    words = [f"word{n}" for n in range(12)]
    stems = [" ".join(rng.choices(words, k=14)) for _ in range(max(1, size // 4))]
    return [rng.choice(stems) + rng.choice(["", "", " again", "!", " and so on"]) for _ in range(size)]


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_what_repeats_what_does_not_depend_on_the_batches(seed: int, sizes: list[int]) -> None:
    texts = corpus(sum(sizes), seed)
    ids = [str(place) for place in range(len(texts))]
    whole, pieces, start = Seen(0.85).add(texts, ids), [], 0
    seen = Seen(0.85)
    for size in sizes:
        pieces += seen.add(texts[start : start + size], ids[start : start + size])
        start += size
    assert pieces == whole
    assert len(seen) == whole.count(None)


def test_equal_words_are_always_found_and_the_first_one_stays() -> None:
    texts = corpus(6000, 1)
    found = Seen(None).add(texts, [str(place) for place in range(len(texts))])
    first: dict[bytes, str] = {}
    for place, (text, match) in enumerate(zip(texts, found, strict=True)):
        owner = first.setdefault(comparable(text), str(place))
        assert (match.id if match else str(place)) == owner


def jaccard(a: str, b: str) -> float:
    one, two = ({text[i : i + 6] for i in range(len(text) - 5)} for text in (a, b))
    return len(one & two) / len(one | two)


def test_the_similarity_is_that_of_the_shingles() -> None:
    rng = random.Random(2)
    misses = 0
    for number in range(60):
        text = " ".join("".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(25))
        other = text[: rng.randint(90, 100) * len(text) // 100] + "".join(rng.choices("qrstuv", k=rng.randint(0, 9)))
        seen, true = Seen(0.01), jaccard(text, other)
        match = seen.add([text, other], [f"{number}", "other"])[1]
        if match is None:
            misses += true > 0.9
        else:
            assert abs(match.similarity - true) < 1e-9
    assert misses <= 1


def test_sentences_of_one_template_are_no_near_duplicates() -> None:
    rng = random.Random(4)
    names = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(6000)]
    start = "please tell me in a few words what you know about the history of the city of"
    texts = [f"{start} {one} and {other}" for one, other in zip(names[:3000], names[3000:], strict=True)]
    assert Seen(0.85).add(texts, [str(place) for place in range(3000)]) == [None] * 3000


def test_long_texts_that_differ_behind_their_beginning_are_told_apart() -> None:
    rng = random.Random(5)
    start, *ends = (" ".join("".join(rng.choices("abcdefgh", k=6)) for _ in range(80)) for _ in range(3))
    first, other, near = Seen(0.85).add([f"{start} {ends[0]}", f"{start} {ends[1]}", f"{start} {ends[0]} too"], "abc")
    assert first is None and other is None
    assert near is not None and near.id == "a" and not near.exact


def test_memory_and_cost_per_text_do_not_grow() -> None:
    """A few hundred bytes per text: five million fit into 4 GB with room for the rest of the process."""
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)]
    seen, num_texts, seconds = Seen(0.85), 24_000, []
    tracemalloc.start()
    for block in range(0, num_texts, 4_000):
        texts = [" ".join(rng.choices(words, k=9)) for _ in range(4_000)]
        ids = [f"{block + place:020x}" for place in range(4_000)]
        begun = time.process_time()
        seen.add(texts, ids)
        seconds.append(time.process_time() - begun)
        del texts, ids
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(seen) > 0.99 * num_texts
    assert held / num_texts < 600
    assert min(seconds[3:]) < 3 * max(seconds[:2])
