"""`nexus demo`: from nothing to a model that hears, sees and speaks, and a report of what it can do.

One folder holds everything. A stage that is finished leaves its weights and a record and is never run again; a killed
run continues behind the last finished stage, with the numbers of steps fixed in plan.json, and gives the same weights.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nexus
from nexus.data.chat import ChatTokenizer
from nexus.demo import stages
from nexus.demo.corpus import Waves, plan, speak_set
from nexus.demo.evaluate import Answers, Exam, first_sound_seconds
from nexus.demo.show import model_card, write_demo_report
from nexus.demo.stages import Lab, Losses
from nexus.demo.world import World
from nexus.errors import BadConfig, Busy
from nexus.model.build import load_weights, save_model
from nexus.model.omni import OmniModel
from nexus.progress import MemoryWatch, Progress
from nexus.recipe import Recipe, StageConfig
from nexus.respond import OmniResponder
from nexus.train.loop import Pace, bf16_is_faster, fit
from nexus.train.stage import freeze, frozen_digest

DEFAULT_MINUTES = 14.0  # what the recipe's budgets in seconds add up to, with synthesis and evaluation
UNTRAINED_TOKENS, UNTRAINED_SECONDS = 8, 2.0  # an untrained model never stops by itself; its noise need not be long
QUANTISER_SOUNDS = 1500
FIRST_SOUNDS = 20
MAIN_KEYS = {  # tasks of the contract that this version's demo has not: reported as null with the reason
    "avqa": "accuracy",
    "video": "accuracy",
    "multiturn": "accuracy",
    "s2tt": "bleu_zh_en",
    "ser": "accuracy",
    "caption": "accuracy",
}
VERSIONED = ("torch", "transformers", "tokenizers", "numpy", "espeakng-loader", "pocketsphinx")


def source_digest() -> str:
    """Digest of this package's code: what a result is only comparable within."""
    root = Path(nexus.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class Run:
    """One demo folder: its plan, its records, its clock."""

    recipe: Recipe
    out: Path
    minutes: float
    progress: Progress
    plan: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        return {"recipe": self.recipe.fingerprint(), "minutes": self.minutes, "code": source_digest()}

    def open(self) -> None:
        """Take the folder: begin anew, or continue what was begun. Raises BadConfig when it holds another run."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "plan.json"
        if path.is_file():
            self.plan = json.loads(path.read_text(encoding="utf-8"))
            mine, theirs = self.identity, self.plan["identity"]
            differs = [key for key in mine if mine[key] != theirs.get(key)]
            if differs:
                said = ", ".join(f"{key} (there {theirs.get(key)}, now {mine[key]})" for key in differs)
                raise BadConfig(f"{self.out} holds another run; different: {said}; give another --out or remove it")
        elif any(self.out.iterdir()):
            raise BadConfig(f"{self.out} exists and holds something else; give another --out")
        else:
            threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            threads = min(threads, 8)
            torch.set_num_threads(threads)
            self.plan = {"identity": self.identity, "threads": threads, "bf16": bf16_is_faster(), "steps": {}}
            self.save_plan()
        torch.set_num_threads(self.plan["threads"])

    def save_plan(self) -> None:
        """plan.json: steps of every stage whose speed is known."""
        _write_json(self.out / "plan.json", self.plan)

    def has(self, name: str) -> bool:
        """Whether an earlier run finished this piece of work."""
        return (self.out / "state" / f"{name}.json").is_file()

    @contextmanager
    def clocked(self, name: str) -> Iterator[None]:
        """Count the block's wall and processor time under `name`; finished work keeps its time across kills."""
        wall, cpu = time.perf_counter(), _cpu_seconds()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - wall
        self.cpu_seconds += _cpu_seconds() - cpu

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of a piece of work: made now, or read when an earlier run finished it."""
        path = self.out / "state" / f"{name}.json"
        if self.has(name):
            record = json.loads(path.read_text(encoding="utf-8"))
        else:
            path.parent.mkdir(exist_ok=True)
            wall, cpu = time.perf_counter(), _cpu_seconds()
            record = work()
            record["seconds"], record["cpu_seconds"] = time.perf_counter() - wall, _cpu_seconds() - cpu
            _write_json(path, record)
        self.seconds[name] = record["seconds"]
        self.cpu_seconds += record["cpu_seconds"]
        return record

    def train(self, model: nn.Module, config: StageConfig, losses: Losses, head: nn.Module | None = None) -> dict[str, Any]:
        """One stage: trained now, or loaded when finished before. Frozen parameters are checked bit for bit."""
        weights = self.out / "state" / f"{config.name}.safetensors"

        def work() -> dict[str, Any]:
            parameters = freeze(model, config.trainable)
            own = {f"head.{name}": p for name, p in head.named_parameters()} if head else {}
            frozen = frozen_digest(model, config.trainable)
            pace = Pace(config.seconds * self.minutes / DEFAULT_MINUTES, config.min_steps, self.plan["steps"].get(config.name))

            def planned(steps: int) -> None:
                self.plan["steps"][config.name] = steps
                self.save_plan()

            model.train()
            with self.progress.stage(config.name) as watch:
                curve = fit({**parameters, **own}, config.optim, losses, pace, watch, self.plan["bf16"], planned)
            model.eval()
            assert frozen == frozen_digest(model, config.trainable), f"stage {config.name} changed frozen parameters"
            save_file(_chosen(model, config.trainable) | {k: p.detach().contiguous() for k, p in own.items()}, weights)
            counts = {"parameters": _count(parameters), "head_parameters": _count(own)}
            return {"steps": pace.steps, "curve": curve, "trainable": list(config.trainable), **counts}

        fresh = not self.has(config.name)
        record = self.once(config.name, work)
        if not fresh:
            saved = load_file(weights)
            learned = {k: v for k, v in saved.items() if not k.startswith("head.")}
            load_weights(model, {**model.state_dict(), **learned}, str(weights))
            if head is not None:
                head.load_state_dict({k.removeprefix("head."): v for k, v in saved.items() if k.startswith("head.")})
        return record


def run_demo(recipe: Recipe, out: Path, minutes: float, progress: Progress, begun: float | None = None) -> dict[str, Any]:
    """The whole loop; returns the report. `begun` is when the command started (time.perf_counter).

    Raises BadConfig for a recipe that is no demo or a folder of another run, Busy for a folder in use.
    """
    if recipe.world is None or recipe.model.hearing is None or recipe.model.codec is None:
        raise BadConfig(f"recipe {recipe.name} is no demo recipe: it needs a world, hearing, voice and codec")
    begun = time.perf_counter() if begun is None else begun
    run = Run(recipe, out, minutes, progress)
    resumed = (out / "plan.json").is_file()
    run.open()
    with _alone(out), MemoryWatch() as memory:
        lab = _prepare(run)
        exam = Exam(lab, run.plan["threads"])
        untrained = _untrained(run, lab, exam)
        records, before = _learn(run, lab, exam)
        report, replies = _examine(run, lab, exam, untrained, before)
        spent = sum(run.seconds.values())
        report["memory"] = {"peak_gib": memory.peak_gib, "measure": memory.measure}
        report["seconds"] = {
            **run.seconds,
            "total": spent if resumed else time.perf_counter() - begun,
            "cpu": run.cpu_seconds,
            "resumed": resumed,
        }
        _leave(run, lab, exam, records, report, replies)
    return report


def _prepare(run: Run) -> Lab:
    """Corpus, tokenizer and an untrained model."""
    recipe, config = run.recipe, run.recipe.world
    assert config is not None
    world = World(config.seed)
    with run.clocked("setup"):
        plans = plan(world, config)

    def speak() -> dict[str, Any]:
        hours, digests = 0.0, {}
        total = sum(len(members) for members in plans.sets.values())
        with run.progress.stage("corpus", total, "utterances") as watch:

            def spoken(count: int, seconds: float) -> None:
                nonlocal hours
                hours += seconds / 3600
                watch.advance(count, hours=hours)

            for name, members in plans.sets.items():
                digests[name] = speak_set(run.out / "cache" / name, members, run.plan["threads"], spoken).digest()
        return {"utterances": total, "hours": hours, "fingerprint": plans.fingerprint, "waves": digests}

    run.once("corpus", speak)
    with run.clocked("setup"):
        waves = {name: Waves(run.out / "cache" / name, members) for name, members in plans.sets.items()}
        path = run.out / "state" / "tokenizer.json"
        if not path.is_file():
            texts = stages.tokenizer_texts(world)
            ChatTokenizer.train(recipe.tokenizer, texts, recipe.model.language.vocab_size).save(path)
        torch.manual_seed(config.seed)
        return Lab(recipe, world, plans, waves, ChatTokenizer.load(path), OmniModel(recipe.model).eval())


def _untrained(run: Run, lab: Lab, exam: Exam) -> Answers:
    """What the same model says before any training."""

    def work() -> dict[str, Any]:
        responder = OmniResponder(lab.model, lab.tokenizer)
        with run.progress.stage("untrained", unit="exams"):
            spoken = exam.talk(responder, UNTRAINED_TOKENS, UNTRAINED_SECONDS)
            heard = exam.transcribe(*(exam.sounds(replies) for replies in spoken))
            return asdict(exam.answer(responder, spoken, (heard[0], heard[1])))

    record = run.once("untrained", work)
    return Answers(**{f.name: record[f.name] for f in fields(Answers)})


def _learn(run: Run, lab: Lab, exam: Exam) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Stage 0, the picture answers before any audio stage, stages 1 to 3."""
    recipe, model, records = run.recipe, lab.model, {}
    assert model.codec is not None
    config = {stage.name: stage for stage in (*recipe.standins, *recipe.stages)}
    if not run.has("codec"):
        with run.clocked("quantiser"), run.progress.stage("quantiser", unit="fits"):
            waves = lab.waves["spoken"]
            sounds = [torch.from_numpy(waves[i].samples) for i in range(min(QUANTISER_SOUNDS, len(waves)))]
            model.codec.fit_quantizer(sounds, lab.seed("quantiser"))
    records["codec"] = run.train(model, config["codec"], stages.codec_losses(lab, config["codec"]))
    sight, cells = stages.sight_losses(lab, config["sight"])
    records["sight"] = run.train(model, config["sight"], sight, cells)
    records["backbone"] = run.train(model, config["backbone"], stages.backbone_losses(lab, config["backbone"]))
    ears, spelling = stages.ears_losses(lab, config["ears"])
    records["ears"] = run.train(model, config["ears"], ears, spelling)
    responder = OmniResponder(model, lab.tokenizer)
    before = run.once("before_audio", lambda: {"seen": exam.look(responder, exam.pictures)})["seen"]
    align = stages.align_losses(lab, config["align"], spelling)
    records["align"] = run.train(model, config["align"], align, spelling)
    records["sft"] = run.train(model, config["sft"], stages.sft_losses(lab, config["sft"]))
    lines: list[stages.Line] = []
    if not run.has("speak"):
        with run.clocked("prepare"), run.progress.stage("prepare", unit="lines") as watch:
            lines = stages.prepare_lines(lab, config["speak"], watch.advance)
    records["speak"] = run.train(model, config["speak"], stages.speak_losses(lab, config["speak"], lines))
    return records, before


def _examine(
    run: Run, lab: Lab, exam: Exam, untrained: Answers, before: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report's scores, and the answers behind them."""
    responder = OmniResponder(lab.model, lab.tokenizer)
    with run.clocked("evaluation"), run.progress.stage("evaluation", 4, "parts") as watch:
        spoken = exam.talk(responder)
        round_trip, originals = exam.codec_round_trip(), exam.originals()
        watch.advance()
        tts, s2s, coded, original = exam.transcribe(*map(exam.sounds, spoken), round_trip, originals)
        watch.advance()
        trained = exam.answer(responder, spoken, (tts, s2s))
        half = len(exam.pictures) // 2
        shuffled = exam.look(responder, [*exam.pictures[half:], *exam.pictures[:half]])
        watch.advance()
        count = min(FIRST_SOUNDS, len(exam.items))
        wait = first_sound_seconds(responder, [lab.waves["test_questions"][i] for i in range(count)])
        watch.advance()
    report: dict[str, Any] = {
        "schema": 1,
        "recipe": run.recipe.name,
        "asr": exam.recognition(trained, untrained),
        "sqa": exam.spoken_questions(trained, untrained),
        "vqa": exam.picture_questions(trained, untrained, before, shuffled),
        "codec": exam.codec(coded, original),
        "tts": exam.synthesis(trained, untrained, original, spoken[0]),
        "s2s": exam.spoken_answers(trained, untrained),
        "first_sound": wait,
        **{task: {key: None, "reason": "no task of this version's demo"} for task, key in MAIN_KEYS.items()},
        "model": {"parameters": _count(dict(lab.model.named_parameters()))},
    }
    return report, {"trained": trained, "recited": spoken[0], "answered": spoken[1]}


def _leave(
    run: Run, lab: Lab, exam: Exam, records: dict[str, dict[str, Any]], report: dict[str, Any], replies: dict[str, Any]
) -> None:
    """report.json, report.html, run.json and the model folder."""
    machine = {"platform": platform.platform(), "processor": _processor(), "python": platform.python_version()}
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    save_model(run.out / "model", lab.model, {"recipe": run.recipe.model_dump(mode="json"), "demo": run.plan["identity"]})
    lab.tokenizer.save(run.out / "model" / "tokenizer.json")
    (run.out / "model" / "README.md").write_text(model_card(run.recipe, report), encoding="utf-8")
    stage_records = {name: {k: v for k, v in record.items() if k != "curve"} for name, record in records.items()}
    details = {"plan": run.plan, "stages": stage_records, "machine": machine, "versions": versions}
    _write_json(run.out / "run.json", {"schema": 1, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **details})
    write_demo_report(run.out / "report.html", exam, report, records, replies)
    _write_json(run.out / "report.json", report)


def _chosen(model: nn.Module, globs: Sequence[str]) -> dict[str, Tensor]:
    """Weights and buffers a stage has trained."""
    return {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if any(fnmatchcase(name, glob) for glob in globs)
    }


def _count(parameters: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def _cpu_seconds() -> float:
    """Processor time of this process and its finished children."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _processor() -> str:
    """The processor's name where the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder against a second demo. The lock dies with the process."""
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{out} is in use by another demo; wait for it or give another --out") from None
        yield
