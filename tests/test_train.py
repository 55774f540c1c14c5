"""The training loop: refuses what cannot work, repeats itself, is true to its settings."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import at_step, differences
from PIL import Image
from run_contents import events, same_model, same_tensors, untimed
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from small_runs import (
    KEPT,
    READOUTS,
    changed,
    finished,
    flags,
    plain,
    small_vit,
    squares,
    tiny,
    tree,
)
from torch import nn
from torch.nn import functional

from backends.torch.readouts import Alignment, ClassStatistics, align_heads
from training.analysis.evaluate import evaluate_run
from training.checkpoint import Checkpoints, StopSignals, newest_checkpoint
from training.config import CheckpointConfig, Experiment, TrainConfig, read_experiment
from training.methods import METHODS
from training.metrics import AccuracyMatrix
from training.run_dir import read_json, task_folder
from training.seeds import derive
from training.train import Run, learning_rate, prepare, resume, run_to_end, save_in_task, train

NAMES = sorted(METHODS.paths)

# Set-up


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"rank": 17}}, r"17.*blocks\.0\.attn\.qkv"),
        ({"method": {"rank": 17, "name": "seq_lora"}}, r"17.*blocks\.0\.attn\.qkv"),
        ({"method": {"target": "*.nothing"}}, r"'\*\.nothing'.*qkv"),
        ({"method": {"target": "*.nope", "name": "seq_lora"}}, r"'\*\.nope'.*qkv"),
        ({"data": {"image_size": 8, "resize": 8}}, r"16 by 16.*data\.image_size"),
        ({"data": {"classes": 7}}, r"data\.classes"),
        ({"data": {"init_cls": 7}}, r"data\.init_cls"),
        ({"data": {"tasks": 4}}, r"data\.tasks"),
        ({"device": "cuda"}, "device is cuda"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_start(
    tmp_path: Path, root: Path, changes: dict[str, Any], said: str
) -> None:
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match=said):
        prepare(tiny(root, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_weights_that_are_missing_or_do_not_fit_are_refused_at_the_start(
    tmp_path: Path, root: Path
) -> None:
    path = tmp_path / "w.safetensors"
    experiment = tiny(root, tmp_path / "run", backbone={"pretrained": True, "weights": str(path)})
    with pytest.raises(FileNotFoundError, match=r"w\.safetensors"):
        prepare(experiment)
    save_file({"cls_token": torch.zeros(1, 1, 16)}, path)
    with pytest.raises(ValueError, match="missing: "):
        prepare(experiment)
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_used_are_refused_at_the_start(tmp_path: Path) -> None:
    data = squares(tmp_path / "data", train=2, test=1)
    experiment = tiny(data, tmp_path / "run")
    for number in range(2):
        (data / "train" / "red" / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"red.0\.png"):
        prepare(experiment)
    shutil.copy(data / "test" / "red" / "0.png", data / "train" / "red")
    (data / "train" / "red" / "1.png").unlink()
    (data / "test" / "grey" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"test.*grey"):
        prepare(experiment)
    shutil.rmtree(data / "test")
    with pytest.raises(ValueError, match="red has one"):
        prepare(experiment)
    with pytest.raises(FileNotFoundError, match="none"):
        prepare(changed(experiment, data={"root": str(tmp_path / "none")}))
    assert not (tmp_path / "run").exists()


def test_compiling_without_a_compiler_is_refused_at_the_start(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        prepare(tiny(root, tmp_path / "run", train={"compile": True}))
    assert not (tmp_path / "run").exists()


# Repeatable


def again(run: Path, out: Path, **changes: Any) -> Path:
    """The experiment of a run once more, with other settings."""
    experiment = read_experiment(run / "config.yaml")
    return train(changed(experiment, out=str(out), keep={"figure": False}, **changes), quiet=True)


@pytest.mark.parametrize("method", ["loda", "seq_lora", "frozen"])
def test_a_run_is_repeated_bit_for_bit(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, method: str
) -> None:
    run = finished(tmp_path_factory, method)
    torch.manual_seed(99)  # the global generator must not matter
    assert differences(again(run, tmp_path / "second"), run) == []


@pytest.mark.slow
@pytest.mark.gate
@pytest.mark.parametrize(("workers", "hash_seed"), [(2, 1), (0, 4711)])
def test_a_fresh_process_gives_the_same_bits(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, workers: int, hash_seed: int
) -> None:
    run = finished(tmp_path_factory)
    keep = [f"--keep.{name}=true" for name in KEPT]
    also = f"--head.also={list(READOUTS[1:])}".replace("'", '"')
    settings = [*flags(tiny(tree(tmp_path_factory), tmp_path / "run")), also, *keep]
    aligned = [f"--head.{name}.epochs=1" for name in ("alignment", "compensated")]
    settings += [*aligned, "--head.ridge.features=32"]
    # The order of sets and the like differs from one of these seeds to another.
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "training.cli", "train", f"--data.workers={workers}"]
    subprocess.run([*command, *settings], env=environment, check=True, capture_output=True)
    assert differences(tmp_path / "run", run) == []


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
        {"keep": dict.fromkeys((*KEPT, "state"), False)},
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
    second = train(
        changed(read_experiment(run / "config.yaml"), out=str(tmp_path / "second"), **changes),
        quiet=True,
    )
    assert same_model(run, second)
    ours, theirs = (read_json(folder / "summary.json")["counts"] for folder in (run, second))
    assert all(theirs[kind] == ours[kind] for kind in theirs)


@pytest.mark.parametrize("rate", [0.0, 0.3], ids=["plain", "drop-out"])
def test_the_callers_random_numbers_are_not_disturbed(
    tmp_path: Path, root: Path, rate: float
) -> None:
    experiment = with_dropout(tiny(root, tmp_path / "run", data={"tasks": 1}), rate)
    torch.manual_seed(5)
    legacy = np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must not change
    before = torch.get_rng_state()
    train(experiment, quiet=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == legacy).all()  # noqa: NPY002


def test_dropout_is_on_in_training_and_follows_the_seed(tmp_path: Path, root: Path) -> None:
    runs = []
    for name, rate in (("a", 0.3), ("b", 0.3), ("c", 0.0)):
        torch.manual_seed(len(runs))
        experiment = with_dropout(tiny(root, tmp_path / name, data={"tasks": 1}), rate)
        runs.append(train(experiment, quiet=True))
    assert same_model(runs[0], runs[1])
    assert not same_model(runs[0], runs[2])


def with_dropout(experiment: Experiment, rate: float) -> Experiment:
    options = experiment.backbone.options["options"]
    return changed(experiment, backbone={"options": {**options, "proj_drop_rate": rate}})


# Test images


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
    files = ("readouts", *(f"tasks/003/{name}" for name in ("moments", "heads")))
    for name in files:
        ours, theirs = (folder / f"{name}.safetensors" for folder in (run, poisoned))
        assert ours.read_bytes() == theirs.read_bytes()
    logs = [[untimed(event) for event in events(folder)] for folder in (run, poisoned)]
    trained = [[event for event in log if event["event"] == "epoch"] for log in logs]
    assert trained[0] == trained[1]
    assert logs[0] != logs[1]  # the accuracies do change: the images were read


def test_a_run_on_held_out_images_never_opens_the_test_split(tmp_path: Path, root: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "data")
    data = {"validation": 0.34}
    whole = train(tiny(copy, tmp_path / "a", data=data), quiet=True)
    shutil.rmtree(copy / "test")
    without = train(tiny(copy, tmp_path / "b", data=data), quiet=True)
    assert differences(whole, without) == []
    last = [event for event in events(without) if event["event"] == "task"][-1]
    assert last["counts"]["nearest_mean"][1] == [2] * 6


# Settings


def test_the_learning_rate_of_an_epoch() -> None:
    rates = [learning_rate(TrainConfig(epochs=4, lr=0.2), epoch) for epoch in range(4)]
    assert rates == pytest.approx([0.1 * (1 + np.cos(np.pi * e / 4)) for e in range(4)])
    assert learning_rate(TrainConfig(epochs=4, lr=0.2, schedule="constant"), 3) == 0.2


def test_no_epochs_keep_model_and_heads_as_they_start(tmp_path: Path, root: Path) -> None:
    run = prepare(tiny(root, tmp_path / "run", train={"epochs": 0}, head={"readout": "heads"}))
    start = {name: weight.clone() for name, weight in run.state.model.state_dict().items()}
    path = run_to_end(run, quiet=True)
    assert same_tensors(load_file(path / "model.safetensors"), start)
    heads = load_file(path / "readouts.safetensors")["heads/weight"]
    torch.testing.assert_close(heads.norm(dim=1), torch.ones(6))


def test_head_starts_differ(tmp_path: Path, root: Path) -> None:
    last = []
    for start in ("random", "class_mean"):
        head = {"readout": "heads", "start": start}
        folder = train(tiny(root, tmp_path / start, train={"epochs": 0}, head=head), quiet=True)
        last.append(read_json(folder / "summary.json")["readouts"]["heads"]["last"])
    # Class means of untrained features tell these colours apart; random directions do not.
    assert last[1] > 0.8 > last[0]


def test_the_logged_loss_has_scale_and_margin(tmp_path: Path, root: Path) -> None:
    settings: dict[str, Any] = {
        "method": {"name": "frozen"},
        "data": {"train_crop": "none", "flip": False, "tasks": 1},
        "train": {"epochs": 1, "lr": 1e-12},
        "keep": {"heads": True},
    }
    scale, margin = 7.0, 0.3
    run = train(
        tiny(root, tmp_path / "run", head={"scale": scale, "margin": margin}, **settings),
        quiet=True,
    )
    ((_, weight),) = load_file(task_folder(run, 1) / "heads.safetensors").items()
    model, losses = small_vit().eval(), []
    model.load_state_dict(load_file(run / "model.safetensors"))
    for label, name in enumerate(read_json(run / "classes.json")["class_names"][: len(weight)]):
        for path in sorted((root / "train" / name).iterdir()):
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
            with torch.no_grad():
                feature = model(pixels[None])[0]
            cosines = functional.cosine_similarity(feature[None], weight, dim=1)
            cosines[label] -= margin
            losses.append(functional.cross_entropy(scale * cosines, torch.tensor(label)))
    (epoch,) = (event for event in events(run) if event["event"] == "epoch")
    assert epoch["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_alignment_follows_its_settings_from_task_to_task(tmp_path: Path, root: Path) -> None:
    own = {"epochs": 2, "temperature": 0.7, "lr": 0.05, "covariance": 0.02}
    head = {"readout": "alignment", "alignment": own}
    keep = {"heads": True, "statistics": True}
    run = train(tiny(root, tmp_path / "run", head=head, keep=keep), quiet=True)
    aligned = torch.empty(0, 16)
    for task in range(3):
        folder = task_folder(run, task + 1)
        start = torch.cat(list(load_file(folder / "heads.safetensors").values()))
        start[: len(aligned)] = aligned  # old classes start where the last alignment left them
        statistics = ClassStatistics()
        statistics.load_state_dict(load_file(folder / "statistics.safetensors"))
        generator = torch.Generator().manual_seed(derive(1993, task, "alignment"))
        aligned = align_heads(statistics, Alignment(**own), generator=generator, weight=start)  # type: ignore[arg-type]
    stored = load_file(run / "readouts.safetensors")["alignment/weight"]
    torch.testing.assert_close(stored, aligned)


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
    settings: dict[str, Any] = {
        "method": {"name": "frozen"},
        "data": {"tasks": 2},
        "backbone": {"name": "test_byobnet", "options": {}},
    }
    run = prepare(tiny(root, tmp_path / "run", **settings))
    start = {name: weight.clone() for name, weight in run.state.model.state_dict().items()}
    assert any("running_mean" in name for name in start)
    assert same_tensors(load_file(run_to_end(run, quiet=True) / "model.safetensors"), start)


def test_the_digits_are_learned(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data": {"tasks": 2}, "head": {"readout": "nearest_mean"}}
    changes |= {"train": {"epochs": 1}, "keep": {"figure": False}, "device": "cpu"}
    run = train(changed(Experiment(out=str(tmp_path / "run")), **changes), quiet=True)
    assert read_json(run / "summary.json")["readouts"]["nearest_mean"]["last"] > 0.8


@pytest.mark.slow
@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="torch.compile needs a C++ compiler, and there is none here",
)
# What torch's own compiler warns of is not ours.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_a_run_may_train_through_the_compiled_model(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, compile_it = [], torch.compile

    def counted(model: nn.Module, **settings: bool) -> object:
        compiled.append(model)
        return compile_it(model, **settings)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", counted)
    expected = load_file(plain(tmp_path_factory) / "model.safetensors")
    experiment = tiny(tree(tmp_path_factory), tmp_path / "quick", train={"compile": True})
    weights = load_file(train(experiment, quiet=True) / "model.safetensors")
    assert len(compiled) == 3
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


# Unequal tasks

SIZES = [3, 1, 2]


@pytest.mark.parametrize("method", [name for name in NAMES if name != "joint"])  # has one task
def test_a_run_with_unequal_tasks(tmp_path_factory: pytest.TempPathFactory, method: str) -> None:
    run = finished(tmp_path_factory, method, data={"task_sizes": SIZES}, keep={"figure": False})
    assert read_json(run / "classes.json")["tasks"] == [[0, 1, 2], [3], [4, 5]]
    summary = read_json(run / "summary.json")
    assert set(summary["readouts"]) == set(READOUTS)
    for kind, result in evaluate_run(run).items():
        counts = summary["counts"][kind]
        assert [len(row) for row in counts["total"]] == [3, 4, 6]
        assert result.correct == counts["correct"][-1]
        assert len(result.by_task) == 3
        assert summary["readouts"][kind]["last"] == pytest.approx(result.accuracy)
        # Means are over images and over tasks, not over tasks of the same size.
        curve = [sum(c) / sum(t) for c, t in zip(counts["correct"], counts["total"], strict=True)]
        assert summary["readouts"][kind]["average"] == pytest.approx(sum(curve) / 3)


def test_a_stream_of_unequal_tasks_can_be_cut(tmp_path_factory: pytest.TempPathFactory) -> None:
    data = {"task_sizes": SIZES}
    whole = finished(tmp_path_factory, "loda", data=data, keep={"figure": False})
    run = plain(tmp_path_factory, data={**data, "tasks": 2})
    cut, full = (read_json(folder / "summary.json")["counts"] for folder in (run, whole))
    # What is cut off changes nothing of what came before.
    assert cut["nearest_mean"]["correct"] == full["nearest_mean"]["correct"][:2]


# What the log says of the layers

LAYERS = ("blocks.0.attn.qkv", "blocks.1.attn.qkv")


@pytest.fixture(scope="module")
def faded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose history fades."""
    method = {"heldout": True, "history_decay": 0.5}
    keep = {"moments": True, "branches": True}
    return plain(tmp_path_factory, method=method, keep=keep)


