"""The training loop: repeatable, resumable, blind to the test images, and loud when it fails."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import READOUTS, changed, finished, squares, tiny, tree

from training.checkpoints import newest_checkpoint
from training.config import Experiment, TrainConfig, read_experiment
from training.files import read_json
from training.loop import run_task, train
from training.progress import Meter, Progress
from training.randomness import derive
from training.setup import prepare

METHODS = ("loda", "seq_lora", "frozen")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory)


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    # Drawing takes longer than the training here; test_run_folder looks at a figure.
    monkeypatch.setattr("training.loop.accuracy_figure", lambda *_, **__: None)


def again(run: Path, out: Path, **changes: Any) -> Path:
    """The experiment of a run once more, with other settings."""
    experiment = read_experiment(run / "config.yaml")
    return train(changed(experiment, out=str(out), **changes), quiet=True)


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_model(a: Path, b: Path) -> bool:
    return same_tensors(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"))


def events(run: Path) -> list[dict[str, Any]]:
    """The metrics without times and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory")} for line in lines]


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
    assert events(run) == events(second)


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
    trained = [[e for e in events(folder) if e["event"] == "epoch"] for folder in (run, poisoned)]
    assert trained[0] == trained[1]
    assert events(run) != events(poisoned)  # the accuracies do change: the images were read


def test_a_run_on_held_out_images_never_opens_the_test_split(tmp_path: Path, root: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "data")
    data = {"validation": 0.34}
    whole = train(tiny(copy, tmp_path / "a", data=data), quiet=True)
    shutil.rmtree(copy / "test")
    without = train(tiny(copy, tmp_path / "b", data=data), quiet=True)
    assert same_model(whole, without)
    assert events(whole) == events(without)
    assert events(without)[-1]["counts"]["nearest_mean"][1] == [2] * 6


