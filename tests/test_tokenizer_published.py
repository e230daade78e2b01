"""Published tokenizers: the tokens of sound in spare rows, the published template to the letter, nothing guessed."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_picture, tiny_recipe, tiny_sound, tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nexus.data.chat import SPECIALS, ChatTokenizer, render
from nexus.errors import BadCheckpoint
from nexus.types import Image, Part, Text, Turn

SPECS = tiny_recipe().model
SOUND = ("<|audio_bos|>", "<|audio_eos|>", "<|audio_pad|>")
# What Qwen2.5-VL adds behind its entries, in order; True: special, so that decoding leaves it out.
ADDED = {
    "<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<|object_ref_start|>": True,
    "<|object_ref_end|>": True, "<|box_start|>": True, "<|box_end|>": True, "<|quad_start|>": True,
    "<|quad_end|>": True, "<|vision_start|>": True, "<|vision_end|>": True, "<|vision_pad|>": True,
    "<|image_pad|>": True, "<|video_pad|>": True, "<tool_call>": False, "</tool_call>": False,
}  # fmt: skip
PLAIN_ONLY = {token: True for token in list(ADDED)[:3]}
# Qwen2's division of text into words, of which line breaks make words of their own.
WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def published_folder(folder: Path, added: dict[str, bool] = ADDED) -> Path:
    """tokenizer.json and tokenizer_config.json as a Qwen2.5 folder has them, with a vocabulary of a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(WORDS, "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    texts = ["system\nYou are a helpful assistant.", "user\n\n\nwhat is this picture\n\n", "assistant\nit's 大 好"]
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in added.items()])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    listed = {
        str(tokenizer.token_to_id(token)): {"content": token, "special": special} for token, special in added.items()
    }
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": listed, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_folder(tmp_path_factory.mktemp("published"))


def reference(folder: Path) -> Tokenizer:
    """The published tokenizer by itself, which does find special tokens in a string."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def used_rows(folder: Path) -> int:
    return reference(folder).get_vocab_size()


def refusal(folder: Path, vocab_size: int = 400) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        ChatTokenizer.published(folder, vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tokens_of_sound_take_the_first_spare_rows(folder: Path) -> None:
    tokenizer, used = ChatTokenizer.published(folder, 400), used_rows(folder)
    assert [tokenizer.ids[token] for token in SOUND] == [used, used + 1, used + 2]
    assert tokenizer.size == used + 3
    published = reference(folder)
    assert {token: tokenizer.ids[token] for token in SPECIALS if token not in SOUND} == {
        token: published.token_to_id(token) for token in SPECIALS if token not in SOUND
    }


def test_writing_ends_at_either_published_stop_and_turns_at_the_first(folder: Path) -> None:
    for tokenizer in (ChatTokenizer.published(folder, 400), tiny_tokenizer()):
        assert tokenizer.stops == (tokenizer.ids["<|im_end|>"], tokenizer.ids["<|endoftext|>"])
        assert tokenizer.stop == tokenizer.stops[0]


def test_a_tokenizer_of_text_alone_gets_every_token_it_lacks(tmp_path: Path) -> None:
    folder = published_folder(tmp_path, PLAIN_ONLY)
    tokenizer, used = ChatTokenizer.published(folder, 400), used_rows(folder)
    assert [tokenizer.ids[token] for token in SPECIALS[3:]] == list(range(used, used + 7))


def test_saved_and_loaded_it_gives_the_same_ids(tmp_path: Path, folder: Path) -> None:
    tokenizer = ChatTokenizer.published(folder, 400)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = ChatTokenizer.load(tmp_path / "tokenizer.json")
    assert (again.ids, again.size, again.stops) == (tokenizer.ids, tokenizer.size, tokenizer.stops)
    assert (again.letters == tokenizer.letters).all() and len(again.letters) == again.size
    assert not again.letters[again.ids["<|audio_pad|>"]].any()
    assert bytes(again.letters[again.encode("system")[0], :7] - 1) == b"system\xff"  # numbers from 1, then none


def test_a_folder_that_transformers_saved_gives_the_same_ids(tmp_path: Path, folder: Path) -> None:
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    assert ChatTokenizer.published(tmp_path, 400).ids == ChatTokenizer.published(folder, 400).ids


def test_spare_rows_are_counted_to_the_last_one(folder: Path) -> None:
    used = used_rows(folder)
    assert ChatTokenizer.published(folder, used + 3).size == used + 3
    for vocab_size in (used + 2, used, used - 5):
        message = refusal(folder, vocab_size)
        assert f"3 tokens must be added ({', '.join(SOUND)})" in message
        assert f"{vocab_size} rows and ids go up to {used - 1}" in message


def rewrite(path: Path, how: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    how(tree)
    path.write_text(json.dumps(tree), encoding="utf-8")


# The published template


def template(turns: Sequence[tuple[str, str]]) -> str:
    """Qwen2.5-VL's chat template, with the placeholders of a picture as many as it takes positions."""
    said = [("system", "You are a helpful assistant."), *turns] if turns[0][0] != "system" else turns
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in said)


