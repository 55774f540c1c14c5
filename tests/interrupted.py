"""Runs that are cut off, and what must be the same in the end."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from run_contents import events, untimed

from training.config import Experiment
from training.train import resume, train
from training.survival.saver import Saver


class CutOff(Exception):  # noqa: N818 - no error, an event
    """Stands for the end of the process."""


@contextmanager
def at_step(number: int, act: Callable[[], object]) -> Iterator[None]:
    """Do something right before a run looks whether to save itself after its ``number``-th step."""
    inside, done = Saver.inside_task, 0

    def counted(*arguments: Any, **settings: Any) -> bool:
        nonlocal done
        done += 1
        if done == number:
            act()
        return inside(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "inside_task", counted)
        yield


def stopped(experiment: Experiment, steps: int) -> Path:
    """The folder of a run that ends abruptly after so many steps, unsaved since the last time."""
    with at_step(steps, end), pytest.raises(CutOff):
        train(experiment, quiet=True)
    return Path(str(experiment.out))


def cut_off(experiment: Experiment, steps: Sequence[int]) -> Path:
    """Train, end abruptly after so many steps of each process, and go on to the end."""
    path = stopped(experiment, steps[0])
    for limit in steps[1:]:
        with at_step(limit, end), pytest.raises(CutOff):
            resume(path, quiet=True)
    return resume(path, quiet=True)


def end() -> None:
    """What `at_step` does to end a run."""
    raise CutOff


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves, times and memory aside: bytes of files, and parsed records."""
    found: dict[str, Any] = {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and (path.suffix == ".safetensors" or path.name == "classes.json")
    }
    found["metrics"] = [untimed(event) for event in events(run)]
    found["summary"] = untimed(json.loads((run / "summary.json").read_text()))
    return found


def differences(run: Path, wanted: Path) -> list[str]:
    """Names of what is not the same in two runs."""
    ours, theirs = outcome(run), outcome(wanted)
    return [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
