"""The state of a run as tensors and a record: written, read, and gone on with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contents import same_tensors
from safetensors.torch import load_file, save_file
from small_runs import READOUTS, changed, finished, tiny

from training.config import read_experiment
from training.run_dir import read_json
from training.train import run_task
from training.logging import Progress
from training.train import prepare

METHODS = ("loda", "seq_lora", "frozen")
pytestmark = pytest.mark.usefixtures("no_figure")


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
    for kind, readout in second.state.readouts.classifiers.items():
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
