"""π0.5 on PyTorch Lightning: one model, two training stages, LeRobot data in, LeRobot checkpoints in and out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pi05_lightning.data.datamodule import Pi05DataModule
    from pi05_lightning.module import Pi05Module
    from pi05_lightning.policy import Pi05Policy
    from pi05_lightning.training.callbacks.stages import StageSwitch

__version__ = "0.2.0"
__all__ = ["Pi05DataModule", "Pi05Module", "Pi05Policy", "StageSwitch"]

_HOME = {
    "Pi05DataModule": "data.datamodule",
    "Pi05Module": "module",
    "Pi05Policy": "policy",
    "StageSwitch": "training.callbacks.stages",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `pi05 --help` and a mere `import pi05_lightning` do not need it
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