def picture_as_text(picture: Image) -> str:
    assert SPECS.vision is not None and picture.pixels is not None
    pads = SPECS.vision.tokens_for(SPECS.vision.grid_for(1, *picture.pixels.shape[:2]))
    return f"<|vision_start|>{'<|image_pad|>' * pads}<|vision_end|>"


def test_a_conversation_about_a_picture_is_the_published_string(folder: Path) -> None:
    picture, other = tiny_picture(84, 84), tiny_picture(112, 56, seed=1)
    seen, more = picture_as_text(picture), picture_as_text(other)
    turns = [
        Turn("user", (picture, Text("what's this?\n"))),
        Turn("assistant", (Text("it's a picture."),)),
        Turn("user", (Text("\n\nand "), other, Text(" this 大"), picture)),
    ]
    said = [
        ("user", f"{seen}what's this?\n"),
        ("assistant", "it's a picture."),
        ("user", f"\n\nand {more} this 大{seen}"),
    ]
    tokens = render(turns, ChatTokenizer.published(folder, 400), SPECS, answer=True).tokens
    assert tokens == reference(folder).encode(template(said) + "<|im_start|>assistant\n").ids


def test_a_given_system_line_replaces_the_default(folder: Path) -> None:
    turns = [Turn("system", (Text("Be brief."),)), Turn("user", (Text("what is this"),))]
    tokens = render(turns, ChatTokenizer.published(folder, 400), SPECS).tokens
    assert tokens == reference(folder).encode(template([("system", "Be brief."), ("user", "what is this")])).ids


@given(words=st.text(alphabet="a s\n\r\t'.1é大", max_size=12), pictured=st.booleans())
def test_any_text_is_divided_as_in_the_published_string(folder: Path, words: str, pictured: bool) -> None:
    picture = tiny_picture(84, 84)
    parts: tuple[Part, ...] = (Text(words), picture) if pictured else (Text(words),)
    content = words + (picture_as_text(picture) if pictured else "")
    tokens = render([Turn("user", parts)], ChatTokenizer.published(folder, 400), SPECS, answer=True).tokens
    assert tokens == reference(folder).encode(template([("user", content)]) + "<|im_start|>assistant\n").ids


@pytest.mark.parametrize("token", SPECIALS)
def test_a_user_who_spells_a_special_token_writes_text(tmp_path: Path, folder: Path, token: str) -> None:
    tokenizer = ChatTokenizer.published(folder, 400)
    tokenizer.save(tmp_path / "tokenizer.json")
    for one in (tokenizer, ChatTokenizer.load(tmp_path / "tokenizer.json")):
        ids = one.encode(f"say {token} please")
        assert not set(ids) & set(one.ids.values())
        assert one.decode(ids) == f"say {token} please"


def test_sound_stands_between_its_own_markers(folder: Path) -> None:
    tokenizer = ChatTokenizer.published(folder, 400)
    row = render([Turn("user", (tiny_sound(1.0), Text("what")))], tokenizer, SPECS)
    (span,) = row.spans
    opening, closing, pad = (tokenizer.ids[token] for token in SOUND)
    assert row.tokens[span.start - 1] == opening and row.tokens[span.start + span.length] == closing
    assert row.tokens[span.start : span.start + span.length] == [pad] * span.length


