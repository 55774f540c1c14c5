"""Which runs are compared: sections by data and backbone, in them groups that differ by seed."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from training.config import Experiment
from training.config.neutral import NEUTRAL
from training.report.runs import Finished

# Settings that tell runs of one experiment apart without making them different experiments.
_RUN_ONLY = ("seed", "out", "threads", "overwrite", "device", "keep", "tracker")
_RUN_ONLY_KEYS = (*NEUTRAL, "head.also")

# Accuracies under other values of these are about other images, tasks or networks.
_SECTION_KEYS = (
    "data.name",
    "data.dataset",
    "data.train_split",
    "data.test_split",
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


REST = "others"
"""Title of the methods that a sweep with titles puts nowhere."""


class Section(NamedTuple):
    """Runs on the same data, cut into the same tasks, from the same backbone.

    Where a sweep says which of its variants belong together, each such part is a section.

    Attributes
    ----------
    base : str
        Data and backbone.
    part : str
        Title of the part; empty where there is one alone.
    slug : str
        Both as a file name.
    groups : dict of str to list of Finished
        Runs that differ by their seed alone, under a label; by seed.
    labels : tuple of str
        Labels of all sections, so that a method has one colour in all of them.
    fresh : tuple of str
        Labels that no earlier section on the same data and backbone has.
    """

    base: str
    part: str
    slug: str
    groups: dict[str, list[Finished]]
    labels: tuple[str, ...]
    fresh: tuple[str, ...]

    @property
    def title(self) -> str:
        """Data, backbone and part."""
        return f"{self.base}: {self.part}" if self.part else self.base

    def all_groups(self) -> dict[str, list[Finished]]:
        """The groups under the labels of all sections; one that is not here has no runs."""
        return {label: self.groups.get(label, []) for label in self.labels}

    @property
    def readouts(self) -> list[str]:
        """Read-outs that every run of some group has, primary ones first."""
        first = [run.experiment.head.readout for runs in self.groups.values() for run in runs]
        kinds = [kind for runs in self.groups.values() for kind in shared_readouts(runs)]
        return [kind for kind in dict.fromkeys([*first, *kinds]) if kind in kinds]

    @property
    def tasks(self) -> int:
        """Tasks of the stream; a method that learns all at once has one."""
        return max(tasks_of(run) for runs in self.groups.values() for run in runs)


def by_section(runs: Sequence[Finished]) -> list[Section]:
    """Sections in the order of their first run, each with its groups in that order.

    Parts of a sweep are in the order of its file, and so are their groups.

    Raises
    ------
    ValueError
        If a seed occurs twice among runs of the same name and settings.
    """
    found: dict[str, list[Finished]] = {}
    for run in runs:
        found.setdefault(_key(_identity(run)), []).append(run)
    bases = _distinct(
        [_title(part) for part in found.values()], [_identity(part[0]) for part in found.values()]
    )
    groups = [_groups(part) for part in found.values()]
    labels = tuple(dict.fromkeys(label for part in groups for label in part))
    titles = dict.fromkeys(title for run in runs for title in run.groups)
    sections: list[Section] = []
    for base, part in zip(bases, groups, strict=True):
        shown: set[str] = set()
        for title, inner in _parts(part, list(titles)).items():
            fresh = tuple(label for label in inner if label not in shown)
            sections.append(Section(base, title, "", inner, labels, fresh))
            shown |= set(inner)
    slugs = [slug(section.title) for section in sections]
    return [
        section._replace(slug=name if slugs.count(name) == 1 else f"{name}-{number}")
        for number, (section, name) in enumerate(zip(sections, slugs, strict=True), 1)
    ]


def _parts(
    groups: dict[str, list[Finished]], titles: Sequence[str]
) -> dict[str, dict[str, list[Finished]]]:
    """Groups by the part that they are in; one may be in several."""
    places = {label: _places(runs) for label, runs in groups.items()}
    found = {}
    for title in titles:
        inner = [label for label in groups if title in places[label]]
        inner.sort(key=lambda label: places[label][title])
        if inner:
            found[title] = {label: groups[label] for label in inner}
    rest = {label: runs for label, runs in groups.items() if not places[label]}
    if rest:
        found[REST if found else ""] = rest
    return found


def _places(runs: Sequence[Finished]) -> dict[str, int]:
    return {title: place for run in runs for title, place in run.places.items()}


def shared_readouts(runs: Sequence[Finished]) -> list[str]:
    """Read-outs that all runs have."""
    return [kind for kind in runs[0].matrices if all(kind in run.matrices for run in runs)]


def tasks_of(run: Finished) -> int:
    """Tasks that a run has learned."""
    return len(next(iter(run.matrices.values())))


def _groups(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        settings = _key(_settings(run.experiment))
        groups.setdefault(_key({"name": run.name, "settings": settings}), []).append(run)
    for part in groups.values():
        if len({run.experiment.seed for run in part}) < len(part):
            again = ", ".join(str(run.path) for run in part)
            msg = (
                f"these runs have the same settings and not all seeds differ: {again}; to compare "
                f"them, name them apart: NAME={part[0].path} OTHER={part[-1].path}"
            )
            raise ValueError(msg)
    labels = _labels([part[0] for part in groups.values()])
    return {
        label: sorted(part, key=lambda run: run.experiment.seed)
        for label, part in zip(labels, groups.values(), strict=True)
    }


def _labels(runs: Sequence[Finished]) -> list[str]:
    """Given names, or those of methods; with the settings in which groups of one name differ."""
    names = [run.name or run.experiment.method.name for run in runs]
    return _distinct(names, [_settings(run.experiment) for run in runs])


def _distinct(names: Sequence[str], settings: Sequence[dict[str, Any]]) -> list[str]:
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


def _flat(experiment: Experiment) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, value in asdict(experiment).items():
        if isinstance(value, dict):
            flat.update({f"{section}.{key}": item for key, item in value.items()})
        else:
            flat[section] = value
    return flat


def _settings(experiment: Experiment) -> dict[str, Any]:
    """What tells groups of a section apart."""
    apart = (*_RUN_ONLY_KEYS, *_SECTION_KEYS, "backbone.weights")
    return {
        key: value
        for key, value in _flat(experiment).items()
        if key not in apart and key.partition(".")[0] not in _RUN_ONLY
    }


def _identity(run: Finished) -> dict[str, Any]:
    """What tells sections apart; folders and files that moved do not count."""
    flat = _flat(run.experiment)
    weights = flat["backbone.weights"]
    return {
        **{key: flat[key] for key in _SECTION_KEYS},
        "data": _data_name(run.experiment),
        "backbone.weights": run.weights or (weights and Path(weights).name),
    }


def _title(runs: Sequence[Finished]) -> str:
    experiment, tasks = runs[0].experiment, max(tasks_of(run) for run in runs)
    data, backbone = experiment.data, experiment.backbone
    held_out = ", held-out training images" if data.validation else ""
    weights = f" ({Path(backbone.weights).stem})" if backbone.weights else ""
    name = backbone.name.removeprefix("hf:").rstrip("/").rpartition("/")[2]
    plural = "s" if tasks > 1 else ""
    return f"{_data_name(experiment)}{held_out}, {tasks} task{plural}, {name}{weights}"


def _data_name(experiment: Experiment) -> str:
    data = experiment.data
    if data.name == "folder" and data.root:
        return Path(data.root).name
    return data.dataset or data.name


def slug(text: str) -> str:
    """Text as part of a file name.

    Examples
    --------
    >>> slug("loda (method.gao False)")
    'loda-method-gao-false'
    """
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    return "-".join(words) or "runs"


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
