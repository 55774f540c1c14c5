"""When a run is saved inside a task, and when it is looked at."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from training.config import CheckpointConfig
from training.survival.saver import Saver


class Others:
    """The second of two processes; what the first one says is given."""

    writes, count = False, 2

    def __init__(self, said: int) -> None:
        self.said = said

    def largest(self, number: int) -> int:
        return max(number, self.said)


def watched(said: int, config: CheckpointConfig) -> tuple[Saver, Any, list[int]]:
    """A saver of a method that cannot be saved inside a task, a position, and looks at it."""
    seen: list[int] = []
    position: Any = SimpleNamespace(sound=lambda: seen.append(0) or True)
    state: Any = SimpleNamespace(method=object())
    parts: Any = (SimpleNamespace(path=None), state, "this run", Others(said))
    return Saver(config, *parts), position, seen


def looks(said: int, config: CheckpointConfig, steps: int) -> int:
    """How often a saver looks at the position of a method that cannot be saved inside a task."""
    saver, position, seen = watched(said, config)
    for _ in range(steps):
        assert saver.inside_task(SimpleNamespace(), position, {})  # type: ignore[arg-type]
    return len(seen)


@pytest.mark.parametrize("due", [0, 1])
def test_all_processes_look_when_it_is_time_for_one(due: int) -> None:
    # Clocks differ: were each to ask its own, one could stop a run that the others go on with.
    assert looks(due, CheckpointConfig(steps=None, minutes=None), steps=3) == 3 * due


@pytest.mark.parametrize(("age", "minutes", "due"), [(70, 5, 1), (50, 5, 0), (70, None, 0)])
def test_a_task_is_saved_after_its_last_step_if_there_is_much_to_lose(
    age: float, minutes: float | None, due: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now)
    saver, position, seen = watched(0, CheckpointConfig(minutes=minutes))
    now += age
    for last in (False, True):
        saver.inside_task(SimpleNamespace(), position, {}, last=last)  # type: ignore[arg-type]
        assert len(seen) == due * last


def test_what_cannot_be_saved_is_not_looked_at_every_step() -> None:
    assert looks(0, CheckpointConfig(steps=2, minutes=None), steps=7) == 3