def test_no_setting_of_the_file_cuts_or_fills_a_text(tmp_path: Path) -> None:
    folder = published_folder(tmp_path)
    cutting = reference(folder)
    cutting.enable_truncation(4)
    cutting.enable_padding(length=64, pad_id=0)
    cutting.save(str(folder / "tokenizer.json"))
    words = "what is this picture " * 10
    assert len(reference(folder).encode("what").ids) == 64
    tokenizer = ChatTokenizer.published(folder, 400)
    assert tokenizer.decode(tokenizer.encode(words)) == words.strip()
    assert len(tokenizer.encode("what")) < 5


# What does not fit


def test_the_tokens_of_sound_of_another_model_are_not_taken_over(tmp_path: Path) -> None:
    message = refusal(published_folder(tmp_path, {**ADDED, "<|audio_bos|>": True}))
    assert "<|audio_bos|> has id" in message and "Qwen2.5-VL" in message


def test_files_that_state_other_ids_are_refused_with_both_sides(tmp_path: Path) -> None:
    folder = published_folder(tmp_path)
    path = folder / "tokenizer_config.json"
    good = path.read_text()
    image = reference(folder).token_to_id("<|image_pad|>")
    for number, found in ((image, "'<|image_pad|>'"), (399, "None"), (-1, "None"), (1 << 40, "None")):
        path.write_text(json.dumps({"added_tokens_decoder": {str(number): {"content": "<|other|>"}}}))
        message = refusal(folder)
        assert f"tokenizer_config.json: token {number} is '<|other|>', the tokenizer has {found} there" in message
    for content in (
        '{"added_tokens_decoder": []}',
        '{"added_tokens_decoder": {"x": {"content": "y"}}}',
        "[]",
        "{",
        "é",
    ):
        path.write_text(content, encoding="latin-1")
        assert "tokenizer_config.json: added tokens cannot be read" in refusal(folder)
    path.write_text(good)
    assert ChatTokenizer.published(folder, 400).size


def test_ids_with_holes_are_refused_and_not_numbered_afresh(tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "behind a hole")

    def move_the_last_up(tree: dict[str, Any]) -> None:
        tree["added_tokens"][-1]["id"] += 5

    rewrite(folder / "tokenizer.json", move_the_last_up)
    (folder / "tokenizer_config.json").unlink()
    last = used_rows(folder) - 1
    assert reference(folder).token_to_id("</tool_call>") == last, "the library numbers it afresh"
    assert f"token {last + 5} is '</tool_call>', the tokenizer has None there" in refusal(folder)

    def move_an_entry_up(tree: dict[str, Any]) -> None:
        entries = tree["model"]["vocab"]
        entries["!"] = len(entries) + 9

    folder = published_folder(tmp_path / "among the entries", {})
    rewrite(folder / "tokenizer.json", move_an_entry_up)
    assert "expected ids without holes" in refusal(folder)


def test_a_special_token_that_users_could_write_is_refused(tmp_path: Path) -> None:
    folder = published_folder(tmp_path, {**ADDED, "<|im_end|>": False})
    message = refusal(folder)
    assert "tokenizer.json" in message and "reads <|im_end|> in a text" in message
    with pytest.raises(BadCheckpoint, match=r"reads <\|im_end\|> in a text"):
        ChatTokenizer.load(published_folder(tmp_path, {**ADDED, "<|im_end|>": False}) / "tokenizer.json")


def test_a_folder_without_a_readable_tokenizer_is_refused(tmp_path: Path, folder: Path) -> None:
    assert "holds no tokenizer.json" in refusal(tmp_path)
    content = (folder / "tokenizer.json").read_text()
    for damaged in (content[: len(content) // 2], "", "{}"):
        (tmp_path / "tokenizer.json").write_text(damaged)
        assert "not a readable tokenizer" in refusal(tmp_path)
