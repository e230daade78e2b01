"""docs/own-encoder.md does what it says: its code is installed, trained and loaded; what it refuses is refused."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny import NARROW, tiny_model, tiny_tokenizer

from nexus.errors import BadConfig, NexusError
from nexus.model.folder import load_model, save_model
from nexus.organs import OutsideEncoder
from nexus.recipe import Recipe
from nexus.respond import load

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own-encoder.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The one code block of that language on the page."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return found


HEARING = yaml.safe_load(block("yaml"))["hearing"]


def install(folder: Path) -> None:
    """The package of the page."""
    (folder / "my_ears").mkdir()
    (folder / "my_ears" / "__init__.py").touch()
    (folder / "my_ears" / "encoder.py").write_text(block("python"), encoding="utf-8")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's package where Python finds it, and taken away again."""
    folder = tmp_path_factory.mktemp("site")
    install(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "my_ears"]:
        del sys.modules[name]


def test_the_example_is_short_and_is_a_whole_package() -> None:
    assert len(block("python").splitlines()) <= 60
    assert 'packages = ["my_ears"]' in block("toml")


TRAIN = """
import json, sys
import torch
from pathlib import Path
from tiny import tiny_sound, tiny_tokenizer
from nexus.data.chat import render, task_turns
from nexus.data.collate import collate
from nexus.model.folder import save_model
from nexus.model.omni import OmniModel
from nexus.recipe import Recipe
from nexus.respond import load
from nexus.train.stage import freeze
from nexus.types import Text, Turn

recipe, folder = Recipe.load(sys.argv[1]), Path(sys.argv[2])
torch.manual_seed(0)
model, tokenizer = OmniModel(recipe.model), tiny_tokenizer()
rows = [render(task_turns("asr", sound=tiny_sound(s), text="two red"), tokenizer, recipe.model) for s in (0.9, 1.7)]
trained = freeze(model, recipe.stage("align").trainable)
optimizer = torch.optim.AdamW(trained.values())
loss = model.train()(collate(rows, tokenizer.pad, recipe.model))["text"]
loss.backward()
optimizer.step()
save_model(folder, model.eval(), {})
tokenizer.save(folder / "tokenizer.json")
ask = [[Turn("user", (tiny_sound(4.3),))]]
sound = collate(rows, tokenizer.pad, recipe.model).sound
loaded = load(folder)
with torch.no_grad():
    one, two = model.hearing(sound), loaded.model.hearing(sound)
print(json.dumps({
    "loss": float(loss.detach()),
    "class": type(loaded.model.hearing.encoder).__module__,
    "trained": sorted(n for n, p in trained.items() if p.grad is not None and bool(p.grad.any())),
    "encoder": sorted(n for n, _ in model.named_parameters() if n.startswith("hearing.")),
    "tokens": [span.length for row in rows for span in row.spans],
    "same": torch.equal(one.embeds, two.embeds),
    "answer": loaded.answer_many(ask, max_tokens=3)[0].text,
}))
"""


