"""`nexus demo`: from nothing to a model that hears, sees and speaks, and a report of what it can do."""

import importlib.metadata
import io
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus.codec.rvq import RVQCodec
from nexus.data.chat import ChatTokenizer
from nexus.demo import stages
from nexus.demo.beside import beside
from nexus.demo.corpus import plan
from nexus.demo.evaluate import Answers, Exam, Sat, first_sound_seconds
from nexus.demo.lab import Lab
from nexus.demo.mandarin import pairs
from nexus.demo.rows import HEARD_TASKS, SILENT_TASKS, check_mixture, film_words, manner_words, tokenizer_texts
from nexus.demo.run import Run, count
from nexus.demo.show import model_card, write_demo_report
from nexus.demo.spoken import RATE_HZ, around_of, counts, open_waves, speak
from nexus.demo.world import World
from nexus.engines.speak import Espeak, Voice
from nexus.errors import BadConfig
from nexus.model.folder import read_config, save_model
from nexus.model.omni import OmniModel
from nexus.organs import RVQConfig
from nexus.progress import MemoryWatch, Progress
from nexus.recipe import Recipe, StageConfig, validate
from nexus.respond import OmniResponder
from nexus.results import write_json
from nexus.train.parallel import Ranks
from nexus.train.stage import trainable_names
from nexus.train.standins import CharacterCTC, look_back, look_for_likes

UNTRAINED_ITEMS = 60  # of each paper: it has nothing to say
UNTRAINED_TOKENS, UNTRAINED_SECONDS = 6, 0.5  # an untrained model never stops by itself; its noise need not be long
TASKS_OF = {  # what may stand in the mixtures
    "codec": ("sound",),
    "ears": ("asr",),
    "sight": ("picture",),
    "backbone": SILENT_TASKS,
    "align": HEARD_TASKS,
    "sft": (*HEARD_TASKS, *SILENT_TASKS),
    "speak": ("tts", "s2s"),
}
AUXILIARY_OF = {"ears": ("manner",), "align": ("ctc", "words")}  # losses that may stand in `auxiliary`
TOKENIZER_SENTENCES, TOKENIZER_PAIRS = 20_000, 6_000
QUANTISER_SOUNDS = 1500
FIRST_SOUNDS = 20
WRITTEN = "state/written.part.json"  # the second process's answers
EXAM_SECONDS = 90.0  # examination and report, whatever the scale
VERSIONED = ("torch", "transformers", "tokenizers", "numpy", "espeakng-loader", "pocketsphinx")


def run_demo(
    recipe: Recipe, out: Path, minutes: float, progress: Progress, begun: float | None = None
) -> dict[str, Any]:
    """The whole loop; returns the report. `begun` is when the command started (time.perf_counter).

    Raises BadConfig for a recipe that is no demo or a folder of another run, Busy for a folder in use.
    """
    _check(recipe)
    run = Run(recipe, out, minutes, progress, time.perf_counter() if begun is None else begun)
    with run.opened(), MemoryWatch() as memory:
        if (out / "report.json").is_file():  # written last: all is done
            finished: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
            return finished
        run.memory = memory
        lab = _prepare(run)
        exam = Exam(lab, run.plan["threads"])
        untrained = _untrained(run, lab, exam)
        records, before, sat = _learn(run, lab, exam)
        report, replies = _examine(run, lab, exam, untrained, before, sat)
        report["memory"] = {"peak_gib": run.peak_gib, "measure": memory.measure}
        report["seconds"] = {**run.seconds, "total": run.elapsed, "cpu": run.cpu_seconds}
        _leave(run, lab, exam, records, report, replies)
    return report


def _check(recipe: Recipe) -> None:
    """Refuse, before anything is made, what would fail after minutes. Raises BadConfig, BadRecord for a folder
    of noises, or NexusError for a voice."""
    organs = {
        "world": recipe.world,
        "vision": recipe.model.vision,
        "hearing": recipe.model.hearing,
        "voice": recipe.model.voice,
    }
    missing = [name for name, organ in organs.items() if organ is None]
    if missing:
        raise BadConfig(f"recipe {recipe.name} is no demo recipe: it has no {', '.join(missing)}")
    if not isinstance(recipe.model.codec, RVQConfig):
        raise BadConfig(f"recipe {recipe.name}: the demo trains its own codec, expected model.codec of type rvq")
    world = recipe.world
    assert world is not None
    with torch.device("meta"):
        model = OmniModel(recipe.model)
    for stage in (*recipe.standins, *recipe.stages):
        trainable_names(model, stage.trainable)
        check_mixture(stage.name, stage.mixture, TASKS_OF[stage.name], world)
        _check_auxiliary(stage)
    Espeak().phonemes("one", Voice(world.target_voice, world.target_rate_wpm))
    plan(World(world.seed), world)
    if world.noise is not None:
        around_of(world.noise)