def kept(run: Path, task: int, name: str) -> dict[str, np.ndarray]:
    return load_arrays(task_folder(run, task) / f"{name}.safetensors")


def history(run: Path, task: int, layer: str) -> np.ndarray:
    moments = [kept(run, past, "moments")[f"merged/{layer}"] for past in range(1, task)]
    return sum((0.5 ** (task - 2 - age) * m for age, m in enumerate(moments)), np.zeros(()))


def layers(run: Path) -> list[dict[str, Any] | None]:
    """The diagnostics of every task."""
    return [event.get("layers") for event in events(run) if event["event"] == "task"]


def energy(update: np.ndarray, moment: np.ndarray) -> float:
    return float(np.trace(update @ moment @ update.T))


def test_the_log_holds_the_effect_of_every_merge(faded: Path) -> None:
    first, *later = layers(faded)
    assert first is None
    for task, logged in enumerate(later, start=2):
        assert logged is not None
        assert tuple(logged) == LAYERS
        branches, moments = kept(faded, task, "branches"), kept(faded, task, "moments")
        for layer in LAYERS:
            ups = {
                branch: weight * branches[f"up/{branch}/{layer}"].astype(float)
                for branch, weight in (("general", 0.25), ("isolated", 0.5))
            }
            downs = {b: branches[f"down/{b}/{layer}"].astype(float) for b in ups}
            middle = branches[f"coefficients/{layer}"]
            isolated = ups["isolated"] @ downs["isolated"]
            whole = ups["general"] @ downs["general"] + isolated
            merged = ups["general"] @ middle @ downs["general"] + isolated
            old = history(faded, task, layer) / sum(0.5**age for age in range(task - 1))
            new = moments[f"trained/{layer}"]
            assert logged[layer]["effect"] == pytest.approx(
                {
                    "old_change": energy(merged, old),
                    "old_change_before": energy(whole, old),
                    "new_loss": energy(whole - merged, new),
                    "new_change": energy(whole, new),
                },
                rel=1e-6,
            )


