"""How many directions each layer of a run would need, from the moments that it kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from loda_math import RankMeasure, rank_for, rounding_unit
from training.analysis.saved_tasks import read_settings, saved_tasks, task_file
from training.components import check
from training.logging import aligned
from training.run_dir import readable

_MEASURES: tuple[RankMeasure, ...] = ("energy", "ratio")


def layer_ranks(path: Path, shares: Sequence[float]) -> pd.DataFrame:
    """Smallest sufficient ranks of every layer and task of a run.

    Parameters
    ----------
    path : Path
        A run trained with ``keep.moments``.
    shares : sequence of float
        Shares to reach, from 0 to 1.

    Returns
    -------
    DataFrame
        One row per ``task`` (from 1) and ``layer``. ``energy 0.9`` is the smallest rank of the
        general subspace that carries 0.9 of the energy, ``ratio 0.9`` that of the isolated one,
        absent on the first task; ``energy at 16`` and ``ratio at 16`` are the shares that the rank
        of the run (16, say) reaches.

    Raises
    ------
    FileNotFoundError
        If there is no such run, or it kept no moments.
    ValueError
        If a share is out of range, the run used a method without subspaces, or a file is damaged.
    """
    fits = bool(shares) and all(0 <= share <= 1 for share in shares)
    check(fits, "share", list(shares), "from 0 to 1")
    settings = read_settings(path)
    rows = []
    for task in saved_tasks(path, settings):
        for name, layer in task.layers.items():
            row: dict[str, Any] = {"task": task.number, "layer": name}
            old = task.history[name].total if task.history else None
            with readable(task_file(path, task.number, "moments"), name):
                for of in _MEASURES if task.history else _MEASURES[:1]:
                    for share in shares:
                        choice = rank_for(
                            layer["moment_new"],
                            old,
                            share,
                            of=of,
                            ridge=settings.ridge,
                            ridge_scale=settings.ridge_scale,
                            accumulation_eps=rounding_unit(),
                        )
                        row[f"{of} {share:g}"] = int(choice.rank)
                    row[f"{of} at {settings.rank}"] = float(choice.curve[settings.rank - 1])
            rows.append(row)
    # Keep integers although the first task has none in some columns.
    ranks = pd.DataFrame(rows).convert_dtypes()
    return ranks[sorted(ranks.columns, key=lambda name: " at " in name)]


def rank_table(ranks: pd.DataFrame) -> str:
    """The result of :func:`layer_ranks` as aligned text, with the largest ranks below."""
    largest = ranks.drop(columns=["task", "layer"]).select_dtypes("Int64").max()
    text = ranks.map(lambda x: "" if pd.isna(x) else f"{x:.4f}" if isinstance(x, float) else str(x))
    last = ["all", "largest", *(str(largest.get(name, "")) for name in ranks.columns[2:])]
    return aligned([list(text.columns), *text.to_numpy().tolist(), last], left=2)
