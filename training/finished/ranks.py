"""How many directions each layer of a run would need, read from the moments that it kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loda_math import RankMeasure, rank_for
from training.finished.kept import kept_tasks, read_method

_MEASURES: tuple[RankMeasure, ...] = ("energy", "ratio")
# The moments are float64 sums of single-precision Gram matrices: below is rounding.
_GRAM_EPS = float(np.finfo(np.float32).eps)


class LayerRanks(NamedTuple):
    """One line of the table.

    Attributes
    ----------
    task, layer : str
        Where.
    ranks : dict of (str, float) to int
        Smallest rank by measure and share: ``energy`` of the general subspace, ``ratio`` of the
        isolated one, which has none on the first task.
    reached : dict of str to float
        Share that the rank of the run reaches, by measure.
    """

    task: str
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
        If a share is out of range, or the run used a method without subspaces.
    """
    method = read_method(path)
    lines = []
    for kept in kept_tasks(path, method):
        for layer in kept.layers:
            new, old = kept.moments[f"new/{layer}"], kept.history.get(layer)
            ranks: dict[tuple[RankMeasure, float], int] = {}
            reached: dict[RankMeasure, float] = {}
            for of in _MEASURES if old is not None else _MEASURES[:1]:
                for share in shares:
                    choice = rank_for(
                        new, old, share, of=of, ridge=method.ridge, accumulation_eps=_GRAM_EPS
                    )
                    ranks[of, share] = int(choice.rank)
                    reached[of] = float(choice.curve[method.rank - 1])
            lines.append(LayerRanks(kept.task, layer, ranks, reached))
    return method.rank, lines


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
    header = ["task", "layer", *(f"{of} {share:g}" for of, share in columns)]
    header += [f"{of} at {rank}" for of in _MEASURES]
    rows = [header]
    for line in lines:
        needed = [str(line.ranks.get(column, "")) for column in columns]
        shares = [f"{line.reached[of]:.4f}" if of in line.reached else "" for of in _MEASURES]
        rows.append([line.task, line.layer, *needed, *shares])
    most = [str(max((x.ranks.get(c, 0) for x in lines), default=0) or "") for c in columns]
    rows.append(["all", "largest", *most, "", ""])
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k < 2 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