def test_the_log_holds_what_the_directions_keep_held_out(
    faded: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for logged in layers(faded)[1:]:
        assert logged is not None
        for layer in LAYERS:
            ratios = logged[layer]["heldout"]
            assert list(ratios) == ["general", "isolated"]
            assert all(0 < ratio["energy"] <= 1 for ratio in ratios.values())
            assert ratios["isolated"]["chosen"] > ratios["general"]["chosen"]
    settings = {"method": {"heldout": False}, "data": {"tasks": 2}, "train": {"epochs": 0}}
    first, second = layers(plain(tmp_path_factory, **settings))
    assert first is None
    assert second is not None
    assert all(set(layer) == {"effect"} for layer in second.values())
    assert layers(finished(tmp_path_factory, "seq_lora")) == [None] * 3


def test_the_log_says_how_long_training_waited_for_images(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny(root, tmp_path / "run", data={"tasks": 2, "cache": False})
    clock, decode, decoded = time.perf_counter, Image.open, []

    def slowly(*arguments: Any, **settings: Any) -> Any:
        decoded.append(arguments)
        return decode(*arguments, **settings)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 100 * len(decoded))  # 100 s each
    monkeypatch.setattr(Image, "open", slowly)
    start = time.perf_counter()
    run = prepare(experiment)
    tasks = [event for event in events(run_to_end(run, quiet=True)) if event["event"] == "task"]
    images = read_json(tmp_path / "run" / "classes.json")["images"]
    for task, count in zip(tasks, images, strict=True):
        assert task["seconds"]["load"] >= 100 * experiment.train.epochs * count
        assert task["seconds"]["train"] > 0
    assert sum(sum(task["seconds"].values()) for task in tasks) <= time.perf_counter() - start


# Values that are not finite


def everything(root: Path, out: Path) -> Experiment:
    head = {"also": list(READOUTS[1:]), "alignment.epochs": 1, "compensated.epochs": 1}
    return tiny(root, out, head=head, keep=dict.fromkeys(KEPT, True), data={"tasks": 2})


def weight(run: Run) -> None:
    next(run.state.model.parameters()).data.view(-1)[3] = torch.inf


def past_moments(run: Run) -> None:
    method: Any = run.state.method
    next(iter(method.loda.history.values())).total[0, 0] = torch.nan


def ridge(run: Run) -> None:
    run.state.readouts.statistics["ridge"].state_dict()["gram"][0, 0] = torch.nan


def head(run: Run) -> None:
    run.state.heads.current.weight.data[0, 0] = torch.nan


def aligned(run: Run) -> None:
    run.state.readouts.classifiers["alignment"].tensors()["weight"][0, 0] = torch.nan


def nearest_mean(run: Run) -> None:
    run.state.readouts.classifiers["nearest_mean"].tensors()["weight"][0, 0] = torch.nan


class AfterTask(dict[str, AccuracyMatrix]):
    """Accuracies that do something when those of the second task come, the last of its results."""

    def __init__(self, accuracies: dict[str, AccuracyMatrix], act: Callable[[], None]) -> None:
        super().__init__(accuracies)
        self.act = act

    def __setitem__(self, name: str, matrix: AccuracyMatrix) -> None:
        super().__setitem__(name, matrix)
        if len(matrix) == 2:
            self.act()


@pytest.mark.parametrize("spoil", [weight, past_moments, ridge, head, aligned, nearest_mean])
def test_what_a_task_leaves_is_looked_at_before_it_is_written(
    tmp_path: Path, root: Path, spoil: Callable[[Run], None]
) -> None:
    run = prepare(everything(root, tmp_path / "run"))
    run.state.task_given = AfterTask(run.state.task_given, lambda: spoil(run))
    with pytest.raises(FloatingPointError, match=r"task 2 left values .* not finite in \w+"):
        run_to_end(run, quiet=True)
    out = tmp_path / "run"
    assert not (out / "tasks" / "002").exists()
    assert not (out / "model.safetensors").exists()
    newest = newest_checkpoint(out)
    assert newest.record["tasks"] == 1
    assert all(bool(tensor.isfinite().all()) for tensor in newest.tensors.values())
    if spoil is weight:
        whole = train(everything(root, tmp_path / "whole"), quiet=True)
        assert differences(resume(out, quiet=True), whole) == []


def test_a_model_whose_features_overflow_is_not_evaluated(tmp_path: Path, root: Path) -> None:
    run = prepare(tiny(root, tmp_path / "run", head={"readout": "heads"}))
    fit = run.state.readouts.fit

    def grown(*arguments: Any) -> Any:
        if run.state.tasks:  # in the second task: nothing is kept of a first one that fails
            for parameter in run.state.model.parameters():
                parameter.data.mul_(1e30)  # finite, but its products are not
        return fit(*arguments)

    run.state.readouts.fit = grown  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="features"):
        run_to_end(run, quiet=True)
    assert newest_checkpoint(tmp_path / "run").record["tasks"] == 1


