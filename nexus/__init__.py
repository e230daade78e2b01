"""Nexus: a modular framework for omni-modal language models that hear, see and speak.

The public surface is what `__all__` lists; everything else may change. Importing this package imports
neither torch nor transformers: names are resolved on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nexus.errors import NexusError as NexusError
    from nexus.model.omni import OmniModel as OmniModel
    from nexus.recipe import Recipe as Recipe
    from nexus.respond import load as load
    from nexus.types import Audio as Audio
    from nexus.types import Image as Image
    from nexus.types import Sample as Sample
    from nexus.types import Text as Text
    from nexus.types import Turn as Turn
    from nexus.types import Video as Video

__version__ = "0.1.0"
_HOMES = {
    "load": "nexus.respond",
    "OmniModel": "nexus.model.omni",
    "Recipe": "nexus.recipe",
    "NexusError": "nexus.errors",
    "Sample": "nexus.types",
    "Turn": "nexus.types",
    "Text": "nexus.types",
    "Audio": "nexus.types",
    "Image": "nexus.types",
    "Video": "nexus.types",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nexus' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