def run(arguments: list[str], *path: Path) -> subprocess.CompletedProcess[str]:
    """A fresh Python that finds packages in `path`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=100)


def test_the_example_trains_and_loads_in_a_fresh_process_and_is_missed_where_it_is_not_installed(
    tmp_path: Path,
) -> None:
    install(tmp_path)
    narrow = [line for line in NARROW if not line.startswith("model.hearing")]
    tree = Recipe.load("nexus-tiny", narrow).model_dump(mode="json")
    tree["model"]["hearing"] = HEARING
    recipe, folder = tmp_path / "mine.yaml", tmp_path / "model"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    done = run(["-c", TRAIN, str(recipe), str(folder)], ROOT, ROOT / "tests", tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["loss"] > 0 and told["same"] and told["class"] == "my_ears.encoder"
    assert told["trained"] == told["encoder"]
    assert told["tokens"] == [6, 12]  # 90 and 170 mel frames; 30 and 57 states; five states a token
    assert "encoder.py" not in {file.name for file in folder.rglob("*")}

    away = run(["-m", "nexus", "show", str(folder)], ROOT)
    assert away.returncode == 2 and away.stdout == ""
    (line,) = away.stderr.splitlines()
    assert "'my_ears.encoder' cannot be imported" in line
    assert "install the package that holds RecurrentEncoder" in line


def config(**changes: Any) -> OutsideEncoder:
    return OutsideEncoder.model_validate({**HEARING["encoder"], "width": 16, **changes})


@given(st.integers(1, 400), st.integers(1, 7))
def test_the_example_counts_its_own_states(package: Path, mel_frames: int, stack: int) -> None:
    settings = config(settings={"stack": stack, "layers": 1})
    made = settings.resolve()(80, 16, **settings.settings)
    states = made(torch.zeros(2, 80, mel_frames), torch.tensor([mel_frames, 1]))
    assert states.shape == (2, settings.frames_for(mel_frames), 16)


@given(st.integers(1, 60), st.integers(0, 60))
def test_what_stands_behind_a_window_does_not_reach_its_states(package: Path, valid: int, more: int) -> None:
    settings = config()
    torch.manual_seed(1)
    # In float64: sums over windows of other lengths are taken in another order, which in float32 shows above 1e-6.
    made = settings.resolve()(80, 16, **settings.settings).double().eval()
    mel, states = torch.randn(1, 80, valid, dtype=torch.float64), settings.frames_for(valid)
    filled = torch.nn.functional.pad(mel, (0, more))
    alone, beside = made(mel, torch.tensor([valid])), made(filled, torch.tensor([valid]))
    torch.testing.assert_close(alone[:, :states], beside[:, :states], atol=1e-6, rtol=0)


REFUSED = {
    "a missing class": ({"type": "my_ears.encoder:Other"}, "is no torch.nn.Module class"),
    "a module inside it": ({"type": "my_ears.encoder:nn"}, "is no torch.nn.Module class"),
    "a missing package": ({"type": "my_eyes.encoder:RecurrentEncoder"}, "'my_eyes.encoder' cannot be imported"),
    "no frames_for": ({"type": "torch.nn:Linear"}, r"has no frames_for\(\)"),
    "foreign settings": ({"settings": {"stak": 3}}, "frames_for fails with settings {'stak': 3}"),
    "half a state": ({"settings": {"stack": 0.75}}, "must give a positive int"),
    "no class at all": ({"type": "my_ears.encoder"}, "encoder.type"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_page_says_is_refused_is_refused(package: Path, changes: dict[str, Any], message: str) -> None:
    encoder = {**HEARING["encoder"], **changes}
    override = f"model.hearing.encoder={json.dumps(encoder)}"
    with pytest.raises(BadConfig, match=message) as caught:
        Recipe.load("nexus-tiny", [*NARROW, override])
    assert "\n" not in str(caught.value)


def hostile(folder: Path, name: str) -> Path:
    """A whole and valid model folder whose config names `name` as its encoder."""
    model = tiny_model()
    save_model(folder, model, {})
    tiny_tokenizer().save(folder / "tokenizer.json")
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tree["model"]["hearing"]["encoder"] = {"type": name, "width": 32, "settings": {"args": ["touch", "called"]}}
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["subprocess:Popen", "os:system", "builtins:exec", "not_installed.module:Encoder"])
def test_a_folder_that_names_something_else_to_call_is_refused_and_nothing_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = hostile(tmp_path / "model", name)
    called: list[Any] = []
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda *given, **named: called.append(given))
    monkeypatch.setattr(os, "system", lambda *given: called.append(given))
    monkeypatch.chdir(tmp_path)
    for open_ in (load, load_model):
        with pytest.raises(NexusError) as caught:
            open_(folder)
        message = str(caught.value)
        assert "\n" not in message and str(folder) in message and name.split(":")[0] in message
    assert called == [] and not (tmp_path / "called").exists()


def test_code_inside_a_model_folder_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = hostile(tmp_path / "model", "inside:Encoder")
    (folder / "inside.py").write_text("open('imported', 'w').close()\n", encoding="utf-8")
    with pytest.raises(NexusError, match="'inside' cannot be imported"):
        load(folder)
    assert "inside" not in sys.modules and not Path("imported").exists()
