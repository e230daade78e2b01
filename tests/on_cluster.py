"""As a script: a run on the Ray cluster at an address, by another process than the one that started it."""

import sys
from pathlib import Path

from factory_steps import Speak, run, texts
from test_synth_pipeline import sentences

from nexus.synth.produce import Workers

if __name__ == "__main__":
    folder, address = sys.argv[1:]
    run(texts(*sentences(20)), Path(folder) / "out", Speak(), workers=Workers("ray", 2, address))
