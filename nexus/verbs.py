"""What each verb of the command does: options in, the work called, its result printed.

Everything heavy is imported by the verb that needs it.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nexus.errors import BadConfig, BadRecord

if TYPE_CHECKING:
    from nexus.recipe import Recipe

BEGUN = time.perf_counter()


def demo(options: argparse.Namespace) -> None:
    """`nexus demo`."""
    from nexus.progress import Progress
    from nexus.recipe import Recipe

    seed = [] if options.seed is None else [f"world.seed={options.seed}"]
    recipe = Recipe.load(options.recipe, [*options.set, *seed])
    if options.minutes is not None and not 0 < options.minutes <= 10_000:
        raise BadConfig(f"--minutes {options.minutes:g}: expected a number above 0")
    from nexus.demo.demo import run_demo
    from nexus.demo.show import summary

    with Progress() as progress:
        report = run_demo(recipe, options.out, options.minutes or recipe.minutes, progress, BEGUN)
    print(json.dumps(report, indent=1) if options.json else summary(report, options.out))


def show(options: argparse.Namespace) -> None:
    """`nexus show`."""
    from nexus.recipe import Recipe
    from nexus.train.show import describe, table

    if (options.plan is None) != (options.gpu_gib is None):
        raise BadConfig("--plan N_GPUS and --gpu-gib G belong together: give both or neither")
    if Path(options.what).is_dir():
        from nexus.model.folder import read_config

        if options.set:
            raise BadConfig("--set changes recipes; a model folder is as it is")
        config, about = read_config(Path(options.what))
        recipe = _recipe_of(about)
        if recipe is None and options.plan is not None:
            raise BadConfig(f"--plan is made of stages, and {options.what} does not say its recipe; give the recipe")
    else:
        recipe = Recipe.load(options.what, options.set)
        config = recipe.model
    planned = None
    if options.plan is not None and recipe is not None:
        from nexus.train.plan import plan

        planned = plan(recipe, options.plan, options.gpu_gib)
    described = describe(config, recipe.stages if recipe else (), planned)
    print(json.dumps(described, indent=1) if options.json else table(described))


def build(options: argparse.Namespace) -> None:
    """`nexus build`."""
    if options.recipe == "convert":
        if options.file is None:
            raise BadConfig("convert needs a file: nexus build convert FILE.pth --out FILE.safetensors")
        from nexus.pickles import convert

        built = convert(options.file, options.out)
        if not options.json:
            print(f"{options.out}: {built['tensors']} tensors, {built['parameters']:,} numbers")
    elif options.recipe == "half":
        if options.file is None:
            raise BadConfig("half needs a model folder: nexus build half MODEL --out DIR")
        from nexus.model.folder import halve

        built = {"bytes": halve(options.file, options.out)}
        if not options.json:
            print(f"{options.out}: {built['bytes'] / 1e6:.1f} MB")
    else:
        if options.file is not None:
            raise BadConfig(f"{options.file}: a second name belongs to `nexus build convert`; what is it for?")
        if options.download:
            os.environ["HF_HUB_OFFLINE"] = "0"  # before the library reads it
        from nexus.build import build
        from nexus.recipe import Recipe

        recipe = Recipe.load(options.recipe, options.set)
        built = build(recipe, options.out, download=options.download, say=_say(options.json))
    if options.json:
        print(json.dumps(built, indent=1))


def _say(as_json: bool) -> Callable[[str], None]:
    """Prints a line of progress at once; beside a JSON result it goes to stderr."""
    return functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)


def bench(options: argparse.Namespace) -> None:
    """`nexus bench`."""
    from nexus.bench.run import run

    results = run(options.names, options.out, _say(options.json), reference=options.reference, demo=options.demo)
    if options.json:
        print(json.dumps(results, indent=1))


def chat(options: argparse.Namespace) -> None:
    """`nexus chat`."""
    from nexus.terminal import chat

    chat(options)


def eval(options: argparse.Namespace) -> None:
    """`nexus eval`."""
    if options.responder == "worker":
        from nexus.eval.worker import run

        if options.other is None:
            raise BadConfig("nexus eval worker MODEL answers conversations from standard input; name the model folder")
        run(Path(options.other), options.device)
        return
    if options.responder == "diff":
        from nexus.eval.compare import diff

        if options.other is None or options.b is None:
            raise BadConfig("nexus eval diff A B compares two result folders; name both")
        print(json.dumps(diff(Path(options.other), Path(options.b)), indent=1))
        return
    if options.other is not None:
        raise BadConfig(f"{options.other}: a second name belongs to `nexus eval diff`; what is it for?")
    if options.suite is None:
        raise BadConfig("--suite NAME or FILE.yaml says what to measure; see docs/evaluation.md")
    from nexus.eval.run import evaluate
    from nexus.progress import Progress

    with Progress() as progress:
        report = evaluate(
            options.responder,
            options.suite,
            options.data,
            options.out,
            options.limit,
            split=options.split,
            recogniser=options.recogniser,
            judge=options.judge,
            speaker=options.speaker_model,
            rows=options.rows,
            max_tokens=options.max_tokens,
            device=options.device,
            token=os.environ.get("NEXUS_TOKEN"),
            progress=progress,
        )
    print(json.dumps(report, indent=1, ensure_ascii=False) if options.json else _scores(report, options.out))


def _scores(report: dict[str, Any], out: Path) -> str:
    """Main scores of a report for people, one line per suite and metric."""
    lines = []
    for suite, scores in report.items():
        if isinstance(scores, dict):
            lines += [f"{suite}.{k:<24}{v:.4g}" for k, v in scores.items() if type(v) in (int, float)]
    return "\n".join([*lines, f"report{'':<24}{out / 'report.html'}"])


def align(options: argparse.Namespace) -> None:
    """`nexus align`."""
    from nexus.demo.triples import triples
    from nexus.eval.alignment.run import Options, align
    from nexus.progress import Progress

    chosen = Options(
        k=options.k,
        normalise=False if options.raw else None,
        clamp_quantile=options.clamp,
        limit=options.limit,
        layers=options.layers,
        preset=options.preset,
    )
    with Progress() as progress:
        found = align(
            options.model,
            triples(options.data),
            baseline=options.baseline,
            options=chosen,
            out=options.out,
            device=options.device,
            progress=progress,
        )
    print(json.dumps(found, indent=1) if options.json else f"report {options.out / 'report.html'}")


def _recipe_of(about: dict[str, Any]) -> "Recipe | None":
    from nexus.recipe import Recipe, validate

    return validate(Recipe, about["recipe"], "config.json: about.recipe") if "recipe" in about else None


def train(options: argparse.Namespace) -> None:
    """`nexus train`."""
    from nexus.progress import Progress
    from nexus.recipe import Recipe

    recipe = Recipe.load(options.recipe, options.set)
    from nexus.learning import learn

    stages = None if options.stages is None else options.stages.split(",")
    with Progress() as progress:
        run = learn(
            recipe,
            options.init,
            options.out,
            stages=stages,
            allow_inexact=options.allow_inexact,
            progress=progress,
        )
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(run, indent=1) if options.json else f"model {options.out / 'model'}")


def prepare(options: argparse.Namespace) -> None:
    """`nexus prepare`."""
    from nexus.progress import Progress
    from nexus.train.prepare import prepare_file

    with Progress() as progress:
        prepare_file(
            options.model, options.data, options.out, dtype=options.dtype, device=options.device, progress=progress
        )


def data(options: argparse.Namespace) -> None:
    """`nexus data check|import`. Bad rows are listed on stderr; where there are any, the verb ends as a mistake."""
    from dataclasses import asdict

    from nexus.data.importing import check, import_
    from nexus.model.folder import read_config

    if options.jobs < 1:
        raise BadConfig(f"--jobs {options.jobs}: expected at least 1")

    def bad(line: int, reason: str) -> None:
        print(f"{options.file}:{line}: {reason}", file=sys.stderr)

    if options.action == "check":
        if options.out is not None or options.copy:
            raise BadConfig("--out and --copy belong to `nexus data import`; check writes good rows with --good")
        specs = None if options.model is None else read_config(options.model)[0]
        tokenizer = None if options.model is None else options.model / "tokenizer.json"
        found = check(options.file, bad, specs=specs, tokenizer=tokenizer, good=options.good, processes=options.jobs)
    else:
        if options.out is None or options.good is not None or options.model is not None:
            raise BadConfig("nexus data import FILE --out OUT.jsonl; --good and --model belong to check")
        found = import_(options.file, options.out, bad, copy=options.copy, processes=options.jobs)
    if options.json:
        print(json.dumps(asdict(found), indent=1))
    else:
        seconds = f"{found.heard_seconds:.0f} s heard, {found.spoken_seconds:.0f} s spoken"
        longest = "" if found.longest_tokens is None else f", the longest has {found.longest_tokens} positions"
        print(f"{found.rows} rows: {found.good} good, {found.bad} bad; {seconds}{longest}")
    if found.bad:
        raise BadRecord(f"{options.file}: {found.bad} of {found.rows} rows are bad, listed above; correct them")


def synth(options: argparse.Namespace) -> None:
    """`nexus synth`, and its reserved words."""
    match options.recipe, options.folder:
        case "testset", []:
            report = _testset(options)
        case "regate", [folder]:
            from nexus.factory import regate

            report = regate(Path(folder), options.set)
        case "review", ["export" | "import" as direction, folder, *file]:
            report = _review(direction, Path(folder), [Path(name) for name in file], options)
        case "testset" | "regate" | "review" as word, _:
            raise BadConfig(f"nexus synth {word}: expected {SYNTH_WORDS[word]}")
        case _, []:
            report = _synthesised(options)
        case _, [folder, *_]:
            raise BadConfig(f"{folder}: a second name belongs to regate and review; what is it for?")
    if options.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))


SYNTH_WORDS = {
    "testset": "--set source=RUN_FOLDER --out DIR",
    "regate": "DIR --set verify.max_wer=0.1",
    "review": "export DIR, or import DIR EXPORT.json",
}


def _synthesised(options: argparse.Namespace) -> dict[str, Any]:
    from nexus.factory import synth as run
    from nexus.processes import cores
    from nexus.progress import Progress

    if options.out is None:
        raise BadConfig("nexus synth leaves a folder: name it with --out DIR")
    with Progress() as progress:
        report = run(
            options.recipe,
            options.out,
            options.set,
            options.limit,
            executor=options.executor,
            workers=cores() if options.workers is None else options.workers,
            address=options.address,
            progress=progress,
        )
    if not options.json:
        dropped = ", ".join(f"{reason} {count}" for reason, count in report["dropped"].items()) or "nothing"
        print(f"{report['kept']} of {report['read']} kept; dropped: {dropped}")
        print(f"report {options.out / 'report.html'}")
    return report


def _testset(options: argparse.Namespace) -> dict[str, Any]:
    from nexus.progress import Progress
    from nexus.synth.testset import AsrSetConfig, build

    if options.out is None:
        raise BadConfig("nexus synth testset leaves a folder: name it with --out DIR")
    with Progress() as progress:
        return build(AsrSetConfig.load(None, options.set), options.out, progress)


def _review(direction: str, folder: Path, files: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    from nexus.synth.review import export_queue, import_reviews

    if direction == "export":
        if files:
            raise BadConfig(f"{files[0]}: the tasks are written into {folder / 'review'}; name the folder alone")
        playing: Literal["embedded", "local"] = "embedded" if options.serve is None else "local"
        count = export_queue(folder, playing, options.serve)
        if not options.json:
            print(f"{count} tasks: {folder / 'review' / 'tasks.json'}, their form: labels.xml beside it")
        return {"tasks": count}
    if len(files) != 1:
        raise BadConfig(f"nexus synth review import DIR EXPORT.json: expected one file, given {len(files)}")
    counts = dict(import_reviews(folder, files[0]))
    if not options.json:
        print(", ".join(f"{name} {count}" for name, count in counts.items()))
    return counts
