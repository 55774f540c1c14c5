"""How many directions each layer of a run would need, from the moments that it saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from loda_math import RankMeasure, rank_for, rounding_unit
from training.analysis.saved_tasks import read_settings, saved_tasks
from training.files import understanding as readable

_MEASURES: tuple[RankMeasure, ...] = ("energy", "ratio")


class LayerRanks(NamedTuple):
    """One line of the table.

    Attributes
    ----------
    task : int
        Counted from 1.
    layer : str
        Its name.
    ranks : dict of (str, float) to int
        Smallest rank by measure and share: ``energy`` of the general subspace, ``ratio`` of the
        isolated one, which has none on the first task.
    reached : dict of str to float
        Share that the rank of the run reaches, by measure.
    """

    task: int
    layer: str
    ranks: dict[tuple[RankMeasure, float], int]
    reached: dict[RankMeasure, float]


def layer_ranks(path: Path, shares: Sequence[float]) -> tuple[int, list[LayerRanks]]:
    """Smallest sufficient ranks of every layer and task of a run.

    Parameters
    ----------
    path : Path
        A run trained with ``keep.moments``.
    shares : sequence of float
        Shares to reach, from 0 to 1.

    Returns
    -------
    rank : int
        The rank of the run, the same for all layers.
    lines : list of LayerRanks
        In the order of tasks and layers.

    Raises
    ------
    FileNotFoundError
        If there is no such run, or it kept no moments.
    ValueError
        If a share is out of range, the run used a method without subspaces, or a file is damaged.
    """
    settings = read_settings(path)
    lines = []
    for task in saved_tasks(path, settings):
        for name, layer in task.layers.items():
            ranks: dict[tuple[RankMeasure, float], int] = {}
            reached: dict[RankMeasure, float] = {}
            old = None if layer.history is None else layer.history.total
            for measure in _MEASURES[:1] if old is None else _MEASURES:
                for share in shares:
                    with readable(path):
                        choice = rank_for(
                            layer.new,
                            old,
                            share,
                            of=measure,
                            ridge=settings.ridge,
                            accumulation_eps=rounding_unit(),
                        )
                    ranks[measure, share] = int(choice.rank)
                    reached[measure] = float(choice.curve[settings.rank - 1])
            lines.append(LayerRanks(task.number, name, ranks, reached))
    return settings.rank, lines


def rank_table(rank: int, lines: Sequence[LayerRanks]) -> str:
    """Aligned plain text: a line a task and layer, and the largest ranks below.

    Parameters
    ----------
    rank, lines
        As :func:`layer_ranks` returns them.
    """
    columns = [
        (of, share) for of in _MEASURES for share in dict.fromkeys(s for _, s in lines[0].ranks)
    ]
    rows = [
        [
            "task",
            "layer",
            *(f"{of} {share:g}" for of, share in columns),
            *(f"{of} at {rank}" for of in _MEASURES),
        ]
    ]
    for line in lines:
        needed = [str(line.ranks.get(column, "")) for column in columns]
        shares = [f"{line.reached[of]:.4f}" if of in line.reached else "" for of in _MEASURES]
        rows.append([str(line.task), line.layer, *needed, *shares])
    most = [str(max((x.ranks.get(c, 0) for x in lines), default=0) or "") for c in columns]
    rows.append(["all", "largest", *most, "", ""])
    return aligned(rows, left=2)


def aligned(rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Columns of plain text, the first ones aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k < left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
