"""Class-incremental experiments with LoDA: data, methods, the training loop and the command line.

`load` gives the classifier of a finished run, `export` writes it in the form of another library,
and `extend` trains a run further, on new tasks. `training.train.train` trains a run from a
`training.config.Experiment`, and `training.train.resume` resumes one. Importing this package loads
nothing heavy; the parts that need torch are imported when used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.analysis.export import export
    from training.analysis.predict import load
    from training.extension import extend

__all__ = ["export", "extend", "load"]


_MODULES = {
    "export": "training.analysis.export",
    "extend": "training.extension",
    "load": "training.analysis.predict",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_MODULES[name]), name)
