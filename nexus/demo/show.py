"""What the demo leaves for people: the report page, the model card, a few lines on the terminal."""

from pathlib import Path
from typing import Any

from nexus.demo.evaluate import Answers, Exam
from nexus.eval.plots import Curves
from nexus.eval.report import Cell, Report, Table, write_report
from nexus.recipe import Recipe
from nexus.respond import Reply
from nexus.types import Audio, Image

SHOWN = 8  # examples per exhibit
BESIDE = ("text_ceiling", "accuracy_before_audio", "wer_original", "accuracy_original")
STANDINS = ("codec", "sight", "backbone", "ears")
STAGES = {"align": "1 audio alignment", "sft": "2 audio instruction tuning", "speak": "3 speech output"}


def write_demo_report(
    path: Path, exam: Exam, report: dict[str, Any], records: dict[str, dict[str, Any]], replies: dict[str, Any]
) -> None:
    """report.html: scores beside their baselines, learning curves, pictures, questions and spoken answers."""
    sections = (
        ("Scores", (_scores(report), _families(report))),
        ("Spoken answers", (_spoken_answers(exam, replies["trained"], replies["answered"]),)),
        ("Pictures", (_pictures(exam, replies["trained"]),)),
        ("Reading aloud", (_read_aloud(exam, replies["trained"], replies["recited"]),)),
        ("Hearing", (_transcripts(exam, replies["trained"]),)),
        ("Learning", (*_curves(records), _stages(records, report))),
    )
    parameters = f"{report['model']['parameters'] / 1e6:.1f} million"
    facts = (
        ("recipe", report["recipe"]),
        ("parameters", parameters),
        ("time", f"{report['seconds']['total'] / 60:.1f} minutes"),
        ("memory", f"{report['memory']['peak_gib']:.1f} GiB ({report['memory']['measure']})"),
        ("first sound", f"{report['first_sound']['seconds'] or float('nan'):.3f} s after the question"),
    )
    lead = (
        f"A model of {parameters} parameters, made from nothing on this machine: its sentences, voices and pictures, "
        "its codec, its eyes and ears, and the three Nexus stages. Everything below was measured on sentences, voices "
        "and pictures held out from training."
    )
    write_report(path, Report("Nexus demo", lead, facts, sections))


def _scores(report: dict[str, Any]) -> Table:
    """One row per score: what was reached, its interval, and what it is worth beside the baselines."""
    rows: list[tuple[Cell, ...]] = []
    named = (
        ("recognition, word error rate", "asr", "wer", "other_audio"),
        ("spoken questions, whole answer right", "sqa", "accuracy", "other_audio"),
        ("pictures, whole answer right", "vqa", "accuracy_after", "other_picture"),
        ("codec round trip, word error rate *", "codec", "wer", "other_audio"),
        ("reading aloud, word error rate *", "tts", "wer", "other_audio"),
        ("spoken answers, heard right *", "s2s", "answer_accuracy", "other_audio"),
    )
    for title, task, key, other in named:
        score = report[task]
        interval = f"{score['ci95'][0]:.3f} to {score['ci95'][1]:.3f}"
        beside = next((score[key] for key in BESIDE if key in score), None)
        rows.append(
            (title, score[key], interval, score["n"], score["baseline"], score[other], score.get("untrained"), beside)
        )
    note = (
        "Baseline: the most frequent answer, whatever is asked (for speech: silence). Other input: the same answers "
        "judged as if they belonged to another item's sound, or given with another item's picture. Beside: for spoken "
        "questions the same questions typed; for pictures before the audio stages; for speech the synthesiser's own "
        "sound, for recognition nothing. "
        "* heard by PocketSphinx, which had no part in training."
    )
    columns = ("score", "reached", "95 % interval", "n", "baseline", "other input", "untrained", "beside")
    return Table("Held-out scores", note, columns, tuple(rows), bars=("reached",))


def _families(report: dict[str, Any]) -> Table:
    rows = tuple(
        (title, family, score["accuracy"], score["n"])
        for title, task in (("spoken questions", "sqa"), ("pictures", "vqa"), ("spoken answers", "s2s"))
        for family, score in report[task]["families"].items()
    )
    return Table(
        "By kind of question", "Whole answers, letter by letter.", ("task", "kind", "right", "n"), rows, bars=("right",)
    )


