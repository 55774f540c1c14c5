"""Analysis of a finished run of LoDA, written beside it for the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from training.analysis.loss_landscape import loss_landscape
from training.analysis.saved_tasks import read_settings, task_file
from training.analysis.subspace_energy import subspace_energies
from training.components import at_least, check
from training.run_dir import (
    ANALYSIS,
    CLASSES,
    SUMMARY,
    read_json,
    readable,
    update_manifest,
    write_json,
)

Part = Literal["subspaces", "losses"]
PARTS: tuple[Part, ...] = get_args(Part)
_NEEDS: dict[Part, tuple[str, ...]] = {
    "subspaces": ("branches", "moments"),
    "losses": ("branches", "moments", "heads"),
}
_LAST_STEP = 1.5


class Analysis(NamedTuple):
    """The file that was written, and why parts of it are missing."""

    path: Path
    notes: list[str]


def analyse(
    path: Path,
    *,
    parts: Sequence[Part] = PARTS,
    tasks: Sequence[int] | None = None,
    points: int = 16,
    root: str | None = None,
    allow: Sequence[str] = (),
) -> Analysis:
    """Write ``analysis.json`` beside a run: energies of its subspaces, losses along its updates.

    Results of an earlier analysis for other parts and tasks stay in the file.

    Parameters
    ----------
    path : Path
        A finished run of ``loda`` or ``null_lora``. Both parts need what ``keep.branches`` and
        ``keep.moments`` keep, ``losses`` also what ``keep.heads`` keeps, and the data.
    parts : sequence of str
        ``subspaces``, ``losses`` or both. A part is left out if the run kept too
        little for it, or has no direction to follow.
    tasks : sequence of int, optional
        Tasks to take losses of, counted from 1; by default the second, the middle and the last
        one.
    points : int
        Steps α from 0 to 1.5 at which losses are taken, at least 2.
    root : str, optional
        Where the data are now, if they moved since the training.
    allow : sequence of str
        As in :func:`training.load`.

    Returns
    -------
    Analysis

    Raises
    ------
    FileNotFoundError
        If the folder is not a finished run, or kept too little for every part.
    ValueError
        If the run used another method, or has no such task.
    """
    settings = read_settings(path, allow=allow)
    if not (path / SUMMARY).is_file():
        msg = f"{path} holds no finished run: {SUMMARY} missing"
        raise FileNotFoundError(msg)
    classes = read_json(path / CLASSES)
    with readable(path / CLASSES):
        count = len(classes["tasks"])
    chosen = _tasks(path, count, tasks)
    at_least("points", points, 2)
    lacks = {part: " ".join(_missing(path, _NEEDS[part], count)) for part in parts}
    why = {part: f"was trained without {lacking}" for part, lacking in lacks.items() if lacking}
    if "losses" in parts and settings.branches == "isolated":
        why["losses"] = "has no general branch after its first task: no direction to follow"
    # If one part cannot be computed, the other is still written.
    notes = [f"{part} left out: {path} {reason}" for part, reason in why.items()]
    possible = [part for part in parts if part not in why]
    if not possible:
        raise (FileNotFoundError if all(lacks.values()) else ValueError)("; ".join(notes))
    file = path / ANALYSIS
    content: dict[str, Any] = dict.fromkeys(PARTS)
    # Losses are slow to compute: those of other tasks are kept.
    earlier = read_json(file) if file.is_file() else content
    with readable(file):
        content = {part: earlier[part] for part in PARTS}
        losses = {task["task"]: task for task in content["losses"] or []}
    if "subspaces" in possible:
        content["subspaces"] = subspace_energies(path, allow=allow)
    if "losses" in possible:
        steps = [_LAST_STEP * k / (points - 1) for k in range(points)]
        losses |= {
            x["task"]: x for x in loss_landscape(path, chosen, steps, root=root, allow=allow)
        }
        content["losses"] = [losses[task] for task in sorted(losses)]
    write_json(file, content)
    update_manifest(path, ANALYSIS)
    return Analysis(file, notes)


def _tasks(path: Path, count: int, tasks: Sequence[int] | None) -> list[int]:
    """The given tasks, or by default the second, the middle and the last one."""
    if count < 2:
        msg = f"{path} learned a single task: there is no earlier one to compare with"
        raise ValueError(msg)
    if tasks is None:
        return sorted({2, count // 2 + 1, count})
    fits = bool(tasks) and all(2 <= task <= count for task in tasks)
    check(fits, "tasks", list(tasks), f"from 2 (the first one has no old tasks) to {count}")
    return sorted(set(tasks))


def _missing(path: Path, names: Sequence[str], count: int) -> list[str]:
    """Switches of ``keep`` that were off, to judge by missing files."""
    return [
        f"--keep.{name} true"
        for name in names
        if not all(task_file(path, task, name).is_file() for task in range(1, count + 1))
    ]
