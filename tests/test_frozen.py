"""The frozen backbone, and the read-outs of it that need no training."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import finished, small_vit, tiny

from training.run_dir import read_json
from training.train import train


def test_frozen_trains_the_heads_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = finished(tmp_path_factory, "frozen")
    saved, start = load_file(run / "model.safetensors"), small_vit().state_dict()
    sizes = {name: value.shape for name, value in saved.items()}
    assert sizes == {name: value.shape for name, value in start.items()}
    assert read_json(run / "summary.json")["trainable_parameters"] == [32] * 3


@pytest.mark.parametrize(("name", "kind"), [("ncm", "nearest_mean"), ("ranpac_frozen", "ridge")])
def test_read_outs_without_training_are_those_of_the_frozen_backbone(
    name: str, kind: str, root: Path, tmp_path: Path
) -> None:
    asked = {"readout": "heads", "also": ["nearest_mean", "ridge"], "ridge.features": 32}
    bare = train(
        tiny(root, tmp_path / name, method={"name": name}, head={"readout": "heads"}), quiet=True
    )
    frozen = train(
        tiny(root, tmp_path / "frozen", method={"name": "frozen"}, head=asked), quiet=True
    )
    models = [load_file(run / "model.safetensors") for run in (bare, frozen)]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    summary = read_json(bare / "summary.json")
    assert summary["readout"] == kind
    assert set(summary["counts"]) == {kind, "heads"}
    expected = read_json(frozen / "summary.json")["counts"][kind]
    assert summary["counts"][kind] == expected
