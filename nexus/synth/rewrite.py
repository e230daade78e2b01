"""Texts for spoken chat: which questions suit a conversation, in spoken style, with a reply that can be spoken.

Nexus, section 3.2: questions that do not suit a chat are excluded ("metathetical" ones: about the text, the program or
the conversation itself), the others are rewritten in a conversational tone and answered by a chat model (Qwen2-72B in
the paper). Without an endpoint only the exclusion happens, by the patterns below, and `describe` says so for the run
card: nothing is rewritten, and the replies are those of the source.

What the model says is data only after it has passed: one JSON object with exactly the fields asked for, in the language
of the question, within the text rules. What does not pass is asked once more with another seed, then dropped with the
reason. Every answer is kept by the hash of the request, also the bad ones: a run made again decides the same.
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from nexus.errors import BadConfig
from nexus.organs import Count, Natural, Positive, Strict
from nexus.recipe import fingerprint
from nexus.synth.records import Record, Rejected
from nexus.synth.rules import RulesConfig, tidy, verdict
from nexus.synth.speak import token_of

if TYPE_CHECKING:
    from nexus.engines.chat import ChatModel


class EndpointConfig(Strict):
    """A chat model behind an OpenAI-compatible address."""

    url: Annotated[str, Field(min_length=1)]  # http://HOST:PORT/v1
    model: Annotated[str, Field(min_length=1)]
    token_env: str | None = None  # the environment variable that holds the token; a recipe holds no secrets
    parallel: Count = 8  # requests under way, of each worker
    per_minute: Positive | None = None  # requests, of each worker
    tries: Count = 5
    max_pause_seconds: Positive = 60.0
    silence_seconds: Positive = 120.0
    total_seconds: Positive = 300.0
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    seed: Natural = 0
    max_tokens: Count = 1024
    json_mode: bool = True  # response_format json_object, which vLLM, SGLang and llama.cpp know


class RewriteConfig(Strict):
    """What becomes of chat texts. Without `endpoint`: unsuitable questions are dropped by patterns, and no more."""

    endpoint: EndpointConfig | None = None
    exclude: bool = True  # drop questions that match the patterns of unsuitable ones, before any model is asked
    ask_again: Natural = 1  # times, where an answer does not pass
    max_reply_words: Count = 80  # or Chinese characters: what a voice says in half a minute
    rules: RulesConfig = RulesConfig(near_duplicates=None)  # that a rewritten question and a reply must pass


# About the conversation, the program, or a text that a listener does not have; or asking for what only eyes can take.
_UNSUITABLE = {
    "about_itself": r"\b(?:as an? (?:ai|language model)"
    r"|are you (?:an? )?(?:ai|chat ?gpt|language model|robot|bot|human)"
    r"|your (?:training|knowledge cut-?off|parameters|instructions|system prompt|developers?|programming)"
    r"|(?:who|what) (?:made|trained|created|developed|programmed) you"
    r"|(?:my|the|your) (?:previous|last|first) (?:question|message|prompt|answer|response|reply)"
    r"|(?:this|our) (?:conversation|chat)|(?:this|the|a) prompt\b)"
    r"|你是(?:一个)?(?:人工智能|机器人|语言模型|AI)|谁(?:训练|开发|创造)了?你|你的(?:训练|提示词|参数|系统提示)"
    r"|(?:上|刚才那)一?(?:个问题|条消息|条回复)|(?:这|我们的)(?:次|段)?对话|作为(?:一个)?(?:人工智能|语言模型|AI)",
    "about_a_text": r"\b(?:the )?(?:following|above|below|given|attached|provided) (?:text|passage|paragraph|sentences?"
    r"|article|code|list|words?|table|picture|image|poem|story|dialogue|conversation|questions?|options|data|email)\b"
    r"|\b(?:in|from|based on|according to) the (?:passage|paragraph|text|article|document|excerpt)\b"
    r"|\b(?:passage|context|text|article|input|sentence)\s*:|\bwhich of (?:the following|these options)\b"
    r"|\b(?:proof-?read|paraphrase|rephrase|summari[sz]e) (?:this|these|it|the)\b|\b(?:fill in|complete) the blanks?\b"
    r"|(?:以下|下面|上面|上述|下列|所给|给定)的?(?:这)?(?:段|篇|句|个|些)?(?:文字|文本|文章|段落|句子|代码|内容|材料|表格|图片|选项|哪)"
    r"|(?:根据|阅读)(?:这|上|下)?(?:段|篇|文|短文)|填空|完形",
    "for_the_eye": r"\b(?:write|draw|create|generate|make|give me|design|format)\b[^.?!]{0,40}"
    r"\b(?:table|chart|diagram|code|script|function|program|sql|html|json|csv|markdown|essay"
    r"|spreadsheet|logo|bullet points?|ascii art|regex)\b"
    r"|\bin (?:json|markdown|html|latex|bullet points|a table|table form|code)\b|\bmultiple[- ]choice\b"
    r"|(?:写|画|生成|制作|给出|编写|设计)[^。？！]{0,20}(?:表格|图表|代码|脚本|程序|函数|论文|作文|思维导图|海报)|用(?:表格|代码|JSON)",
}


@functools.cache
def _patterns() -> dict[str, re.Pattern[str]]:
    return {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _UNSUITABLE.items()}


def unsuitable(text: str) -> tuple[str, str] | None:
    """Why a question does not suit a spoken conversation, by patterns: (about_itself, about_a_text or for_the_eye,
    the words that say so). None where no pattern matches, which is no proof."""
    for name, pattern in _patterns().items():
        if found := pattern.search(text):
            return name, found[0]
    return None


class _Answer(Strict):
    """What the model must give, and nothing else."""

    suitable: bool
    why: str
    question: str
    reply: str


_LANGUAGES = {"en": "English", "zh": "Chinese"}
_PROMPT = """\
You prepare data for a voice assistant. You get one written question or request in {language}.
1. Decide whether it suits a spoken conversation. It does not if it is about the assistant, the conversation or a \
text that is not given, if it needs a picture, table, code or formula, or if it makes no sense when heard.
2. If it suits, say it as a person would say it aloud: same meaning, {language}, no lists, no symbols, no \
abbreviations that cannot be read aloud, numbers in words.
3. Reply to it as in a conversation: {language}, friendly, correct, at most {limit} {unit}, words only.
Answer with one JSON object and nothing else: {{"suitable": true or false, "why": "a few words", "question": "the \
spoken question", "reply": "the spoken reply"}}. If it does not suit, leave question and reply empty."""


class Rewrite:
    """Chat suitability, spoken style and reply, as a step.

    A record that passes keeps its id. With an endpoint its text is the spoken question, meta `reply` the reply, and
    meta `rewrite` says what was asked of whom; the text before stands in `text_written`. Requests of a batch run side
    by side. `cache` is the file of answers.
    """

    name = "rewrite"

    def __init__(self, config: RewriteConfig, cache: Path | None) -> None:
        if config.endpoint is not None and cache is None:
            raise BadConfig("rewrite.endpoint: expected a file for the answers (cache), given none; name one")
        self._config, self._cache_file = config, cache
        self._model: ChatModel | None = None

    @property
    def fingerprint(self) -> str:
        """Over what changes answers: not pace and patience."""
        settings = self._config.model_dump(mode="json")
        if settings["endpoint"]:
            for key in ("url", "token_env", "parallel", "per_minute", "tries", "max_pause_seconds"):
                del settings["endpoint"][key]
            for key in ("silence_seconds", "total_seconds"):
                del settings["endpoint"][key]
        return fingerprint({"rewrite": [_PROMPT, _UNSUITABLE], **settings})

    def setup(self) -> None:
        """Open the cache. Raises BadConfig where the token's variable is not set; contacts nobody."""
        endpoint = self._config.endpoint
        if endpoint is None:
            return
        from nexus.engines.chat import AnswerCache, ChatModel, Patience
        from nexus.engines.pcm_http import Timeouts

        assert self._cache_file is not None
        self._model = ChatModel(
            endpoint.url,
            endpoint.model,
            token_of(endpoint.token_env, "rewrite.endpoint"),
            Timeouts(silence_seconds=endpoint.silence_seconds, total_seconds=endpoint.total_seconds),
            Patience(endpoint.tries, 1.0, endpoint.max_pause_seconds, endpoint.per_minute),
            AnswerCache(self._cache_file),
        )

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """One result per record, in order.

        Reasons: unsuitable (numbers: by pattern or by the model, why), no_answer (the endpoint gave none; its reason),
        bad_answer (which check it broke). Raises NexusError where no request can succeed.
        """
        results = [self._excluded(record) if self._config.exclude else record for record in records]
        if self._config.endpoint is not None:
            with ThreadPoolExecutor(self._config.endpoint.parallel) as threads:
                return list(threads.map(self._rewritten, results))
        return results

    def _excluded(self, record: Record) -> Record | Rejected:
        found = unsuitable(record.text)
        return Rejected(record, "unsuitable", {"by": found[0], "found": found[1]}) if found else record

    def _rewritten(self, record: Record | Rejected) -> Record | Rejected:
        from nexus.engines.chat import ChatFailed

        if isinstance(record, Rejected):
            return record
        assert record.language in _LANGUAGES, f"language {record.language!r} of {record.id}: rules come first"
        broken = ""
        for again in range(1 + self._config.ask_again):
            try:
                text, endpoint = self._asked(record, again)
            except ChatFailed as failure:
                return Rejected(record, "no_answer", {"reason": failure.reason, "error": str(failure)})
            answer = parsed(text)
            if isinstance(answer, str):
                broken = answer
                continue
            if not answer.suitable:
                return Rejected(record, "unsuitable", {"by": endpoint.model, "found": answer.why[:200]})
            question, reply = tidy(answer.question), tidy(answer.reply)
            broken = self._broken("question", question, record) or self._broken("reply", reply, record)
            if not broken:
                note = {"model": endpoint.model, "again": again, "fingerprint": self.fingerprint}
                kept = record.with_(text=question).noted(reply=reply, rewrite=note)
                return kept if question == record.text else kept.noted(text_written=record.text)
        return Rejected(record, "bad_answer", {"check": broken, "asked": 1 + self._config.ask_again})

    def _asked(self, record: Record, again: int) -> tuple[str, EndpointConfig]:
        endpoint, model = self._config.endpoint, self._model
        assert endpoint is not None and model is not None
        system = _PROMPT.format(
            language=_LANGUAGES[record.language],
            limit=self._config.max_reply_words,
            unit="words" if record.language == "en" else "characters",
        )
        options: dict[str, Any] = {"response_format": {"type": "json_object"}} if endpoint.json_mode else {}
        messages = [{"role": "system", "content": system}, {"role": "user", "content": record.text}]
        text = model.complete(
            messages,
            temperature=endpoint.temperature,
            max_tokens=endpoint.max_tokens,
            seed=endpoint.seed + again,
            **options,
        )
        return text, endpoint

    def _broken(self, field: str, text: str, record: Record) -> str:
        """Which check a text of the model breaks, or ""."""
        rules = self._config.rules
        if field == "reply":
            most = self._config.max_reply_words
            rules = rules.model_copy(update={"max_words": most, "max_han": most, "max_mixed": most})
        found = verdict(text, record.language, rules)
        return f"{field}: {found[0]}" if found else ""