def _check_auxiliary(stage: StageConfig) -> None:
    known = AUXILIARY_OF.get(stage.name, ())
    for name in stage.auxiliary:
        if name not in known:
            expected = f"expected some of {', '.join(known)}" if known else "the stage has none"
            raise BadConfig(f"stages.{stage.name}.auxiliary: unknown loss {name!r}, {expected}; rename or remove it")


def reopened(out: Path) -> Lab:
    """The lab of a finished demo, its model untrained. Raises BadConfig for a folder that holds none."""
    if not (out / "report.json").is_file():
        raise BadConfig(f"{out}: expected the folder of a finished demo; make one with `nexus demo --out {out}`")
    recipe = validate(Recipe, read_config(out / "model")[1]["recipe"], f"{out / 'model'}: recipe")
    run = Run(recipe, out, recipe.minutes, Progress(io.StringIO()), time.perf_counter())
    run.plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    return _prepare(run)


def _prepare(run: Run) -> Lab:
    """Corpus, tokenizer and an untrained model."""
    recipe, config = run.recipe, run.recipe.world
    assert config is not None
    world = World(config.seed)
    with run.clocked("setup"):
        plans = plan(world, config)

    def spoken() -> dict[str, Any]:
        around = None if config.noise is None else around_of(config.noise)
        made = speak(run.out / "cache", plans.sets, config.verified, run.plan["threads"], run.progress, around)
        return {
            "utterances": sum(map(len, made.values())),
            "hours": sum(int(waves.lengths.sum()) for waves in made.values()) / RATE_HZ / 3600,
            "fingerprint": plans.fingerprint,
            "waves": {name: waves.digest() for name, waves in made.items()},
            "sets": counts(run.out / "cache"),
        }

    run.once("corpus", spoken)
    with run.clocked("setup"):
        waves = open_waves(run.out / "cache", plans.sets)
        path = run.out / "state" / "tokenizer.json"
        if not path.is_file():
            bilingual = config.mandarin or config.english
            chinese = [pair.zh for pair in pairs("train", TOKENIZER_PAIRS, config.seed)] if bilingual else []
            told = film_words() if config.films else []
            told += manner_words() if config.captioned or config.felt else []
            texts = tokenizer_texts([*world.all_sentences_for_lm(TOKENIZER_SENTENCES), *told], chinese)
            ChatTokenizer.train(recipe.tokenizer, texts, recipe.model.language.vocab_size).save(path)
        torch.manual_seed(config.seed)
        model = OmniModel(recipe.model).eval()
        look_for_likes(model)
        look_back(model)
        return Lab(recipe, world, plans, waves, ChatTokenizer.load(path), model)


def _untrained(run: Run, lab: Lab, exam: Exam) -> Answers:
    """What the same model says before any training."""

    def work() -> dict[str, Any]:
        responder = OmniResponder(lab.model, lab.tokenizer)
        with run.progress.stage("untrained", unit="exams"):
            spoken = exam.talk(responder, UNTRAINED_TOKENS, UNTRAINED_SECONDS, UNTRAINED_ITEMS)
            heard = exam.transcribe(*(exam.sounds(replies) for replies in spoken))
            names = [name for name in exam.papers if not name.endswith(".other")]
            written = exam.write(responder, names, UNTRAINED_ITEMS, UNTRAINED_TOKENS)
            return asdict(Answers(written, [reply.text for reply in spoken[1]], *heard))

    record = run.once("untrained", work)
    return Answers(**{f.name: record[f.name] for f in fields(Answers)})


