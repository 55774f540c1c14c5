"""A value that is not finite stops a run before it is saved, wherever it comes from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import at_step, differences
from small_runs import READOUTS, tiny

from training import fit, loop
from training.train import resume, run_task, train
from training.logging import Progress
from training.train import Run, prepare
from training.checkpoint import newest_checkpoint

pytestmark = pytest.mark.usefixtures("no_figure")


def everything(root: Path, out: Path) -> Any:
    keep = dict.fromkeys(("branches", "moments", "heads", "statistics"), True)
    head = {"also": list(READOUTS[1:]), "alignment_epochs": 1}
    return tiny(root, out, head=head, keep=keep, data={"tasks": 2})


_wholes: list[Path] = []


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    if not _wholes:
        out = tmp_path_factory.mktemp("whole") / "run"
        _wholes.append(train(everything(root, out), quiet=True))
    return _wholes[0]


def weight(run: Run) -> None:
    next(run.state.model.parameters()).data.view(-1)[3] = torch.inf


def history(run: Run) -> None:
    moments: Any = run.state.method
    next(iter(moments.loda.history.values())).total[0, 0] = torch.nan


def ridge(run: Run) -> None:
    for tensor in run.state.readouts.statistics["ridge"].state_dict().values():
        if tensor.is_floating_point():
            tensor.view(-1)[0] = torch.nan
            break


def head(run: Run) -> None:
    run.state.heads.current.weight.data[0, 0] = torch.nan


def aligned(run: Run) -> None:
    run.state.readouts.classifiers["alignment"].tensors()["weight"][0, 0] = torch.nan


def readout(run: Run) -> None:
    for tensor in run.state.readouts.classifiers["nearest_mean"].tensors().values():
        tensor.view(-1)[0] = torch.nan


@pytest.mark.parametrize("spoil", [weight, history, ridge, head, aligned, readout])
def test_what_a_task_leaves_is_looked_at_before_it_is_written(
    tmp_path: Path, root: Path, whole: Path, spoil: Callable[[Run], None]
) -> None:
    evaluate = loop.evaluate_task

    def spoilt(run: Run, task: int) -> None:
        evaluate(run, task)
        if task == 1:
            spoil(run)

    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate_task", spoilt)
        with pytest.raises(FloatingPointError, match=r"task 2 left values .* not finite in \w+"):
            train(everything(root, out), quiet=True)
    assert not (out / "tasks" / "001").exists()
    assert not (out / "model.safetensors").exists()
    newest = newest_checkpoint(out / "checkpoints")
    assert newest.record["run"]["tasks"] == 1
    assert all(bool(tensor.isfinite().all()) for tensor in newest.tensors.values())
    assert differences(resume(out, quiet=True), whole) == []


def test_a_model_whose_features_overflow_is_not_evaluated(tmp_path: Path, root: Path) -> None:
    update = loop.update_readouts

    def grown(run: Run, task: int) -> None:
        update(run, task)
        for parameter in run.state.model.parameters():
            parameter.data.mul_(1e30)  # finite, but its products are not

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "update_readouts", grown)
        with pytest.raises(FloatingPointError, match="features that are not finite"):
            train(tiny(root, tmp_path / "run", head={"readout": "heads"}), quiet=True)
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").record["run"]["tasks"] == 0


def test_the_state_of_the_optimiser_counts_too(tmp_path: Path, root: Path) -> None:
    make = fit.make_optimizer

    def overflowing(*arguments: Any) -> torch.optim.Optimizer:
        made = make(*arguments)
        first = made.param_groups[0]["params"][0]
        made.register_step_post_hook(
            lambda own, *_: own.state[first]["exp_avg_sq"].view(-1)[:1].fill_(torch.inf)
        )
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "make_optimizer", overflowing)
        settings = {"train": {"optimizer": "adam"}, "checkpoint": {"steps": 1}}
        experiment = tiny(root, tmp_path / "run", **settings)
        with pytest.raises(FloatingPointError, match="state of the optimiser is not"):
            train(experiment, quiet=True)
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest.record["open"] is None
    assert all(bool(tensor.isfinite().all()) for tensor in newest.tensors.values())


@pytest.mark.parametrize("method", ["loda", "seq_lora", "frozen"])
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


@pytest.mark.parametrize("gao", [True, False])
def test_a_run_that_diverges_does_not_finish_the_epoch(
    tmp_path: Path, root: Path, gao: bool
) -> None:
    experiment = tiny(
        root,
        tmp_path / "run",
        method={"gao": gao},
        train={"lr": 1e30, "batch_size": 1},  # an epoch of twelve steps
        checkpoint={"steps": 2},
    )
    with (
        at_step(7, lambda: pytest.fail("it trains on")),
        pytest.raises(FloatingPointError, match=r"task 1, epoch 1 .*train\.lr"),
    ):
        train(experiment, quiet=True)
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert all(bool(tensor.isfinite().all()) for tensor in newest.tensors.values())


@pytest.mark.parametrize("method", ["loda", "seq_lora", "inflora", "o_lora", "sd_lora"])
def test_every_method_stops_where_training_diverges(
    tmp_path: Path, root: Path, method: str
) -> None:
    out = tmp_path / "run"
    experiment = tiny(root, out, method={"name": method}, train={"lr": 1e30})
    with pytest.raises(FloatingPointError, match=r"in task 1, epoch \d"):
        train(experiment, quiet=True)
    newest = newest_checkpoint(out / "checkpoints")
    assert all(bool(tensor.isfinite().all()) for tensor in newest.tensors.values())
    assert not (out / "model.safetensors").exists()


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
