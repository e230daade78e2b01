"""What the demo leaves for people: the report page, the model card, a few lines on the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nexus.demo.evaluate import Answers, Exam
from nexus.eval.plots import Curves
from nexus.eval.report import Cell, Report, Table, write_report
from nexus.recipe import Recipe
from nexus.respond import Reply
from nexus.types import Audio, Image, Part, Text, Video

SHOWN = 8  # examples per exhibit
BESIDE = (
    *("text_ceiling", "accuracy_before_audio", "wer_original", "accuracy_original", "pitch_energy_baseline", "exact"),
)
FAMILIES = {
    "spoken questions": "sqa",
    "pictures": "vqa",
    "spoken questions about pictures": "avqa",
    "films": "video",
    "conversations": "multiturn",
    "emotions": "ser",
    "spoken answers": "s2s",
}
SCORES = (  # title, task, key, and what follows the names of its interval and baselines
    ("recognition, word error rate", "asr", "wer"),
    ("spoken questions, whole answer right", "sqa", "accuracy"),
    ("pictures, whole answer right", "vqa", "accuracy_after"),
    ("spoken questions about pictures", "avqa", "accuracy"),
    ("films, whole answer right", "video", "accuracy"),
    ("conversations, last question spoken", "multiturn", "accuracy"),
    ("spoken Mandarin into English, BLEU", "s2tt", "bleu_zh_en", "_zh_en"),
    ("spoken English into Mandarin, BLEU", "s2tt", "bleu_en_zh", "_en_zh"),
    ("emotion of the speaker", "ser", "accuracy"),
    ("who speaks how, attributes right", "caption", "accuracy"),
    ("codec round trip, word error rate *", "codec", "wer"),
    ("reading aloud, word error rate *", "tts", "wer"),
    ("spoken answers, heard right *", "s2s", "answer_accuracy"),
)
STANDINS = ("codec", "sight", "backbone", "ears")
STAGES = {"align": "1 audio alignment", "sft": "2 audio instruction tuning", "speak": "3 speech output"}


def write_demo_report(
    path: Path,
    exam: Exam,
    report: dict[str, Any],
    records: dict[str, dict[str, Any]],
    replies: dict[str, Any],
    corpus: dict[str, dict[str, Any]],
) -> None:
    """report.html: scores beside their baselines, learning curves, pictures, questions and spoken answers."""
    sections = [
        ("Scores", (_scores(report), _families(report))),
        ("Spoken answers", (_spoken_answers(exam, replies["trained"], replies["answered"]),)),
        ("Pictures", _exhibits(exam, replies["trained"], ("vqa", "avqa"))),
        ("Films", _exhibits(exam, replies["trained"], ("video",))),
        ("Conversations", (_conversations(exam, replies["trained"]),) if "multiturn" in exam.papers else ()),
        ("Reading aloud", (_read_aloud(exam, replies["trained"], replies["recited"]),)),
        ("Hearing", (_transcripts(exam, replies["trained"]),)),
        ("Learning", (*_curves(records), _stages(records, report))),
        ("Corpus", (_corpus(corpus),)),
    ]
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
    write_report(path, Report("Nexus demo", lead, facts, tuple(section for section in sections if section[1])))


def _scores(report: dict[str, Any]) -> Table:
    """One row per score: what was reached, its interval, and what it is worth beside the baselines."""
    rows: list[tuple[Cell, ...]] = []
    for title, task, key, *rest in SCORES:
        score, suffix = report[task], rest[0] if rest else ""
        if score[key] is None:
            continue
        low, high = score[f"ci95{suffix}"]
        beside = next((score[name] for name in BESIDE if name in score), None)
        sides = (score[f"{name}{suffix}"] for name in ("baseline", "other"))
        untrained = score.get(f"untrained{suffix}")
        rows.append((title, score[key], f"{low:.3f} to {high:.3f}", score[f"n{suffix}"], *sides, untrained, beside))
    note = (
        "Baseline: the most frequent answer, whatever is asked (for speech: silence). Other input: the same answers "
        "judged as if they belonged to another item; for pictures and films, answers given with another picture or "
        "with the moments in another order; for conversations, with the last question alone. Beside: for spoken "
        "questions the same typed; for pictures before the audio stages; for emotions a regression on mean pitch "
        "and energy; for captions the share of wholly right ones; for speech the synthesiser's own sound. "
        "* heard by PocketSphinx, which had no part in training."
    )
    columns = ("score", "reached", "95 % interval", "n", "baseline", "other input", "untrained", "beside")
    bars = () if report["s2tt"]["bleu_zh_en"] else ("reached",)  # beside BLEU, 0 .. 100, no other bar would show
    return Table("Held-out scores", note, columns, tuple(rows), bars=bars)


def _families(report: dict[str, Any]) -> Table:
    rows = tuple(
        (title, family, score["accuracy"], score["n"])
        for title, task in FAMILIES.items()
        for family, score in report[task].get("families", {}).items()
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


TITLES = {
    "vqa": ("Questions about pictures", "Held-out pictures."),
    "avqa": ("Spoken questions about pictures", "Two pictures, two questions, four answers."),
    "video": ("Questions about films", "Three moments of each, from left to right."),
}


def _exhibits(exam: Exam, trained: Answers, names: Sequence[str]) -> tuple[Table, ...]:
    return tuple(_shown(exam, trained, name) for name in names if name in exam.papers)


def _shown(exam: Exam, trained: Answers, name: str) -> Table:
    """What is seen, what is asked, what is answered."""
    paper, rows = exam.papers[name], []
    for i in range(min(SHOWN + 4, len(paper.asks))):
        seen, asked = paper.asks[i][0].parts
        question: Cell = asked.text if isinstance(asked, Text) else asked if isinstance(asked, Audio) else None
        given, wanted = trained.written[name][i], paper.wanted[i]
        rows.append((_still(seen), question, given, wanted, given == wanted))
    columns = ("what is seen", "question", "the model's answer", "right answer", "right")
    return Table(*TITLES[name], columns, tuple(rows))


def _still(seen: Part) -> Image:
    """A picture; of a film its moments side by side."""
    if isinstance(seen, Video):
        assert seen.frames is not None
        return Image(pixels=np.concatenate(list(seen.frames[::2]), axis=1))
    assert isinstance(seen, Image)
    return seen


def _conversations(exam: Exam, trained: Answers) -> Table:
    paper, rows = exam.papers["multiturn"], []
    for i in range(min(SHOWN + 4, len(paper.asks))):
        *before, last = paper.asks[i]
        said = " / ".join(part.text for turn in before for part in turn.parts if isinstance(part, Text))
        (question,) = last.parts
        given, wanted = trained.written["multiturn"][i], paper.wanted[i]
        rows.append((said, question if isinstance(question, Audio) else None, given, wanted, given == wanted))
    columns = ("what was typed before", "spoken question", "the model's answer", "right answer", "right")
    return Table("Conversations", "Without what was said before, nobody could answer.", columns, tuple(rows))


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
    sounds, paper = exam.lab.waves["test_heard"], exam.papers["asr"]
    rows = [
        (sounds[i], trained.written["asr"][i], paper.wanted[i], trained.written["asr"][i] == paper.wanted[i])
        for i in range(min(SHOWN, len(paper.wanted)))
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


def _corpus(sets: dict[str, dict[str, Any]]) -> Table:
    states = ("spoken", "verified", "failed", "unverified", "unchecked")
    rows = tuple(
        (name, told["language"], *(told[state] for state in states), sum(told["rejected"].values()))
        for name, told in sets.items()
    )
    note = (
        "A share of the utterances is heard by PocketSphinx before noise is added. Unverified: it follows no Mandarin, "
        "and not every voice. Unchecked: not drawn. What failed is not learned from; what is examined stays, whatever "
        "was heard."
    )
    return Table("What was spoken", note, ("set", "language", *states, "rejected"), rows)


def _audible(sound: Audio) -> Audio | None:
    return sound if sound.samples is not None and len(sound.samples) else None


def model_card(recipe: Recipe, report: dict[str, Any]) -> str:
    """README.md of the model folder: what it is, how it was made, what it scored, what it cannot do."""
    scores = "\n".join(
        f"| {task}.{key} | {report[task][key]:.3f} | {report[task][f'n{suffix}']} "
        f"| {report[task][f'baseline{suffix}']:.3f} |"
        for _, task, key, suffix in ((*row, "")[:4] for row in SCORES)
        if report[task][key] is not None
    )
    return f"""---