def test_the_state_of_the_optimiser_counts_too(tmp_path: Path, root: Path) -> None:
    def overflow(run: Run) -> None:
        assert run.state.open is not None
        if not run.state.tasks:  # nothing is kept of a first task that fails
            return
        for values in run.state.open.optimizer.state.values():
            values["exp_avg_sq"].view(-1)[:1].fill_(torch.inf)

    settings = {"train": {"optimizer": "adam"}, "checkpoint": {"steps": 1}}
    run = prepare(tiny(root, tmp_path / "run", **settings))
    run.on_step = overflow
    with pytest.raises(FloatingPointError, match="optimiser"):
        run_to_end(run, quiet=True)
    newest = newest_checkpoint(tmp_path / "run")
    assert (newest.record["tasks"], newest.record["open"]) == (1, None)
    assert all(bool(tensor.isfinite().all()) for tensor in newest.tensors.values())


@pytest.mark.parametrize("method", ["loda", "seq_lora", "inflora", "o_lora", "sd_lora", "frozen"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_divergence_is_an_error_that_says_where(
    tmp_path: Path, root: Path, method: str, epochs: int
) -> None:
    own = {"lr": 1e30, "epochs": epochs, "momentum": 0.99, "weight_decay": 1e10}
    with pytest.raises(FloatingPointError, match=r"task 1, epoch 1 .*train\.lr"):
        train(tiny(root, tmp_path / "run", method={"name": method}, train=own), quiet=True)
    assert not (tmp_path / "run").exists()  # nothing was learned: the next try is not blocked


@pytest.mark.parametrize("gao", [True, False])
def test_a_run_that_diverges_does_not_finish_the_epoch(
    tmp_path: Path, root: Path, gao: bool
) -> None:
    settings: dict[str, Any] = {
        "method": {"gao": gao},
        "train": {"lr": 1e30, "batch_size": 1},  # an epoch of twelve steps
        "checkpoint": {"steps": 2},
    }
    run = prepare(tiny(root, tmp_path / "run", **settings))
    run.on_step = at_step(7, lambda: pytest.fail("it trains on"))
    with pytest.raises(FloatingPointError, match=r"task 1, epoch 1 .*train\.lr"):
        run_to_end(run, quiet=True)


def test_weights_broken_by_the_very_last_step_are_found(tmp_path: Path, root: Path) -> None:
    def spoil() -> None:
        with torch.no_grad():
            run.state.method.parameters()[0][0, 0] = torch.nan

    settings = {"method": {"name": "seq_lora"}, "train": {"epochs": 1}}
    run = prepare(tiny(root, tmp_path / "run", **settings))
    run.on_step = at_step(3, spoil)  # 12 images in batches of 5: the last one
    with pytest.raises(FloatingPointError, match=r"task 1, epoch 1 .*not finite"):
        run_to_end(run, quiet=True)


def test_activations_that_overflow_are_named(tmp_path: Path, root: Path) -> None:
    run = prepare(tiny(root, tmp_path / "run"))
    with torch.no_grad():
        run.state.model.get_parameter("patch_embed.proj.weight").mul_(1e38)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv"):
        run_to_end(run, quiet=True)


# When a run is looked at to be saved


def looks(said: int, config: CheckpointConfig, steps: int) -> int:
    """How often one of two processes looks at a task that cannot be saved while it is open.

    What the other one says is given.
    """
    seen: list[int] = []
    answers = cycle([said, 0])  # it is time or not, and no signal came
    position: Any = SimpleNamespace(is_finite=lambda: seen.append(0) or True)
    run: Any = SimpleNamespace(
        processes=SimpleNamespace(maximum=lambda own: max(own, next(answers))),
        checkpoints=Checkpoints(Path(), config, ""),
        stop=StopSignals(),
        state=SimpleNamespace(method=SimpleNamespace(saves_open_task=False)),
    )
    for _ in range(steps):
        save_in_task(run, 0, position, last=False)
    return len(seen)


@pytest.mark.parametrize("due", [0, 1])
def test_all_processes_look_when_it_is_time_for_one(due: int) -> None:
    # Clocks differ: were each to ask its own, one could stop a run that the others go on with.
    assert looks(due, CheckpointConfig(steps=None, minutes=None), steps=3) == 3 * due


def test_what_cannot_be_saved_is_not_looked_at_every_step() -> None:
    assert looks(0, CheckpointConfig(steps=2, minutes=None), steps=7) == 3
