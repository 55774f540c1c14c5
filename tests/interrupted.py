"""Runs that are cut off, and what must be the same in the end."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from run_contents import events, untimed

from training.checkpoint import read_checkpoint
from training.config import Experiment, begun_experiment
from training.train import Run, prepare, run_to_end


class CutOff(Exception):  # noqa: N818 - no error, an event
    """Stands for the end of the process."""


def end() -> NoReturn:
    """End a run at once."""
    raise CutOff


def at_step(number: int, act: Callable[[], object]) -> Callable[[Run], None]:
    """For `Run.on_step`: do something once, right before a run may be saved after its step."""
    steps = iter(range(1, number + 1))

    def counted(run: Run) -> None:
        if next(steps, None) == number:
            act()

    return counted


def stopped(experiment: Experiment, steps: int) -> Path:
    """The folder of a run that ends abruptly after so many steps, unsaved since the last time."""
    run = prepare(experiment)
    cut(run, steps)
    return run.folder.path


def go_on(path: Path, steps: int) -> None:
    """Resume a run and end it abruptly after so many steps."""
    cut(prepare(begun_experiment(path), resume_from=path), steps)


def cut(run: Run, steps: int) -> None:
    """End a run abruptly after so many steps."""
    run.on_step = at_step(steps, end)
    with pytest.raises(CutOff):
        run_to_end(run, quiet=True)


def cut_off(experiment: Experiment, steps: Sequence[int]) -> Path:
    """Train, end abruptly after so many steps of each process, and go on to the end."""
    path = stopped(experiment, steps[0])
    for limit in steps[1:]:
        go_on(path, limit)
    return run_to_end(prepare(begun_experiment(path), resume_from=path), quiet=True)


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves, times and memory aside: bytes of files, and parsed records."""
    left: dict[str, Any] = {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and (path.suffix == ".safetensors" or path.name == "classes.json")
    }
    if left.pop("state.safetensors", None) is not None:  # the log in it has times
        state = read_checkpoint(run / "state.safetensors")
        left |= {f"state {k}": (t.dtype, t.tolist()) for k, t in state.tensors.items()}
        record = {**untimed(state.record), "tensors": list(state.tensors)}
        left["state"] = {key: value for key, value in record.items() if key != "identity"}
    # Of a process that goes on the log says where it runs.
    logged = [untimed(event) for event in events(run) if event["event"] != "resumed"]
    left["metrics"] = logged
    left["summary"] = untimed(json.loads((run / "summary.json").read_text()))
    return left


def differences(run: Path, wanted: Path) -> list[str]:
    """Names of what is not the same in two runs."""
    ours, theirs = outcome(run), outcome(wanted)
    return [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
