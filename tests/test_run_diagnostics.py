"""What a run says of its layers: diagnostics in the log."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import finished, tiny, tree

from training.data import ImageSet
from training.train import train

LAYERS = ("blocks.0.attn.qkv", "blocks.1.attn.qkv")


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
