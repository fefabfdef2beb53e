"""Early-exit inference for Hugging Face encoders.

The public names are loaded on first use, so that `import offramp` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.attacks import attack
    from offramp.benchmark import bench
    from offramp.calibration import OperatingPoint, calibrate
    from offramp.comparison import compare
    from offramp.data import load_examples
    from offramp.engines import Engine, record
    from offramp.errors import OfframpError
    from offramp.evaluation import evaluate
    from offramp.model import ExitSpec, MultiExitConfig, MultiExitModel
    from offramp.prediction import export, predict
    from offramp.prediction.pipeline import pipeline
    from offramp.table import ExitTable
    from offramp.training import attach, train
    from offramp.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "ExitSpec",
    "ExitTable",
    "MultiExitConfig",
    "MultiExitModel",
    "OfframpError",
    "OperatingPoint",
    "__version__",
    "attach",
    "attack",
    "bench",
    "calibrate",
    "compare",
    "evaluate",
    "export",
    "load_examples",
    "pipeline",
    "predict",
    "record",
    "train",
    "tune",
]

_HOME = {
    "Engine": "offramp.engines",
    "ExitSpec": "offramp.model",
    "ExitTable": "offramp.table",
    "MultiExitConfig": "offramp.model",
    "MultiExitModel": "offramp.model",
    "OfframpError": "offramp.errors",
    "OperatingPoint": "offramp.calibration",
    "attach": "offramp.training",
    "attack": "offramp.attacks",
    "bench": "offramp.benchmark",
    "calibrate": "offramp.calibration",
    "compare": "offramp.comparison",
    "evaluate": "offramp.evaluation",
    "export": "offramp.prediction",
    "load_examples": "offramp.data",
    "pipeline": "offramp.prediction.pipeline",
    "predict": "offramp.prediction",
    "record": "offramp.engines",
    "train": "offramp.training",
    "tune": "offramp.tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'offramp' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