def parsed(text: str) -> _Answer | str:
    """The model's JSON object, or what is wrong with it. Nothing is repaired: no fences, no words around it."""
    try:
        tree = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return "no JSON object alone"
    if not isinstance(tree, dict):
        return "no JSON object"
    if missing := [name for name in _Answer.model_fields if name not in tree]:
        return f"field {missing[0]} is missing"
    if extra := [name for name in tree if name not in _Answer.model_fields]:
        return f"unknown field {extra[0][:40]!r}"
    for name, kind in (("suitable", bool), ("why", str), ("question", str), ("reply", str)):
        if type(tree[name]) is not kind:
            return f"field {name} is a {type(tree[name]).__name__}"
    return _Answer(**tree)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in pairs:
        if name in tree:
            raise ValueError(f"field {name} stands there twice")
        tree[name] = value
    return tree


def describe(config: RewriteConfig) -> str:
    """One sentence for the run card: what was done to chat texts, and by whom."""
    by_patterns = "unsuitable questions dropped by patterns" if config.exclude else "no question dropped by patterns"
    if config.endpoint is None:
        return (
            f"rules only: {by_patterns}; no chat model was named, so nothing was judged, rewritten or answered by one"
        )
    return f"{by_patterns}; judged, rewritten in spoken style and answered by {config.endpoint.model}"


def build(config: RewriteConfig, cache: Path | None = None) -> Rewrite:
    """The step. `cache` is the file that keeps a chat model's answers (SQLite); needed where an endpoint is named."""
    return Rewrite(config, cache)
