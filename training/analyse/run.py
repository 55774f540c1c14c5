"""Analysis of a finished run of LoDA, written beside it for the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from training.analyse.losses import losses
from training.analyse.subspaces import subspaces
from training.finished.kept import read_method
from training.run_dir import ANALYSIS, CLASSES, SUMMARY, TASKS, write_json
from training.shapes import ANALYSIS_SHAPE, CLASSES_SHAPE, read_shaped

Part = Literal["subspaces", "losses"]
PARTS: tuple[Part, ...] = get_args(Part)
_NEEDS: dict[Part, tuple[str, ...]] = {
    "subspaces": ("branches", "moments"),
    "losses": ("branches", "moments", "heads"),
}
_LAST_STEP = 1.5


class Analysis(NamedTuple):
    """The file that was written, and why a part of it is missing."""

    path: Path
    notes: list[str]


def analyse(
    path: Path,
    *,
    parts: Sequence[Part] = PARTS,
    tasks: Sequence[int] | None = None,
    points: int = 16,
    root: str | None = None,
) -> Analysis:
    """Write ``analysis.json`` beside a run: energies of its subspaces, losses along its updates.

    What an earlier analysis found of other parts and tasks stays in the file.

    Parameters
    ----------
    path : Path
        A finished run of ``loda`` or ``null_lora``. Both parts need what ``keep.branches`` and
        ``keep.moments`` keep, ``losses`` also what ``keep.heads`` keeps, and the data.
    parts : sequence of str
        ``subspaces``, ``losses`` or both. One for which the run kept too little, or has no
        direction to follow, is left out.
    tasks : sequence of int, optional
        Tasks to take losses of, counted from 1 as in the figures; by default the second, the
        middle and the last one.
    points : int
        Steps α from 0 to 1.5 at which losses are taken, at least 2.
    root : str, optional
        Where the data are now, if they moved since the training.

    Returns
    -------
    Analysis

    Raises
    ------
    FileNotFoundError
        If the folder is no finished run, or kept too little for every part.
    ValueError
        If the run used another method, or has no such task.
    """
    method = read_method(path)
    if not (path / SUMMARY).is_file():
        msg = f"{path} holds no finished run: {SUMMARY} not there"
        raise FileNotFoundError(msg)
    count = len(read_shaped(path / CLASSES, CLASSES_SHAPE)["tasks"])
    chosen = _tasks(path, count, tasks)
    if points < 2:
        msg = f"points must be at least 2, got {points}"
        raise ValueError(msg)
    lacks = {part: " ".join(_missing(path, _NEEDS[part], count)) for part in parts}
    why = {part: f"was trained without {lacking}" for part, lacking in lacks.items() if lacking}
    if "losses" in parts and method.branches == "isolated":
        why["losses"] = "has no general branch after its first task: no direction to follow"
    notes = [f"{part} left out: {path} {reason}" for part, reason in why.items()]
    if len(notes) == len(parts):
        raise (FileNotFoundError if all(lacks.values()) else ValueError)("; ".join(notes))
    content: dict[str, Any] = {**dict.fromkeys(PARTS), **_earlier(path)}
    if "subspaces" in parts and "subspaces" not in why:
        content["subspaces"] = subspaces(path)
    if "losses" in parts and "losses" not in why:
        steps = [_LAST_STEP * k / (points - 1) for k in range(points)]
        before = {task["task"]: task for task in content["losses"] or []}
        now = {task["task"]: task for task in losses(path, chosen, steps, root=root)}
        content["losses"] = [task for _, task in sorted({**before, **now}.items())]
    write_json(path / ANALYSIS, content)
    return Analysis(path / ANALYSIS, notes)


def _tasks(path: Path, count: int, tasks: Sequence[int] | None) -> list[int]:
    """Tasks counted from 0."""
    if count < 2:
        msg = f"{path} learned a single task: there is no past to compare with"
        raise ValueError(msg)
    if tasks is None:
        return sorted({1, count // 2, count - 1})
    if not tasks or not all(2 <= task <= count for task in tasks):
        msg = f"tasks must be from 2 (the first one has no past) to {count}, got {list(tasks)}"
        raise ValueError(msg)
    return sorted({task - 1 for task in tasks})


def _earlier(path: Path) -> dict[str, Any]:
    """What the file of an earlier analysis holds."""
    if not (path / ANALYSIS).is_file():
        return {}
    found: dict[str, Any] = read_shaped(path / ANALYSIS, ANALYSIS_SHAPE)
    return found


def _missing(path: Path, names: Sequence[str], count: int) -> list[str]:
    """Switches of ``keep`` that were off: some task lacks its file."""
    folders = [path / TASKS / f"{task:03d}" for task in range(count)]
    lacking = [n for n in names if not all((f / f"{n}.safetensors").is_file() for f in folders)]
    return [f"--keep.{name} true" for name in lacking]
