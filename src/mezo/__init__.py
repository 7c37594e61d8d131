"""Fine-tuning of language models with forward passes only (MeZO, arXiv 2305.17333)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mezo.api import build_trainer as build_trainer
    from mezo.api import eval_model as eval_model
    from mezo.api import merge as merge
    from mezo.api import mezo_finetune as mezo_finetune
    from mezo.api import replay as replay
    from mezo.config import PRESETS as PRESETS
    from mezo.config import MeZOConfig as MeZOConfig
    from mezo.config import preset as preset
    from mezo.errors import EngineError as EngineError
    from mezo.errors import JournalError as JournalError
    from mezo.errors import NonFiniteLossError as NonFiniteLossError
    from mezo.errors import UserError as UserError
    from mezo.trainer import MeZOTrainer as MeZOTrainer
    from mezo.trainer import TrainResult as TrainResult

# Names are loaded when they are first used, so that `mezo --help` imports neither torch nor transformers.
_HOMES = {
    "mezo.api": ("build_trainer", "eval_model", "merge", "mezo_finetune", "replay"),
    "mezo.config": ("PRESETS", "MeZOConfig", "preset"),
    "mezo.errors": ("EngineError", "JournalError", "NonFiniteLossError", "UserError"),
    "mezo.trainer": ("MeZOTrainer", "TrainResult"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'mezo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
