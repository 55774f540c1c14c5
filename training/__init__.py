"""Class-incremental experiments with LoDA: data, methods, the training loop and the command line.

`load` gives the classifier of a finished run; a run is trained by `training.train.train` from an
`training.config.Experiment`, and goes on by `training.train.resume`. Importing this package loads
nothing heavy; the parts that need torch are imported when used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.analysis.predict import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from training.analysis.predict import load

    return load
