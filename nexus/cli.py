"""The command `nexus`: what it is called with, and how it ends. Exit codes: 0 done, 2 user mistake (one line on
stderr), 1 failure of ours or of the machine, 130 interrupted.

Nothing heavy is imported before a verb needs it: `nexus --help` answers at once.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nexus import __version__, verbs
from nexus.errors import BadConfig, NexusError

# Threads that spin while they wait make a second busy process on the machine cost a factor of ten; libraries that
# could reach a model hub are told that there is none. Both must be said before torch is imported.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0", "HF_HUB_OFFLINE": "1"}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line and whose options have one name."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})

    def error(self, message: str) -> Any:
        raise BadConfig(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nexus", description="Omni-modal language models that hear, see and speak.")
    parser.add_argument("--version", action="version", version=f"nexus {__version__}")
    add = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser).add_parser
    _loop(add)
    _data(add)
    _models(add)
    _measures(add)
    return parser


def _loop(add: Any) -> None:
    """The whole loop, and talking to what came of it."""
    demo = add("demo", help="make data, train a tiny omni model, examine it, leave model and report")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="result folder (default runs/demo)")
    demo.add_argument("--minutes", type=float, default=None, help="scales all stages (default: what the recipe says)")
    demo.add_argument("--recipe", default="nexus-tiny", help="recipe name or file (default nexus-tiny)")
    demo.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change a field of the recipe")
    demo.add_argument("--seed", type=int, help="seed of texts, splits, voices, noise and training")
    demo.add_argument("--json", action="store_true", help="print the report as JSON")
    demo.set_defaults(run=verbs.demo)

    chat = add("chat", help="ask a model; interactive when nothing is asked")
    chat.add_argument(
        "model", type=Path, nargs="?", default=None, help="model folder (default: the small one that comes along)"
    )
    chat.add_argument("--text", action="append", default=[], metavar="T", help="words of the question")
    for kind, what in (("audio", "sound"), ("image", "picture"), ("video", "film")):
        chat.add_argument(f"--{kind}", type=Path, action="append", default=[], metavar="FILE", help=f"a {what} file")
    chat.add_argument("--speak", type=Path, metavar="OUT.wav", help="write the spoken answer to this file")
    chat.add_argument("--read-aloud", action="store_true", help="speak the words of --text instead of answering them")
    chat.add_argument("--max-tokens", type=int, default=256, help="longest answer in tokens (default 256)")
    chat.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA adapter (PEFT layout) to merge in")
    chat.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1 (default cpu)")
    chat.add_argument("--voice-weights", choices=("as-saved", "int8"), default="as-saved", help="int8: a faster voice")
    chat.add_argument("--vocoder", metavar="URL", help="server that turns CosyVoice 2 tokens into sound")
    chat.add_argument("--json", action="store_true", help="print {text, audio, seconds} as JSON")
    chat.set_defaults(run=verbs.chat)


def _data(add: Any) -> None:
    """Making data, and bringing in one's own."""
    data = add("data", help="check rows for training, or bring them into one form")
    data.add_argument("action", choices=("check", "import"), help="look at every row, or write it in canonical form")
    data.add_argument("file", type=Path, help="JSONL of a known format, a JSON list, or lhotse's cuts")
    data.add_argument("--model", type=Path, metavar="DIR", help="check: lengths must fit this model")
    data.add_argument("--good", type=Path, metavar="OUT.jsonl", help="check: write the good rows there")
    data.add_argument("--out", type=Path, metavar="OUT.jsonl", help="import: the file to write")
    data.add_argument("--copy", action="store_true", help="import: copy media beside the file")
    data.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default 1)")
    data.add_argument("--json", action="store_true", help="print the counts as JSON")
    data.set_defaults(run=verbs.data)

    synth = add("synth", help="text and recordings in, verified speech training data out")
    synth.add_argument("recipe", help="data recipe or FILE.yaml; or: testset, regate DIR, review export|import DIR")
    synth.add_argument("folder", nargs="*", help="what `regate` and `review` work on")
    synth.add_argument("--out", type=Path, help="result folder")
    synth.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="such as source=FILE")
    synth.add_argument("--limit", type=int, metavar="N", help="only the first N rows of the sources")
    synth.add_argument("--executor", choices=("local", "ray"), default="local", help="where steps run (default local)")
    synth.add_argument("--workers", type=int, metavar="N", help="processes or actors (default: one per core)")
    synth.add_argument(
        "--serve", type=Path, metavar="ROOT", help="review export: name sounds below ROOT, which is served"
    )
    synth.add_argument("--address", metavar="ADDRESS", help="an existing Ray cluster")
    synth.add_argument("--json", action="store_true", help="print the report as JSON")
    synth.set_defaults(run=verbs.synth)