def resume(run: Any, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    run.state.load(tensors, record)
    assert run.state.tasks == record["tasks"]


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_the_state_carries_a_run_over_bit_for_bit(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, method: str, done: int
) -> None:
    run = finished(tmp_path_factory, method)
    experiment = read_experiment(run / "config.yaml")
    first = prepare(changed(experiment, out=str(tmp_path / "first")))
    with Progress(3, quiet=True) as progress:
        for task in range(done):
            run_task(first, task, progress)
    save_file(
        {k: v.clone().contiguous() for k, v in first.state.tensors().items()}, tmp_path / "state"
    )
    record = json.loads(json.dumps(first.state.record()))
    # Whatever the weights of the fresh run are, the state replaces them.
    second = prepare(changed(experiment, out=str(tmp_path / "second")))
    with torch.no_grad():
        for parameter in second.state.model.parameters():
            parameter.add_(1.0)
    before = torch.get_rng_state()
    resume(second, load_file(tmp_path / "state"), record)
    assert torch.equal(torch.get_rng_state(), before)
    with Progress(3, quiet=True) as progress:
        for task in range(done, 3):
            run_task(second, task, progress)
    assert same_tensors(second.state.model.state_dict(), load_file(run / "model.safetensors"))
    readouts = load_file(run / "readouts.safetensors")
    for kind, readout in second.state.readouts.items():
        for name, tensor in readout.tensors().items():
            assert torch.equal(tensor, readouts[f"{kind}/{name}"]), (kind, name)
    counts = read_json(run / "summary.json")["counts"]
    assert {k: m.to_dict() for k, m in second.state.matrices.items()} == counts


def test_a_fresh_state_can_be_written(tmp_path: Path, root: Path) -> None:
    experiment = tiny(root, tmp_path / "run", head={"also": list(READOUTS[1:])})
    run = prepare(experiment)
    save_file({k: v.clone().contiguous() for k, v in run.state.tensors().items()}, tmp_path / "s")
    other = prepare(changed(experiment, out=str(tmp_path / "other")))
    resume(other, load_file(tmp_path / "s"), run.state.record())
    assert same_tensors(other.state.tensors(), run.state.tensors())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epochs", [1, 2])
def test_divergence_is_an_error_that_says_where(
    tmp_path: Path, root: Path, method: str, epochs: int
) -> None:
    experiment = tiny(
        root,
        tmp_path / "run",
        method={"name": method},
        train={"lr": 1e30, "epochs": epochs, "momentum": 0.99, "weight_decay": 1e10},
    )
    with pytest.raises(FloatingPointError, match=r"task 1, epoch 1 .*train\.lr"):
        train(experiment, quiet=True)
    left = {p.name for p in (tmp_path / "run").iterdir()}
    begun = {"config.yaml", "classes.json", "environment.json", "metrics.jsonl", "checkpoints"}
    assert left <= begun
    left_behind = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert all(bool(tensor.isfinite().all()) for tensor in left_behind.tensors.values())


def test_weights_broken_by_the_very_last_step_are_found(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny(root, tmp_path / "run", method={"name": "seq_lora"}, train={"epochs": 1})
    run = prepare(experiment)
    step, steps = run.state.method.step, []

    def spoiling(*args: Any, **kwargs: Any) -> Any:
        done = step(*args, **kwargs)
        steps.append(done)
        if len(steps) == 3:  # 12 images in batches of 5: the last one
            with torch.no_grad():
                run.state.method.parameters()[0][0, 0] = float("nan")
        return done

    monkeypatch.setattr(run.state.method, "step", spoiling)
    with (
        pytest.raises(FloatingPointError, match=r"task 1, epoch 1 .*not finite"),
        Progress(3, quiet=True) as progress,
    ):
        run_task(run, 0, progress)
    assert len(steps) == 3


def test_activations_that_overflow_are_named(tmp_path: Path, root: Path) -> None:
    run = prepare(tiny(root, tmp_path / "run"))
    with torch.no_grad():
        run.state.model.get_parameter("patch_embed.proj.weight").mul_(1e38)
    with (
        pytest.raises(ValueError, match=r"inputs of .*blocks\.0\.attn\.qkv.*NaN or infinite"),
        Progress(3, quiet=True) as progress,
    ):
        run_task(run, 0, progress)


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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"rank": 17}}, r"rank 17 .*blocks\.0\.attn\.qkv"),
        ({"method": {"rank": 17, "name": "seq_lora"}}, r"rank 17 .*blocks\.0\.attn\.qkv"),
        ({"method": {"target": "*.nothing"}}, r"'\*\.nothing' matches no linear layer.*qkv"),
        ({"method": {"target": "*.nope", "name": "seq_lora"}}, "matches no linear layer.*qkv"),
        ({"data": {"image_size": 8, "resize": 8}}, r"8 by 8 pixels.*16 by 16.*data\.image_size"),
        ({"data": {"classes": 7}}, r"data\.classes is 7, but the data set has 6"),
        ({"data": {"init_cls": 7}}, r"data\.init_cls is 7"),
        ({"data": {"tasks": 4}}, r"data\.tasks is 4"),
        ({"device": "cuda"}, "device is cuda, but torch sees none"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_start(
    tmp_path: Path,
    root: Path,
    changes: dict[str, Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    experiment = tiny(root, tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=said):
        prepare(experiment)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_missing_or_do_not_fit_are_refused_at_the_start(
    tmp_path: Path, root: Path
) -> None:
    path = tmp_path / "w.safetensors"
    experiment = tiny(root, tmp_path / "run", backbone={"pretrained": True, "weights": str(path)})
    with pytest.raises(FileNotFoundError, match=r"w\.safetensors"):
        prepare(experiment)
    save_file({"cls_token": torch.zeros(1, 1, 16)}, path)
    with pytest.raises(ValueError, match=r"do not fit the model.*missing: "):
        prepare(experiment)
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_used_are_refused_at_the_start(tmp_path: Path) -> None:
    data = squares(tmp_path / "data", train=2, test=1)
    experiment = tiny(data, tmp_path / "run")
    (data / "train" / "red" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"red.0\.png"):
        prepare(experiment)
    (data / "train" / "red" / "0.png").unlink()
    (data / "test" / "grey" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"test: no images .*grey"):
        prepare(experiment)
    shutil.rmtree(data / "test")
    with pytest.raises(FileNotFoundError, match=r"expected ROOT/train/CLASS/IMAGE"):
        prepare(experiment)
    with pytest.raises(FileNotFoundError, match="no folder"):
        prepare(changed(experiment, data={"root": str(tmp_path / "none")}))
    assert not (tmp_path / "run").exists()


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


def test_the_table_and_the_folder_are_printed_whole(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = tmp_path / "run [red] with a rather long name so that it would be wrapped"
    data = {"init_cls": 1, "increment": 1}
    train(tiny(root, out, data=data, train={"epochs": 0}))
    printed = capsys.readouterr().out
    assert f"results: {out}\n" in printed
    assert f"figure:  {out / 'accuracy.png'}\n" in printed
    assert " ".join(f"task {n}" for n in range(1, 7)) in " ".join(printed.split())
    assert "task 6/6: accuracy over all classes so far" in printed
    train(tiny(root, out, data=data, train={"epochs": 0}, overwrite=True), quiet=True)
    assert capsys.readouterr().out == ""


def test_the_meter_weighs_batches_by_their_images() -> None:
    meter = Meter()
    assert meter.read() == {"loss": 0.0, "accuracy": 0.0}
    meter.add(torch.tensor(1.0), 3)
    meter.add(torch.tensor(5.0), 1)
    meter.count(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    assert meter.read() == {"loss": 2.0, "accuracy": 0.5}
