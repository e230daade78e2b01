"""That the race of training loops runs and says what it found. How fast anything is stands in no test."""

import json

import pytest

from nexus.bench import training


@pytest.mark.slow
def test_every_case_has_both_sides_all_repeats_and_the_grids_they_were_chosen_from() -> None:
    pytest.importorskip("accelerate", reason="the peer, transformers' Trainer, needs accelerate")
    said: list[str] = []
    result = training.bench(training.TINY, said.append)
    json.dumps(result)
    names = [case["case"] for case in result["cases"]]
    assert names == [
        *(f"stage {stage}, seconds per row" for stage in ("align", "sft", "speak")),
        *(f"stage {stage}, loader alone against its steps" for stage in ("align", "sft", "speak")),
        "stage align, two ranks against one",
    ]
    assert result["passed"]  # every bar is 0
    for case in result["cases"]:
        assert len(case["ours"]["seconds"]) == len(case["peer"]["seconds"]) > 0 and case["ratio"] > 0
        assert any(case["case"] in line for line in said)
    for case in result["cases"][:3]:
        fastest = min(case["peer"]["grid"], key=lambda tried: tried["seconds"])
        assert len(case["peer"]["grid"]) == 2 and case["peer"]["settings"] == {"batch": fastest["batch"]}
