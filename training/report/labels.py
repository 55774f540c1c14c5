"""What tells runs apart: the settings that count, and the names that are made from them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.config import Experiment
from training.config.dotted import dotted_settings
from training.config.neutral import NEUTRAL
from training.report.finished import Finished

# Settings that tell runs of one experiment apart without making them different experiments.
_RUN_ONLY = ("seed", "out", "threads", "overwrite", "device", "keep", "tracker")
_RUN_ONLY_KEYS = (*NEUTRAL, "head.also")

# Accuracies under other values of these are about other images, tasks or networks.
_SECTION_KEYS = (
    "data.name",
    "data.train_split",
    "data.test_split",
    "data.image_key",
    "data.label_key",
    "data.classes",
    "data.init_cls",
    "data.increment",
    "data.task_sizes",
    "data.tasks",
    "data.validation",
    "data.image_size",
    "backbone.name",
    "backbone.options",
    "backbone.pretrained",
)


def group_settings(experiment: Experiment) -> dict[str, Any]:
    """What tells groups of a section apart."""
    apart = (*_RUN_ONLY_KEYS, *_SECTION_KEYS, "data.dataset", "backbone.weights")
    return {
        key: value
        for key, value in dotted_settings(experiment).items()
        if key not in apart and key.partition(".")[0] not in _RUN_ONLY
    }


def section_settings(run: Finished) -> dict[str, Any]:
    """What tells sections apart; folders and files that moved do not count."""
    flat = dotted_settings(run.experiment)
    weights = flat["backbone.weights"]
    return {
        **{key: flat[key] for key in _SECTION_KEYS},
        "data": _data_name(run.experiment),
        "backbone.weights": run.weights or (weights and Path(weights).name),
    }


def settings_key(settings: dict[str, Any]) -> str:
    """Settings as one string that is the same where they are."""
    return json.dumps(settings, sort_keys=True)


def section_title(experiment: Experiment, tasks: int) -> str:
    """Data and backbone of runs that have learned so many tasks."""
    data, backbone = experiment.data, experiment.backbone
    held_out = ", held-out training images" if data.validation else ""
    weights = f" ({Path(backbone.weights).stem})" if backbone.weights else ""
    name = backbone.name.removeprefix("hf:").rstrip("/").rpartition("/")[2]
    plural = "s" if tasks > 1 else ""
    return f"{_data_name(experiment)}{held_out}, {tasks} task{plural}, {name}{weights}"


def distinct(names: Sequence[str], settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names, each with the settings in which others of the same name differ."""
    labels = []
    for name, own in zip(names, settings, strict=True):
        rivals = [other for rival, other in zip(names, settings, strict=True) if rival == name]
        differing = [k for k in own if any(other[k] != own[k] for other in rivals)]
        extra = ", ".join(f"{key} {own[key]}" for key in differing)
        labels.append(f"{name} ({extra})" if extra else name)
    # A given name may be that of a method with the same settings.
    return [
        label if labels.count(label) == 1 else f"{label} [{number}]"
        for number, label in enumerate(labels, 1)
    ]


def slug(text: str) -> str:
    """Text as part of a file name.

    Examples
    --------
    >>> slug("loda (method.gao False)")
    'loda-method-gao-false'
    """
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    return "-".join(words) or "runs"


def _data_name(experiment: Experiment) -> str:
    data = experiment.data
    if data.name == "folder" and data.root:
        return Path(data.root).name
    place = Path((data.dataset or "").partition("/")[2])  # a folder, or a name on the hub
    return place.name if place.is_absolute() else data.dataset or data.name