def _learn(run: Run, lab: Lab, exam: Exam) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]], Sat]:
    """Stage 0 in two tracks, the picture answers before any audio stage, stages 1 to 3, and all answers after them."""
    recipe, model, records = run.recipe, lab.model, {}
    threads = run.plan["threads"]
    second: AbstractContextManager[None] = nullcontext()
    if threads > 1 and not (run.has("codec") and run.has("ears")):
        arguments = (recipe, run.out, run.minutes, run.begun, run.earlier)
        second = beside(_second_track, arguments, threads // 2, run.progress)
    with second:
        torch.set_num_threads(threads - threads // 2)
        records.update(_eyes_and_mind(run, lab))
    torch.set_num_threads(threads)
    codec, ears, spelling = _voice_box_and_ears(run, lab)
    records.update(codec=codec, ears=ears)
    responder = OmniResponder(model, lab.tokenizer)
    before = run.once("before_audio", lambda: {"written": exam.write(responder, ["vqa"])})["written"]
    with _ranks(run) as ranks:
        records.update(_three_stages(run, lab, spelling, ranks))
        sat = _sit(run, lab, exam, ranks)
    if ranks.world > 1:
        sat.answers.written = json.loads((run.out / WRITTEN).read_text(encoding="utf-8"))
        (run.out / WRITTEN).unlink()
    return records, before, sat


@contextmanager
def _ranks(run: Run) -> Iterator[Ranks]:
    """The processes that train stages 1 to 3 together: two, or one where there is one core or nothing to train."""
    threads = run.plan["threads"]
    if threads == 1 or run.has("speak"):
        yield Ranks()
        return
    meeting = run.out.resolve() / ".meeting"
    meeting.unlink(missing_ok=True)
    arguments = (run.recipe, run.out, run.minutes, meeting)
    with beside(_second_rank, arguments, threads // 2, run.progress):
        torch.set_num_threads(threads - threads // 2)
        ranks = Ranks.join(0, 2, meeting)
        yield ranks
        ranks.leave()
    torch.set_num_threads(threads)


def _second_rank(progress: Progress, recipe: Recipe, out: Path, minutes: float, meeting: Path) -> None:
    """The second process of stages 1 to 3: same model, rows of its own, nothing to show or to keep."""
    run = Run(recipe, out, minutes, Progress(io.StringIO()), time.perf_counter())
    run.plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    lab = _prepare(run)
    _eyes_and_mind(run, lab)
    _, _, spelling = _voice_box_and_ears(run, lab)
    ranks = Ranks.join(1, 2, meeting)
    _three_stages(run, lab, spelling, ranks)
    write_json(out / WRITTEN, Exam(lab, 1).write(OmniResponder(lab.model, lab.tokenizer)))
    ranks.leave()


def _three_stages(run: Run, lab: Lab, spelling: CharacterCTC, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Audio alignment, audio instruction tuning, speech output (Nexus, section 3.3)."""
    model, records = lab.model, {}
    align, sft, speak = (_shared(run.recipe.stage(name), ranks) for name in ("align", "sft", "speak"))
    losses, readers = stages.align_losses(lab, align, spelling)
    records["align"] = run.train(model, align, losses, readers, ranks)
    records["sft"] = run.train(model, sft, stages.sft_losses(lab, sft), ranks=ranks)
    if run.has("speak"):  # then its weights are only loaded
        records["speak"] = run.train(model, speak, _never, ranks=ranks)
        return records
    with run.clocked("prepare"), run.progress.stage("prepare", unit="lines") as watch:
        lines = stages.prepare_lines(lab, speak, run.plan["bf16"], ranks, watch.advance)
    speak = _in_the_time_left(run, speak)
    records["speak"] = run.train(model, speak, stages.speak_losses(lab, speak, lines), ranks=ranks)
    return records


def _in_the_time_left(run: Run, config: StageConfig) -> StageConfig:
    """The last stage, shortened (at most to half) when those before it took longer than planned: a machine that was
    slower than it had been while a stage measured its speed must not make the whole run longer than was said."""
    left = 60 * run.minutes - run.elapsed - EXAM_SECONDS
    seconds = left * run.recipe.minutes / run.minutes
    return config.model_copy(update={"seconds": min(config.seconds, max(config.seconds / 2, seconds))})


def _shared(config: StageConfig, ranks: Ranks) -> StageConfig:
    """A stage with this rank's part of the rows."""
    return config.model_copy(update={"mixture": {task: ranks.share(rows) for task, rows in config.mixture.items()}})


def _never(step: int) -> dict[str, Tensor]:
    raise AssertionError(f"a finished stage was asked for step {step}")


def _eyes_and_mind(run: Run, lab: Lab) -> dict[str, dict[str, Any]]:
    """Track one of stage 0: vision tower, then the backbone on text and pictures."""
    sight, backbone = run.recipe.stage("sight"), run.recipe.stage("backbone")
    torch.manual_seed(lab.seed("sight"))
    losses, cells = stages.sight_losses(lab, sight)
    first = run.train(lab.model, sight, losses, cells)
    return {"sight": first, "backbone": run.train(lab.model, backbone, stages.backbone_losses(lab, backbone))}


def _voice_box_and_ears(run: Run, lab: Lab) -> tuple[dict[str, Any], dict[str, Any], CharacterCTC]:
    """Track two of stage 0: codec, then the audio encoder; and the spelling head, which helps again in stage 1."""
    config, codec = run.recipe.stage("codec"), lab.model.codec
    assert isinstance(codec, RVQCodec)
    if not run.has("codec"):
        with run.progress.stage("quantiser", unit="fits"):
            waves = lab.waves["spoken"]
            sounds = [torch.from_numpy(waves[i].samples) for i in waves.places[:QUANTISER_SOUNDS]]
            codec.fit_quantizer(sounds, lab.seed("quantiser"))
    first = run.train(lab.model, config, stages.codec_losses(lab, config))
    ears = run.recipe.stage("ears")
    torch.manual_seed(lab.seed("ears head"))
    losses, heads = stages.ears_losses(lab, ears)
    return first, run.train(lab.model, ears, losses, heads), heads.spelling


def _second_track(progress: Progress, recipe: Recipe, out: Path, minutes: float, begun: float, earlier: float) -> None:
    """Track two in a process of its own; the folder is held by the first. Both read one clock."""
    run = Run(recipe, out, minutes, progress, begun, earlier=earlier)
    run.plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    _voice_box_and_ears(run, _prepare(run))


def _sit(run: Run, lab: Lab, exam: Exam, ranks: Ranks) -> Sat:
    """Every answer of the trained model. Of two processes the second one writes while this one speaks."""
    torch.set_num_threads(run.plan["threads"] - run.plan["threads"] // 2)  # as many as where a second process writes
    responder = OmniResponder(lab.model, lab.tokenizer)
    with run.clocked("evaluation"), run.progress.stage("evaluation", 3, "parts") as watch:
        recited, answered = exam.talk(responder)
        watch.advance()
        sounds = (exam.sounds(recited), exam.sounds(answered))
        tts, s2s, *beside = exam.transcribe(*sounds, exam.codec_round_trip(), exam.originals(), exam.right_answers())
        watch.advance()
        written = exam.write(responder) if ranks.world == 1 else {}
        watch.advance()
    return Sat(Answers(written, [reply.text for reply in answered], tts, s2s), recited, answered, *beside)


def _examine(
    run: Run, lab: Lab, exam: Exam, untrained: Answers, before: dict[str, list[str]], sat: Sat
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report's scores, and the answers behind them."""
    trained = sat.answers
    with run.clocked("evaluation"), run.progress.stage("first sound", 1, "parts") as watch:
        asked = range(min(FIRST_SOUNDS, len(lab.plan.test_questions)))
        responder = OmniResponder(lab.model, lab.tokenizer)
        wait = first_sound_seconds(responder, [lab.waves["test_questions"][i] for i in asked])
        watch.advance()
    report: dict[str, Any] = {
        "schema": 1,
        "recipe": run.recipe.name,
        **exam.written_scores(trained, untrained, before),
        "codec": exam.codec(sat.coded, sat.original),
        "tts": exam.synthesis(trained, untrained, sat.original, sat.recited),
        "s2s": exam.spoken_answers(trained, untrained, sat.best),
        "first_sound": wait,
        "model": {"parameters": count(dict(lab.model.named_parameters()))},
    }
    return report, {"trained": trained, "recited": sat.recited, "answered": sat.answered}


def _leave(
    run: Run, lab: Lab, exam: Exam, records: dict[str, dict[str, Any]], report: dict[str, Any], replies: dict[str, Any]
) -> None:
    """report.json, report.html, run.json and the model folder."""
    machine = {"platform": platform.platform(), "processor": _processor(), "python": platform.python_version()}
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    save_model(
        run.out / "model", lab.model, {"recipe": run.recipe.model_dump(mode="json"), "demo": run.plan["identity"]}
    )
    lab.tokenizer.save(run.out / "model" / "tokenizer.json")
    (run.out / "model" / "README.md").write_text(model_card(run.recipe, report), encoding="utf-8")
    stage_records = {name: {k: v for k, v in record.items() if k != "curve"} for name, record in records.items()}
    corpus = counts(run.out / "cache")
    details = {"plan": run.plan, "corpus": corpus, "stages": stage_records, "machine": machine, "versions": versions}
    write_json(
        run.out / "run.json", {"schema": 1, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **details}
    )
    write_demo_report(run.out / "report.html", exam, report, records, replies, corpus)
    write_json(run.out / "report.json", report)


def _processor() -> str:
    """The processor's name where the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"
