"""Processor time of rival routes that take turns, so that a busy machine treats them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Routes = Mapping[str, Callable[[], Any]]


def seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def in_turn(routes: Routes, *, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every round of each route; what only first calls do is left out."""
    for _ in range(warm_up):
        for function in routes.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(rounds):
        for name, function in routes.items():
            times[name].append(seconds(function))
    return times


def ratio(times: Mapping[str, list[float]], above: str, below: str) -> float:
    """Ratio of the medians of two routes."""
    return statistics.median(times[above]) / statistics.median(times[below])