def _models(add: Any) -> None:
    """Assembling, training and looking into models."""
    build = add("build", help="assemble a model folder from published checkpoints")
    build.add_argument(
        "recipe", help="recipe name or FILE.yaml; or: convert FILE.pth (a pickle to safetensors); or: half MODEL"
    )
    build.add_argument("file", nargs="?", type=Path, help="the pickle after `convert`, the model folder after `half`")
    build.add_argument("--out", type=Path, required=True, help="the model folder; for convert, a .safetensors file")
    build.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change a field of the recipe")
    build.add_argument("--download", action="store_true", help="fetch what is missing from the Hugging Face hub")
    build.add_argument("--json", action="store_true")
    build.set_defaults(run=verbs.build)

    show = add("show", help="organs, parameters, rates and stages of a recipe or model folder")
    show.add_argument("what", help="recipe name, FILE.yaml or model folder")
    show.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change a field of the recipe")
    show.add_argument("--plan", type=int, metavar="N_GPUS", help="memory of each stage on that many GPUs")
    show.add_argument("--gpu-gib", type=float, metavar="G", help="memory of one GPU in GiB, for --plan")
    show.add_argument("--json", action="store_true")
    show.set_defaults(run=verbs.show)

    train = add("train", help="train a model folder on your own rows, or on recordings; alone or under torchrun")
    train.add_argument("recipe", help="recipe name or FILE.yaml: its stages, data and engine")
    train.add_argument("--init", type=Path, required=True, metavar="MODEL", help="the model folder to begin with")
    train.add_argument("--out", type=Path, default=Path("runs/train"), help="result folder (default runs/train)")
    train.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="such as data.train=my.jsonl")
    train.add_argument("--stages", metavar="A,B", help="only these stages (default: all that the data have rows for)")
    train.add_argument("--allow-inexact", action="store_true", help="go on although something has changed; it is said")
    train.add_argument("--json", action="store_true", help="print run.json")
    train.set_defaults(run=verbs.train)

    prepare = add("prepare", help="speech codes and language states of spoken answers, for training the voice alone")
    prepare.add_argument("model", type=Path, help="model folder whose states they are")
    prepare.add_argument("data", type=Path, help="FILE.jsonl with answers that have a sound")
    prepare.add_argument("--out", type=Path, required=True, help="result folder")
    prepare.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the states kept")
    prepare.add_argument("--device", default="cpu", help="where to compute (default cpu)")
    prepare.set_defaults(run=verbs.prepare)


def _measures(add: Any) -> None:
    """How good it is, and how fast."""
    evaluate = add("eval", help="measure a model, an endpoint or recorded answers on a suite")
    evaluate.add_argument(
        "responder", help="model folder, openai:URL#MODEL or answers:FILE; or: diff A B; or: worker MODEL"
    )
    evaluate.add_argument("other", nargs="?", help="result folder A after `diff`, model folder after `worker`")
    evaluate.add_argument("b", nargs="?", help="result folder B, after `diff`")
    evaluate.add_argument("--suite", metavar="NAME", help="suite name or FILE.yaml")
    evaluate.add_argument("--data", type=Path, metavar="DIR", help="where the suite's data lie")
    evaluate.add_argument("--out", type=Path, default=Path("runs/eval"), help="result folder (default runs/eval)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    evaluate.add_argument("--split", help="part of the data, where a suite has parts")
    evaluate.add_argument("--recogniser", metavar="NAME", help="pocketsphinx, pocketsphinx:FILE or openai:URL#MODEL")
    evaluate.add_argument("--judge", metavar="openai:URL#MODEL", help="a language model that grades answers")
    evaluate.add_argument("--speaker-model", type=Path, metavar="DIR", help="a local model that knows voices apart")
    evaluate.add_argument("--rows", type=int, default=16, help="items asked at a time (default 16)")
    evaluate.add_argument("--max-tokens", type=int, default=256, help="longest answer in tokens (default 256)")
    evaluate.add_argument("--device", default="cpu", help="where a model folder computes (default cpu)")
    evaluate.add_argument("--json", action="store_true", help="print the report as JSON")
    evaluate.set_defaults(run=verbs.eval)

    align = add("align", help="how far picture, sound and text agree inside a model, layer by layer")
    align.add_argument("model", type=Path, help="model folder, ours or a local transformers image-text model")
    align.add_argument("--data", required=True, metavar="TRIPLES", help="FILE.jsonl, world:N, imagenet:DIR, wit:FILE")
    align.add_argument("--baseline", type=Path, metavar="MODEL", help="a second model to stand beside")
    align.add_argument("--out", type=Path, default=Path("runs/align"), help="result folder (default runs/align)")
    align.add_argument("--layers", default="all", help="all, or numbers such as 0,4,8")
    align.add_argument("--k", type=int, help="neighbours (default 10)")
    align.add_argument("--raw", action="store_true", help="do not normalise rows")
    align.add_argument("--clamp", type=float, metavar="Q", help="clamp features at this quantile of their size")
    align.add_argument("--preset", choices=("paper_tables",), help="k = 50, rows as they are, 1024 triples")
    align.add_argument("--limit", type=int, metavar="N", help="only the first N triples")
    align.add_argument("--device", default="cpu", help="where to compute (default cpu)")
    align.add_argument("--json", action="store_true")
    align.set_defaults(run=verbs.align)

    bench = add("bench", help="time our parts against published ones, side by side")
    bench.add_argument(
        "names",
        nargs="*",
        help="decoder hearing gpu alignment voices factory training evaluation (default: most)",
    )
    bench.add_argument("--reference", type=Path, metavar="FILE", help="the published alignment measures, to race them")
    bench.add_argument("--demo", type=Path, metavar="DIR", help="a finished demo, to compare voices on what it learned")
    bench.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="result folder")
    bench.add_argument("--json", action="store_true")
    bench.set_defaults(run=verbs.bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
        if options.verb is None:
            parser.print_help()
        else:
            options.run(options)
        sys.stdout.flush()  # here, where a reader that has gone is noticed
        return 0
    except SystemExit as done:  # --help and --version end so
        return done.code if isinstance(done.code, int) else 0
    except NexusError as error:
        print(f"nexus: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nexus: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python would say so once more when it flushes at its end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"nexus: the machine refused: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
