"""`nexus chat`: one answer, or a conversation at the terminal."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus.errors import BadConfig, NexusError

if TYPE_CHECKING:
    from nexus.respond import OmniResponder
    from nexus.types import Part, Turn

SHIPPED = Path(__file__).parent / "shipped" / "nexus-tiny-60"  # its card says from what it was made


def chat(options: argparse.Namespace) -> None:
    """The verb: options as the command line has them."""
    folder = options.model or SHIPPED
    if options.speak is not None and options.speak.suffix.lower() != ".wav":
        raise BadConfig(f"--speak {options.speak}: speech is written as wav; give a name that ends in .wav")
    if options.max_tokens < 1:
        raise BadConfig(f"--max-tokens {options.max_tokens}: expected at least 1")
    if options.speak is not None and not options.speak.parent.is_dir():
        raise BadConfig(f"--speak {options.speak}: no folder {options.speak.parent}; make it first")
    parts = _parts(options)
    if not parts and (options.speak or options.json):
        raise BadConfig("--speak and --json need a question: --text, --audio, --image or --video")
    from nexus.respond import load

    responder = load(folder, options.device, adapter=options.adapter, vocoder=_vocoder(options.vocoder))
    if options.voice_weights == "int8":
        responder.quantise_voice()
    if parts:
        from nexus.types import Turn

        _answer(responder, [Turn("user", parts)], options)
        return
    _converse(responder, options.max_tokens)


def _vocoder(url: str | None) -> Any:
    """A maker of decoders from a server's address; None for none."""
    if url is None:
        return None
    from nexus.engines.cosyvoice import CosyVoiceVocoder

    return CosyVoiceVocoder(url).decoder


def _parts(options: argparse.Namespace) -> "tuple[Part, ...]":
    """Media first, words last, as the templates have them."""
    from nexus.types import Audio, Image, Text, Video

    for text in options.text:
        _check_text(text, "--text")
    if options.read_aloud:
        if options.audio or options.image or options.video or not options.text:
            raise BadConfig("--read-aloud speaks the words of --text and nothing else")
        return (Text(" ".join(options.text), aloud=True),)
    parts: list[Part] = [Image(path=path) for path in options.image]
    parts += [Video(path=path) for path in options.video]
    parts += [Audio(path=path) for path in options.audio]
    return (*parts, *(Text(text) for text in options.text))


def _check_text(text: str, where: str) -> None:
    """Bytes that are no UTF-8 reach us as lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadConfig(f"{where}: {text!a} is no UTF-8 text; convert it") from None


def _answer(responder: "OmniResponder", turns: "list[Turn]", options: argparse.Namespace) -> str:
    """One answer, printed as it comes (or as JSON at the end); the speech goes into the file that was asked for."""
    import numpy as np

    from nexus.media import write_wav

    asked = options.speak is not None or options.read_aloud
    speak = asked or (options.json and responder.model.voice is not None)
    begin, first, text, cut = time.perf_counter(), None, "", ""
    pieces = []
    for delta in responder.respond(turns, speak, options.max_tokens):
        text += delta.text
        cut = delta.cut or cut
        if delta.text and not options.json:
            print(delta.text, end="", flush=True)
        if delta.pcm is not None:
            first = time.perf_counter() - begin if first is None else first
            pieces.append(delta.pcm)
    seconds = {"first_sound": first, "total": time.perf_counter() - begin}
    if not options.json:
        print()
    if options.speak is not None:
        if not pieces:
            raise BadConfig("the model said nothing aloud, so no file was written")
        write_wav(options.speak, np.concatenate(pieces), responder.rate_hz)
    if options.json:
        print(json.dumps({"text": text, "audio": str(options.speak) if options.speak else None, "seconds": seconds}))
    if cut:
        print(f"nexus: the answer is not whole: {cut}", file=sys.stderr)
    return text


def _converse(responder: "OmniResponder", max_tokens: int) -> None:
    """Questions from the terminal until an empty end of input. Files are named as @FILE; /new begins anew."""
    from nexus.types import Text, Turn

    if sys.stdin.isatty():
        print("Type a question; @FILE adds a sound, picture or film; /new begins anew; Ctrl-D ends.", file=sys.stderr)
    turns: list[Turn] = []
    for line in _lines():
        if line.strip() == "/new":
            turns = []
            continue
        try:
            asked = [*turns, Turn("user", _typed(line))]
            text = cut = ""
            for delta in responder.respond(asked, speak=False, max_tokens=max_tokens):
                text, cut = text + delta.text, delta.cut
                print(delta.text, end="", flush=True)
            print(flush=True)
            if cut:
                print(f"nexus: the answer is not whole: {cut}", file=sys.stderr)
            turns = [*asked, Turn("assistant", (Text(text),))]
        except NexusError as error:
            print(f"nexus: {error}", file=sys.stderr)


def _lines() -> Iterator[str]:
    with contextlib.suppress(EOFError):
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except UnicodeDecodeError:
                raise BadConfig("standard input: the questions are no UTF-8 text; convert them") from None
            _check_text(line, "standard input")
            if line.strip():
                yield line


SUFFIXES = {
    "audio": {".wav", ".flac", ".mp3", ".ogg", ".m4a", ".opus", ".aac", ".aiff"},
    "image": {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"},
    "video": {".mp4", ".mkv", ".mov", ".webm", ".avi", ".gif"},
}


def _typed(line: str) -> "tuple[Part, ...]":
    """The parts of a typed question: @FILE words become media."""
    from nexus.types import Audio, Image, Text, Video

    parts: list[Part] = []
    words = []
    for word in line.split():
        if not word.startswith("@") or len(word) == 1:
            words.append(word)
            continue
        path = Path(word[1:])
        kind = next((kind for kind, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes), None)
        match kind:
            case "audio":
                parts.append(Audio(path=path))
            case "image":
                parts.append(Image(path=path))
            case "video":
                parts.append(Video(path=path))
            case _:
                known = ", ".join(sorted(suffix for group in SUFFIXES.values() for suffix in group))
                raise BadConfig(f"{word}: unknown kind of file {path.suffix!r}; expected one of {known}")
    if words:
        parts.append(Text(" ".join(words)))
    return tuple(parts)
