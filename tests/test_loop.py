"""The training loop: repeatable, blind to the test images, and true to its settings."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_contents import events, same_model, same_tensors, untimed
from safetensors.torch import load_file
from small_runs import changed, finished, tiny, tree

from training.config import Experiment, TrainConfig, read_experiment
from training.run_dir import read_json
from training.train import train
from training.seeds import derive
from training.train import prepare

METHODS = ("loda", "seq_lora", "frozen")
pytestmark = pytest.mark.usefixtures("no_figure")


def told(run: Path) -> list[dict[str, Any]]:
    """The metrics without times and memory."""
    return [untimed(event) for event in events(run)]


def again(run: Path, out: Path, **changes: Any) -> Path:
    """The experiment of a run once more, with other settings."""
    experiment = read_experiment(run / "config.yaml")
    return train(changed(experiment, out=str(out), **changes), quiet=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_repeated_bit_for_bit(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, method: str
) -> None:
    run = finished(tmp_path_factory, method)
    torch.manual_seed(99)  # the global generator must not matter
    second = again(run, tmp_path / "second")
    assert same_model(run, second)
    assert (run / "readouts.safetensors").read_bytes() == (
        second / "readouts.safetensors"
    ).read_bytes()
    assert told(run) == told(second)


def test_another_seed_gives_another_class_order_and_other_weights(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = finished(tmp_path_factory)
    second = again(run, tmp_path / "second", seed=1996)
    orders = [read_json(folder / "classes.json")["order"] for folder in (run, second)]
    assert orders[0] != orders[1]
    assert not same_model(run, second)


@pytest.mark.parametrize(
    "changes",
    [
        {"head": {"readout": "heads", "also": []}},
        {"head": {"readout": "ridge", "also": ["alignment"]}},
        {"keep": dict.fromkeys(("branches", "moments", "heads", "statistics"), False)},
        {"data": {"workers": 2}},
        {"data": {"cache": False}},
        {"method": {"heldout": True}},
    ],
    ids=["heads only", "other read-outs", "keep nothing", "workers", "no cache", "held-out"],
)
def test_what_only_looks_on_does_not_change_the_weights(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    run = finished(tmp_path_factory)
    second = again(run, tmp_path / "second", **changes)
    assert same_model(run, second)
    ours, theirs = (read_json(folder / "summary.json")["counts"] for folder in (run, second))
    assert all(theirs[kind] == ours[kind] for kind in theirs)


@pytest.mark.parametrize("options", [{}, {"proj_drop_rate": 0.3}], ids=["plain", "drop-out"])
def test_the_callers_random_numbers_are_not_disturbed(
    tmp_path: Path, root: Path, options: dict[str, float]
) -> None:
    experiment = tiny(root, tmp_path / "run", data={"tasks": 1}, train={"epochs": 1})
    experiment.backbone.options.update(options)
    torch.manual_seed(5)
    legacy = np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must not change
    before = torch.get_rng_state()
    train(experiment, quiet=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == legacy).all()  # noqa: NPY002


def test_dropout_is_on_in_training_and_follows_the_seed(tmp_path: Path, root: Path) -> None:
    runs = []
    for name, rate in (("a", 0.3), ("b", 0.3), ("c", 0.0)):
        experiment = tiny(root, tmp_path / name, data={"tasks": 1})
        experiment.backbone.options["proj_drop_rate"] = rate
        torch.manual_seed(len(runs))
        runs.append(train(experiment, quiet=True))
    assert same_model(runs[0], runs[1])
    assert not same_model(runs[0], runs[2])


def test_seeds_differ_between_purposes_tasks_and_runs() -> None:
    purposes = ("batches", "moments", "head", "steps", "alignment", "method", "ridge")
    seeds = [derive(s, t, p) for s in range(3) for t in range(3) for p in purposes]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("tampering", ["pixels", "number"])
def test_test_images_never_influence_training(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tampering: str
) -> None:
    run = finished(tmp_path_factory)
    copy = shutil.copytree(tree(tmp_path_factory), tmp_path / "data")
    for path in sorted((copy / "test").rglob("*.png")):
        if tampering == "number" and path.stem != "0":
            path.unlink()
            continue
        noise = np.random.default_rng(1).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    poisoned = again(run, tmp_path / "run", data={"root": str(copy)})
    assert same_model(run, poisoned)
    files = ("readouts.safetensors", *(f"tasks/002/{n}.safetensors" for n in ("moments", "heads")))
    for name in files:
        assert (run / name).read_bytes() == (poisoned / name).read_bytes()
    trained = [[e for e in told(folder) if e["event"] == "epoch"] for folder in (run, poisoned)]
    assert trained[0] == trained[1]
    assert told(run) != told(poisoned)  # the accuracies do change: the images were read


def test_a_run_on_held_out_images_never_opens_the_test_split(tmp_path: Path, root: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "data")
    data = {"validation": 0.34}
    whole = train(tiny(copy, tmp_path / "a", data=data), quiet=True)
    shutil.rmtree(copy / "test")
    without = train(tiny(copy, tmp_path / "b", data=data), quiet=True)
    assert same_model(whole, without)
    assert told(whole) == told(without)
    assert told(without)[-1]["counts"]["nearest_mean"][1] == [2] * 6


def test_no_epochs_keep_model_and_heads_as_they_start(tmp_path: Path, root: Path) -> None:
    experiment = tiny(root, tmp_path / "run", train={"epochs": 0}, head={"readout": "heads"})
    start = prepare(changed(experiment, out=str(tmp_path / "other"))).state.model.state_dict()
    run = train(experiment, quiet=True)
    assert same_tensors(load_file(run / "model.safetensors"), start)
    heads = load_file(run / "readouts.safetensors")["heads/weight"]
    torch.testing.assert_close(heads.norm(dim=1), torch.ones(6))


def test_head_starts_differ(tmp_path: Path, root: Path) -> None:
    found = []
    for start in ("random", "class_mean"):
        head = {"readout": "heads", "start": start}
        folder = train(tiny(root, tmp_path / start, train={"epochs": 0}, head=head), quiet=True)
        found.append(read_json(folder / "summary.json")["readouts"]["heads"]["last"])
    # Class means of untrained features tell these colours apart; random directions do not.
    assert found[1] > 0.8 > found[0]


def test_low_precision_and_full_precision_run_in_one_process(tmp_path: Path, root: Path) -> None:
    folders = [
        train(tiny(root, tmp_path / str(n), precision=precision, data={"tasks": 1}), quiet=True)
        for n, precision in enumerate(("no", "bf16", "no"))
    ]
    assert same_model(folders[0], folders[2])
    assert not same_model(folders[0], folders[1])
    for weights in load_file(folders[1] / "model.safetensors").values():
        assert weights.dtype == torch.float32
        assert weights.isfinite().all()


def test_a_convolutional_network_can_be_the_backbone(tmp_path: Path, root: Path) -> None:
    # Batch norms have running statistics; frozen means frozen.
    experiment = tiny(root, tmp_path / "run", method={"name": "frozen"}, data={"tasks": 2})
    experiment.backbone.name, experiment.backbone.options = "test_byobnet", {}
    start = prepare(changed(experiment, out=str(tmp_path / "other"))).state.model.state_dict()
    assert any("running_mean" in name for name in start)
    run = train(experiment, quiet=True)
    assert same_tensors(load_file(run / "model.safetensors"), start)


def test_the_digits_are_learned(tmp_path: Path) -> None:
    experiment = Experiment(
        out=str(tmp_path / "run"),
        device="cpu",
        train=TrainConfig(epochs=1),
        data=Experiment().data,
    )
    experiment = changed(experiment, data={"tasks": 2}, head={"readout": "nearest_mean"})
    run = train(experiment, quiet=True)
    assert read_json(run / "summary.json")["readouts"]["nearest_mean"]["last"] > 0.8