def _spoken_answers(exam: Exam, trained: Answers, replies: list[Reply]) -> Table:
    chosen = range(0, len(exam.spoken_items), max(1, len(exam.spoken_items) // SHOWN))
    sounds = exam.sounds(replies)
    questions, best = exam.lab.waves["test_questions"], exam.right_answers()
    rows = []
    for i in list(chosen)[:SHOWN]:
        item, own, heard = exam.spoken_items[i], replies[i].text, trained.heard_s2s[i]
        asked = (questions[i], item.question)
        answered = (_audible(sounds[i]), own, heard)
        rows.append((*asked, *answered, best[i], item.answer, heard == item.answer))
    columns = (
        *("question", "its words", "the model's answer", "its own words", "what the recogniser heard"),
        *("right answer by the voice it learned from", "right answer", "right"),
    )
    return Table("A spoken question, a spoken answer", "Held-out questions by held-out voices.", columns, tuple(rows))


def _pictures(exam: Exam, trained: Answers) -> Table:
    rows = []
    for i in range(min(SHOWN + 4, len(exam.pictures))):
        item = exam.picture_items[i]
        rows.append(
            (
                Image(pixels=exam.pictures[i]),
                item.question,
                trained.seen[i],
                item.answer,
                trained.seen[i] == item.answer,
            )
        )
    columns = ("picture", "question", "the model's answer", "right answer", "right")
    return Table("Questions about pictures", "Held-out pictures.", columns, tuple(rows))


def _read_aloud(exam: Exam, trained: Answers, replies: list[Reply]) -> Table:
    sounds, originals = exam.sounds(replies), exam.originals()
    rows = []
    for i in range(min(SHOWN, len(sounds))):
        rows.append(
            (
                exam.recited[i],
                _audible(sounds[i]),
                trained.heard_tts[i],
                originals[i],
                trained.heard_tts[i] == exam.recited[i],
            )
        )
    columns = ("words", "the model's voice", "heard", "the voice it learned from", "right")
    return Table("Sentences read aloud", "Held-out sentences.", columns, tuple(rows))


def _transcripts(exam: Exam, trained: Answers) -> Table:
    sounds = exam.lab.waves["test_heard"]
    rows = [
        (sounds[i], trained.asr[i], exam.dictated[i], trained.asr[i] == exam.dictated[i])
        for i in range(min(SHOWN, len(exam.dictated)))
    ]
    return Table(
        "Transcripts",
        "Held-out sentences by held-out voices.",
        ("sound", "the model wrote", "was said", "right"),
        tuple(rows),
    )


def _curves(records: dict[str, dict[str, Any]]) -> tuple[Curves, Curves]:
    def series(names: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
        return {
            name: [(row["seconds"], row["loss"]) for row in records[name]["curve"]] for name in names if name in records
        }

    note = "Stage 0 trains small stand-ins for published checkpoints. It is not Nexus training."
    return (
        Curves("Stage 0: loss over seconds", note, "seconds", series(STANDINS)),
        Curves("Stages 1 to 3: loss over seconds", "The three Nexus stages.", "seconds", series(tuple(STAGES))),
    )


def _stages(records: dict[str, dict[str, Any]], report: dict[str, Any]) -> Table:
    rows = tuple(
        (
            STAGES.get(name, f"0 stand-in: {name}"),
            record["steps"],
            report["seconds"][name],
            record["parameters"],
            " ".join(record["trainable"]),
            record["head_parameters"],
        )
        for name, record in records.items()
    )
    columns = ("stage", "steps", "seconds", "trained parameters", "which", "parameters of auxiliary heads")
    note = (
        "Auxiliary heads live in the stage and are absent from the saved model. What a stage does not name stays as it "
        "was, bit for bit."
    )
    return Table("Stages", note, columns, rows)


def _audible(sound: Audio) -> Audio | None:
    return sound if sound.samples is not None and len(sound.samples) else None


def model_card(recipe: Recipe, report: dict[str, Any]) -> str:
    """README.md of the model folder: what it is, how it was made, what it scored, what it cannot do."""
    scores = "\n".join(
        f"| {name} | {report[task][key]:.3f} | {report[task]['n']} | {report[task]['baseline']:.3f} |"
        for name, task, key in (
            ("asr.wer", "asr", "wer"),
            ("sqa.accuracy", "sqa", "accuracy"),
            ("vqa.accuracy_after", "vqa", "accuracy_after"),
            ("tts.wer", "tts", "wer"),
            ("s2s.answer_accuracy", "s2s", "answer_accuracy"),
        )
    )
    return f"""---
license: apache-2.0
language: en
pipeline_tag: any-to-any
library_name: nexus-omni
---
# {recipe.name}

{recipe.description}

Made by `nexus demo` from synthetic data alone: sentences of a micro-world spoken by espeak-ng, drawn pictures of
coloured shapes. Use it with `nexus chat FOLDER` or `nexus.load(FOLDER)`.

| score on held-out items | reached | n | baseline |
|---|---|---|---|
{scores}

Limits: it knows the 235 words of its micro-world, in lower case and without punctuation, and nothing else. Natural
voices, other words and other pictures are outside what it has learned; expect failure there.
"""


def summary(report: dict[str, Any], out: Path) -> str:
    """The terminal's last words."""
    vqa, tts, s2s = report["vqa"], report["tts"], report["s2s"]
    lines = (
        f"recognition        word error rate {report['asr']['wer']:.3f}",
        f"spoken questions   {report['sqa']['accuracy']:.3f} right (typed: {report['sqa']['text_ceiling']:.3f})",
        f"pictures           {vqa['accuracy_after']:.3f} right (before audio: {vqa['accuracy_before_audio']:.3f})",
        f"reading aloud      word error rate {tts['wer']:.3f} (original sound: {tts['wer_original']:.3f})",
        f"spoken answers     {s2s['answer_accuracy']:.3f} heard right",
        f"first sound        {report['first_sound']['seconds'] or float('nan'):.3f} s after a spoken question",
        f"time and memory    {report['seconds']['total']:.0f} s, {report['memory']['peak_gib']:.1f} GiB",
        f"report             {out / 'report.html'}",
        f'talk to it         nexus chat {out / "model"} --text "what is three plus five" --speak answer.wav',
    )
    return "\n".join(lines)
