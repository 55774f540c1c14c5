"""The state of a run: written, read into a fresh run, and gone on with to the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import differences, stopped
from run_contents import same_tensors
from safetensors.torch import load, load_file, save
from small_runs import READOUTS, changed, finished, plain, tiny
from torch import nn

from training.checkpoint import newest_checkpoint, read_final_state
from training.config import begun_experiment, read_experiment
from training.run_dir import read_json
from training.state import OpenTask
from training.train import Run, make_optimizer, prepare, run_to_end


def through_a_file(run: Run) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and record of a run as a file gives them back."""
    tensors = run.state.tensors()
    content = save({name: tensor.clone().contiguous() for name, tensor in tensors.items()})
    back = load(content)
    return {name: back[name] for name in tensors}, json.loads(json.dumps(run.state.record()))


def load_into(run: Run, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    train = run.experiment.train
    run.state.load(tensors, record, lambda trained: make_optimizer(train, trained))


@pytest.mark.parametrize(
    ("method", "done"), [("loda", 0), ("loda", 1), ("loda", 2), ("seq_lora", 1), ("frozen", 2)]
)
def test_the_state_carries_a_run_over_bit_for_bit(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, method: str, done: int
) -> None:
    whole = finished(tmp_path_factory, method)
    experiment = read_experiment(whole / "config.yaml")
    first = prepare(changed(experiment, out=str(tmp_path / "first")))
    first.stream.tasks[done:] = []  # it ends there
    if done:
        run_to_end(first, quiet=True)
    # Whatever the weights of the fresh run are, the state replaces them.
    second = prepare(changed(experiment, out=str(tmp_path / "second")))
    with torch.no_grad():
        for parameter in second.state.model.parameters():
            parameter.add_(1.0)
    before = torch.get_rng_state()
    load_into(second, *through_a_file(first))
    assert torch.equal(torch.get_rng_state(), before)
    assert second.state.tasks == done
    assert same_tensors(second.state.tensors(), first.state.tensors())
    run_to_end(second, quiet=True)
    expected = {*(whole / name for name in ("model.safetensors", "readouts.safetensors"))}
    for path in expected:
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()
    counts = read_json(whole / "summary.json")["counts"]
    assert {name: m.to_dict() for name, m in second.state.accuracy.items()} == counts


def test_an_open_task_is_part_of_it(tmp_path: Path, root: Path) -> None:
    settings = {"head": {"also": list(READOUTS[1:])}, "checkpoint": {"steps": 2}}
    path = stopped(tiny(root, tmp_path / "run", **settings), 9)
    checkpoint = newest_checkpoint(path)
    assert (checkpoint.record["tasks"], checkpoint.record["open"]["batch"]) == (1, 2)
    resumed = prepare(begun_experiment(path), resume_from=path)
    at = resumed.state.open
    assert at is not None
    assert (at.epoch, at.batch, len(resumed.state.trainable)) == (0, 2, 2)
    # Torch's own generators are not touched before training goes on.
    drawn = {f"open/generators/{name}": tensor for name, tensor in at.resumed.items()}
    assert same_tensors(resumed.state.tensors() | drawn, checkpoint.tensors)


def stepped(rate: float = 0.1) -> OpenTask:
    """A task after one step on two tensors."""
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, 2))]
    at = OpenTask(torch.optim.SGD(weights, lr=rate, momentum=0.9), torch.Generator())
    sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]
    at.optimizer.step()
    at.batch = 1
    return at


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("optimizer/1/momentum_buffer", torch.zeros(1, 4)),
        ("optimizer/0/momentum_buffer", torch.zeros(3)),
    ],
)
def test_an_optimiser_of_other_tensors_is_refused(name: str, tensor: torch.Tensor) -> None:
    at = stepped()
    fresh = stepped()
    fresh.load(at.tensors(), at.record())
    assert same_tensors(fresh.tensors(), at.tensors())
    with pytest.raises(ValueError, match="shape"):
        fresh.load({**at.tensors(), name: tensor}, at.record())


def test_a_run_goes_on_where_there_are_fewer_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    was, state = stepped(), torch.zeros(16, dtype=torch.uint8)
    tensors = {**was.tensors(), "generators/0": state, "generators/1": state + 1}
    for there in range(3):
        with monkeypatch.context() as patch:
            taken: dict[int, int] = {}
            patch.setattr(torch.cuda, "device_count", lambda there=there: there)
            patch.setattr(
                torch.cuda, "set_rng_state", lambda x, n, taken=taken: taken.update({n: int(x[0])})
            )
            at = stepped()
            at.load(tensors, was.record())
            at.restore_generators()
        assert taken == {n: n for n in range(there)}


def test_the_state_of_a_finished_run_is_the_start_of_a_later_task(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, root: Path
) -> None:
    short = plain(tmp_path_factory, data={"tasks": 2})
    state = read_final_state(short)
    assert (state.record["tasks"], state.record["open"]) == (2, None)
    *told, size = (short / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert state.metrics == b"".join(told)
    # The weights of the model are not in its file once more.
    assert json.loads(size)["bytes"] < (short / "state.safetensors").stat().st_size
    assert not any(x.startswith("model/") for x in load_file(short / "state.safetensors"))
    longer = prepare(tiny(root, tmp_path / "longer"))
    load_into(longer, state.tensors, state.record)
    longer.folder.restore_log(state.metrics)
    assert differences(run_to_end(longer, quiet=True), plain(tmp_path_factory)) == []
