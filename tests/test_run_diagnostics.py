"""What a run says of its layers: diagnostics in the log, and the table of sufficient ranks."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import finished, tiny, tree

from training.cli import main
from training.data import ImageSet
from training.finished.ranks import layer_ranks, rank_table
from training.train import train

LAYERS = ("blocks.0.attn.qkv", "blocks.1.attn.qkv")
RANK, SIZE = 4, 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    method = {"heldout": True, "history_decay": 0.5}
    keep = {"moments": True, "branches": True}
    out = tmp_path_factory.mktemp("diagnostics") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.loop.accuracy_figure", lambda *_, **__: None)
        experiment = tiny(tree(tmp_path_factory), out, method=method, keep=keep)
        return train(experiment, quiet=True)


def kept(run: Path, task: int, name: str) -> dict[str, np.ndarray]:
    return load_file(run / "tasks" / f"{task:03d}" / f"{name}.safetensors")


def history(run: Path, task: int, layer: str) -> np.ndarray:
    moments = [kept(run, past, "moments")[f"merged/{layer}"] for past in range(task)]
    return sum((0.5 ** (task - 1 - past) * m for past, m in enumerate(moments)), np.zeros(()))


def layers(run: Path) -> list[dict[str, Any] | None]:
    """The diagnostics of every task."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line.get("layers") for line in lines if line["event"] == "task"]


def energy(update: np.ndarray, moment: np.ndarray) -> float:
    return float(np.trace(update @ moment @ update.T))


def test_the_log_holds_the_effect_of_every_merge(run: Path) -> None:
    first, *later = layers(run)
    assert first is None
    for task, found in enumerate(later, start=1):
        assert found is not None
        assert tuple(found) == LAYERS
        branches, moments = kept(run, task, "branches"), kept(run, task, "moments")
        for layer in LAYERS:
            parts = {
                b: weight * branches[f"up/{b}/{layer}"].astype(float) for b, weight in
                (("general", 0.25), ("isolated", 0.5))
            }  # fmt: skip
            downs = {b: branches[f"down/{b}/{layer}"].astype(float) for b in parts}
            middle = branches[f"coefficients/{layer}"]
            isolated = parts["isolated"] @ downs["isolated"]
            whole = parts["general"] @ downs["general"] + isolated
            merged = parts["general"] @ middle @ downs["general"] + isolated
            old = history(run, task, layer) / sum(0.5**age for age in range(task))
            new = moments[f"trained/{layer}"]
            assert found[layer]["effect"] == pytest.approx(
                {
                    "old_change": energy(merged, old),
                    "old_change_before": energy(whole, old),
                    "new_loss": energy(whole - merged, new),
                    "new_change": energy(whole, new),
                },
                rel=1e-6,
            )


def test_the_log_holds_what_the_directions_keep_held_out(run: Path) -> None:
    for found in layers(run)[1:]:
        assert found is not None
        for layer in LAYERS:
            ratios = found[layer]["heldout"]
            assert list(ratios) == ["general", "isolated"]
            assert all(0 < ratio["energy"] <= 1 for ratio in ratios.values())
            assert ratios["isolated"]["chosen"] > ratios["general"]["chosen"]


def test_ratios_can_be_left_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("plain") / "run"
    settings = {"method": {"heldout": False}, "data": {"tasks": 2}, "train": {"epochs": 0}}
    first, second = layers(train(tiny(tree(tmp_path_factory), out, **settings), quiet=True))
    assert first is None
    assert all(set(layer) == {"effect"} for layer in second.values())
    assert layers(finished(tmp_path_factory, "seq_lora")) == [None] * 3


# Ranks


def smallest(values: np.ndarray, share: float) -> int:
    """Directions whose sum reaches the share, counted one by one."""
    values = np.sort(values)[::-1]
    for rank in range(1, len(values) + 1):
        if values[:rank].sum() >= share * values.sum():
            return rank
    return len(values)


def test_ranks_are_those_of_the_spectra_that_the_run_saw(run: Path) -> None:
    rank, lines = layer_ranks(run, [0.5, 0.9])
    assert rank == RANK
    assert [(x.task, x.layer) for x in lines] == [(f"00{t}", n) for t in range(3) for n in LAYERS]
    for line in lines:
        task = int(line.task)
        new, old = kept(run, task, "moments")[f"new/{line.layer}"], history(run, task, line.layer)
        spectra = {"energy": np.linalg.eigvalsh(new + old)}
        if task:
            regular = old / np.trace(old) + 1e-2 / SIZE * np.eye(SIZE)
            pencil = np.linalg.solve(regular, new / np.trace(new))
            spectra["ratio"] = np.linalg.eigvals(pencil).real
        assert {of for of, _ in line.ranks} == set(line.reached) == set(spectra)
        for (of, share), found in line.ranks.items():
            assert found == smallest(spectra[of], share)
        for of, share in line.reached.items():
            values = np.sort(spectra[of])[::-1]
            assert share == pytest.approx(values[:RANK].sum() / values.sum(), rel=1e-4)


def test_ranks_are_printed_as_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ranks", str(run), "--share", "0.5", "0.9"]) == 0
    table = capsys.readouterr().out.splitlines()
    rank, lines = layer_ranks(run, [0.5, 0.9])
    assert table == rank_table(rank, lines).splitlines()
    assert len(table) == 1 + len(lines) + 1
    header = "task layer energy 0.5 energy 0.9 ratio 0.5 ratio 0.9 energy at 4 ratio at 4"
    assert table[0].split() == header.split()
    last = lines[-1]
    assert table[-2].split() == [
        last.task,
        last.layer,
        *(str(rank) for rank in last.ranks.values()),
        *(f"{share:.4f}" for share in last.reached.values()),
    ]
    largest = [max(x.ranks.get(key, 0) for x in lines) for key in last.ranks]
    assert table[-1].split() == ["all", "largest", *map(str, largest)]


def test_ranks_of_what_has_none(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    incomplete = shutil.copytree(run, tmp_path / "incomplete")
    (incomplete / "tasks" / "001" / "moments.safetensors").unlink()
    for path, message in (
        (tmp_path / "nowhere", "no run folder"),
        (tmp_path, "is no run folder"),
        (finished(tmp_path_factory, "frozen"), "a run of frozen; what is asked for"),
        (incomplete, "did not keep moments of all its tasks: train with --keep.moments true"),
    ):
        assert main(["ranks", str(path)]) == 2
        assert message in capsys.readouterr().err
    assert main(["ranks", str(run), "--share", "1.5"]) == 2
    assert "share must be a share from 0 to 1" in capsys.readouterr().err


def test_the_log_says_how_long_training_waited_for_images(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = ImageSet.prepared

    def slowly(self: ImageSet, keys: Any) -> Any:
        time.sleep(0.02)
        return prepared(self, keys)

    monkeypatch.setattr("training.loop.accuracy_figure", lambda *_, **__: None)
    monkeypatch.setattr(ImageSet, "prepared", slowly)
    experiment = tiny(tree(tmp_path_factory), tmp_path_factory.mktemp("slow") / "run")
    start = time.perf_counter()
    lines = (train(experiment, quiet=True) / "metrics.jsonl").read_text("utf-8").splitlines()
    wall = time.perf_counter() - start
    tasks = [line for line in map(json.loads, lines) if line["event"] == "task"]
    assert len(tasks) > 1
    for task in tasks:
        assert task["seconds"]["load"] >= 0.02 * experiment.train.epochs
        assert task["seconds"]["train"] > 0
    assert sum(sum(task["seconds"].values()) for task in tasks) <= wall
