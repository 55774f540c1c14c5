"""The table of sufficient ranks against the spectra of the moments that a run saved."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from small_runs import finished, tiny, tree

from training.analysis.ranks import layer_ranks, rank_table
from training.analysis.saved_tasks import task_file
from training.cli import main
from training.train import train

LAYERS = ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
RANK, SIZE, DECAY = 4, 16, 0.5


@pytest.fixture(scope="module")
def faded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose history fades."""
    out = tmp_path_factory.mktemp("ranks") / "run"
    settings = {"method": {"history_decay": DECAY}, "keep": {"moments": True}}
    settings["train"] = {"epochs": 1}
    return train(tiny(tree(tmp_path_factory), out, **settings), quiet=True)


def smallest(values: np.ndarray, share: float) -> int:
    """Directions whose sum reaches the share, counted one by one."""
    values = np.sort(values)[::-1]
    for rank in range(1, len(values) + 1):
        if values[:rank].sum() >= share * values.sum():
            return rank
    return len(values)


def test_ranks_are_those_of_the_spectra_that_the_run_saw(faded: Path) -> None:
    ranks = layer_ranks(faded, [0.5, 0.9])
    places = [(task, layer) for task in (1, 2, 3) for layer in LAYERS]
    assert list(zip(ranks["task"], ranks["layer"], strict=True)) == places
    moments = {task: load_file(task_file(faded, task, "moments")) for task in (1, 2, 3)}
    for row in ranks.to_dict("records"):
        task, layer = row["task"], row["layer"]
        new = moments[task][f"new/{layer}"]
        past = [(DECAY ** (task - 1 - t), moments[t][f"merged/{layer}"]) for t in range(1, task)]
        old = sum((weight * moment for weight, moment in past), np.zeros((SIZE, SIZE)))
        spectra = {"energy": np.linalg.eigvalsh(new + old)}
        if past:
            regular = old / np.trace(old) + 1e-2 / SIZE * np.eye(SIZE)
            pencil = np.linalg.solve(regular, new / np.trace(new))
            spectra["ratio"] = np.linalg.eigvals(pencil).real
        assert {of for of in ("energy", "ratio") if pd.notna(row[f"{of} 0.5"])} == set(spectra)
        for of, spectrum in spectra.items():
            values = np.sort(spectrum)[::-1]
            reached = values[:RANK].sum() / values.sum()
            assert row[f"{of} at {RANK}"] == pytest.approx(reached, rel=1e-4)
            for share in (0.5, 0.9):
                assert row[f"{of} {share}"] == smallest(values, share)


def test_ranks_are_printed_as_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ranks", str(run), "--share", "0.5", "0.9"]) == 0
    table = capsys.readouterr().out.splitlines()
    ranks = layer_ranks(run, [0.5, 0.9])
    assert table == rank_table(ranks).splitlines()
    assert len(table) == 1 + len(ranks) + 1
    header = "task layer energy 0.5 energy 0.9 ratio 0.5 ratio 0.9 energy at 4 ratio at 4"
    assert table[0].split() == header.split()
    task, layer, *numbers = ranks.iloc[-1]
    expected = [f"{x:.4f}" if isinstance(x, float) else str(x) for x in numbers]
    assert table[-2].split() == [str(task), layer, *expected]
    largest = [ranks[f"{of} {share}"].max() for of in ("energy", "ratio") for share in (0.5, 0.9)]
    assert table[-1].split() == ["all", "largest", *map(str, largest)]


def test_null_lora_has_ranks_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert len(layer_ranks(finished(tmp_path_factory, "null_lora"), [0.9])) == 3 * 2


@pytest.mark.parametrize("shares", [[1.5], [-0.1, 0.5], [float("nan")], []])
def test_shares_that_are_none(run: Path, shares: list[float]) -> None:
    with pytest.raises(ValueError, match="share"):
        layer_ranks(run, shares)


def test_the_command_refuses_in_one_line(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, share in ((tmp_path / "nowhere", "0.9"), (tmp_path, "0.9"), (run, "1.5")):
        assert main(["ranks", str(path), "--share", share]) == 2
        assert capsys.readouterr().err.count("\n") == 1
