"""Experiments as runs record them, and how two of them differ."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

from training.backbones.config import HUGGING_FACE
from training.config.sections import Experiment

_PATHS = ("data.root", "backbone.weights", "backbone.name")


def as_recorded(experiment: Experiment) -> Experiment:
    """The experiment as a run records it: absolute paths, and no leave to overwrite."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().absolute())

    backbone = experiment.backbone
    local = backbone.name.removeprefix(HUGGING_FACE)
    if local != backbone.name and Path(local).expanduser().is_dir():
        backbone = replace(backbone, name=f"{HUGGING_FACE}{absolute(local)}")
    data = replace(experiment.data, root=absolute(experiment.data.root))
    kind, _, place = (data.dataset or "").partition("/")
    if kind.lower() == "hfds" and place and Path(place).is_dir():
        data = replace(data, dataset=f"{kind}/{absolute(place)}")
    # Whoever runs a recorded configuration again has to ask anew for replacing its folder.
    return replace(
        experiment,
        overwrite=False,
        data=data,
        backbone=replace(backbone, weights=absolute(backbone.weights)),
    )


def differing_settings(one: Experiment, other: Experiment) -> list[str]:
    """Dotted names of the settings in which two experiments differ as recorded, the folder aside.

    Paths that lead to the same file are the same, however they are written.

    Examples
    --------
    >>> differing_settings(Experiment(seed=1, out="a"), Experiment(seed=2, out="b"))
    ['seed']
    """
    found = []
    one, other = as_recorded(one), as_recorded(other)  # earlier versions recorded some as given
    for item in fields(Experiment):
        ours, theirs = getattr(one, item.name), getattr(other, item.name)
        if item.name in ("out", "overwrite") or ours == theirs:
            continue
        if is_dataclass(ours):
            names = [f"{item.name}.{f.name}" for f in fields(ours)]
            inner = zip(names, vars(ours).values(), vars(theirs).values(), strict=True)
            found += [name for name, a, b in inner if a != b and not _same_path(name, a, b)]
        else:
            found.append(item.name)
    return found


def _same_path(name: str, one: str | None, other: str | None) -> bool:
    if name not in _PATHS or one is None or other is None:
        return False
    local = name != "backbone.name" or all(x.startswith(HUGGING_FACE) for x in (one, other))
    paths = [Path(x.removeprefix(HUGGING_FACE)).expanduser() for x in (one, other)]
    there = all(path.exists() for path in paths)
    same = paths[0].resolve() == paths[1].resolve()
    return local and (same or (there and paths[0].samefile(paths[1])))
