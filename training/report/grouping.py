"""Which runs are compared: sections by data and backbone, in them groups that differ by seed."""

from collections.abc import Sequence
from typing import NamedTuple

from training.report.finished import Finished
from training.report.labels import (
    distinct,
    group_settings,
    section_settings,
    section_title,
    settings_key,
    slug,
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
        found.setdefault(settings_key(section_settings(run)), []).append(run)
    parts = list(found.values())
    tasks = [max(tasks_of(run) for run in part) for part in parts]
    bases = distinct(
        [
            section_title(part[0].experiment, number)
            for part, number in zip(parts, tasks, strict=True)
        ],
        [section_settings(part[0]) for part in parts],
    )
    groups = [_groups(part) for part in parts]
    labels = tuple(dict.fromkeys(label for part in groups for label in part))
    titles = dict.fromkeys(title for run in runs for title in run.groups)
    sections: list[Section] = []
    for base, part in zip(bases, groups, strict=True):
        shown: set[str] = set()
        for title, inner in _parts(part, list(titles)).items():
            fresh = tuple(label for label in inner if label not in shown)
            whole = max(len(r.groups.get(title, ())) for runs in inner.values() for r in runs)
            if not fresh and len(inner) < whole:
                continue  # what was given of it adds nothing to an earlier part
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
        settings = settings_key(group_settings(run.experiment))
        groups.setdefault(settings_key({"name": run.name, "settings": settings}), []).append(run)
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
    return distinct(names, [group_settings(run.experiment) for run in runs])
