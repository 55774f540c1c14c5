"""Experiment trackers (TensorBoard, Weights & Biases, MLflow and others) through Accelerate."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import LoggerType

from training.config import Experiment
from training.config.dotted import dotted_settings


def require_tracker(name: str) -> None:
    """Refuse a tracker that Accelerate does not know, or whose package is not installed.

    Raises
    ------
    ValueError
        Says what is known, or what to install; Accelerate would go on without the tracker.
    """
    from accelerate.tracking import get_available_trackers

    known = sorted(kind.value for kind in LoggerType if kind.value != "all")
    if name not in known:
        msg = f"tracker is {name!r}; known: {', '.join(known)}"
        raise ValueError(msg)
    if name not in {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}:
        msg = f"the tracker {name} is not installed: pip install {name}"
        raise ValueError(msg)


def start_tracker(accelerator: Accelerator, experiment: Experiment, folder: Path) -> None:
    """Open the tracker of an experiment, if it has one, and give it the settings."""
    if experiment.tracker is not None:
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.init_trackers("loda", config=flat_settings(experiment))


def flat_settings(experiment: Experiment) -> dict[str, Any]:
    """Every setting under a dotted name, as a number, truth value or text.

    Examples
    --------
    >>> flat_settings(Experiment(seed=3))["method.rank"]
    16
    """
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in dotted_settings(experiment).items()
    }