license: apache-2.0
language: [en, zh]
pipeline_tag: any-to-any
library_name: nexus-omni
---
# {recipe.name}

{recipe.description}

Made by `nexus demo` from synthetic data alone: sentences of a micro-world spoken by espeak-ng, drawn pictures of
coloured shapes, moving and at rest. Use it with `nexus chat FOLDER` or `nexus.load(FOLDER)`.

| score on held-out items | reached | n | baseline |
|---|---|---|---|
{scores}

Limits: it knows the few hundred words of its micro-world, in lower case and without punctuation, and nothing else.
Where it names an emotion, that is a setting of the synthesiser. Natural voices, other words and other pictures are
outside what it has learned; expect failure there.
"""


def summary(report: dict[str, Any], out: Path) -> str:
    """The terminal's last words."""

    def shown(title: str, said: str) -> str:
        return f"{title:<20} {said}"

    vqa, tts, s2s = report["vqa"], report["tts"], report["s2s"]
    first = report["first_sound"]["seconds"] or float("nan")
    lines = [
        shown("recognition", f"word error rate {report['asr']['wer']:.3f}"),
        shown(
            "spoken questions", f"{report['sqa']['accuracy']:.3f} right (typed: {report['sqa']['text_ceiling']:.3f})"
        ),
        shown("pictures", f"{vqa['accuracy_after']:.3f} right (before audio: {vqa['accuracy_before_audio']:.3f})"),
        *(
            shown(title, f"{report[task][key]:.3f}")
            for title, task, key in (
                ("picture and sound", "avqa", "accuracy"),
                ("films", "video", "accuracy"),
                ("conversations", "multiturn", "accuracy"),
                ("from Mandarin, BLEU", "s2tt", "bleu_zh_en"),
                ("into Mandarin, BLEU", "s2tt", "bleu_en_zh"),
                ("emotions", "ser", "accuracy"),
                ("captions", "caption", "accuracy"),
            )
            if report[task][key] is not None
        ),
        shown("reading aloud", f"word error rate {tts['wer']:.3f} (original sound: {tts['wer_original']:.3f})"),
        shown("spoken answers", f"{s2s['answer_accuracy']:.3f} heard right"),
        shown("first sound", f"{first:.3f} s after a spoken question"),
        f"time and memory      {report['seconds']['total']:.0f} s, {report['memory']['peak_gib']:.1f} GiB",
        f"report               {out / 'report.html'}",
        f'talk to it           nexus chat {out / "model"} --text "what is three plus five" --speak answer.wav',
    ]
    return "\n".join(lines)
