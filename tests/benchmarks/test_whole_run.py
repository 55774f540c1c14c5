"""Where the processor time of a whole run goes, and what keeps it from less: ``make bench``.

The first two tasks of the Caltech-101 run of ``caltech101.yaml`` on one thread, with the images
and weights that the reference was measured on; skipped where they are not at hand.
"""

import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torch.utils.flop_counter import FlopCounterMode
from turns import seconds

from backends.torch import gao
from training.config import load_experiment
from training.data.transforms import Transform
from training.methods import Method
from training.train import train

GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot",),
    "GELU": ("aten::gelu",),
    "layer norm": ("aten::native_layer_norm",),
    "sums and copies": ("aten::add", "aten::copy_", "aten::cat", "aten::mul", "aten::index"),
}


class Clock:
    """Processor seconds of functions while an outer one runs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.spent: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.running: list[str] = []

    def watch(self, name: str, owner: Any, attribute: str, *, inside: str | None = None) -> None:
        function = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if inside is not None and inside not in self.running:
                return function(*args, **kwargs)
            self.running.append(name)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[name] += time.process_time() - start
                self.calls[name] += 1
                self.running.pop()

        self.patch.setattr(owner, attribute, timed)


def run(shared: Path, out: Path, *changes: str) -> list[dict[str, Any]]:
    """Train and return the events of the tasks."""
    data = shared / "data"
    arguments = [
        "--config=caltech101",
        "--data.tasks=2",
        f"--data.root={data / 'caltech101'}",
        f"--backbone.weights={data / 'vit_cifar10.safetensors'}",
        "--device=cpu",
        "--threads=1",
        f"--out={out}",
        *changes,
    ]
    train(load_experiment(arguments), quiet=True)
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "task"]


def peak() -> float:
    """Floating-point operations a second of a large product in float32, at best."""
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(10))


def profiled(
    shared: Path, out: Path, patch: pytest.MonkeyPatch, *, first: int = 15, steps: int = 4
) -> tuple[float, dict[str, float]]:
    """Operations of the products of a step of the second task, and milliseconds by operator."""
    step, number = Method.step, 0
    flops, groups = 0.0, dict.fromkeys([*GROUPS, "all other operators"], 0.0)

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal number, flops
        number += 1
        if number == first:
            with FlopCounterMode(display=False) as counter:
                result = step(*args, **kwargs)
            flops = counter.get_total_flops()
            return result
        if not first < number <= first + steps:
            return step(*args, **kwargs)
        with profile(activities=[ProfilerActivity.CPU]) as events:
            result = step(*args, **kwargs)
        for event in events.key_averages():
            fitting = (group for group, keys in GROUPS.items() if event.key.startswith(keys))
            groups[next(fitting, "all other operators")] += event.self_cpu_time_total / 1e3 / steps
        return result

    patch.setattr(Method, "step", watched)
    run(shared, out, "--train.epochs=1", "--head.also=[]")
    return flops, groups


def table(title: str, parts: dict[str, float], unit: str) -> None:
    print(f"\n  {title}")
    whole = sum(parts.values())
    for name, value in parts.items():
        print(f"    {name:32} {value:8.2f} {unit} {100 * value / whole:5.1f} %")


def test_where_the_time_of_a_run_goes(
    shared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    clock = Clock(monkeypatch)
    with monkeypatch.context() as patch:
        clock.patch = patch
        patch.setattr("time.perf_counter", time.process_time)
        clock.watch("fit", sys.modules[train.__module__], "fit")
        clock.watch("step", Method, "step")
        clock.watch("loading, augmenting", _BaseDataLoaderIter, "__next__", inside="fit")
        clock.watch("loading, augmenting", Transform, "finish", inside="fit")
        clock.watch("backward", torch.autograd, "grad", inside="step")
        clock.watch("backward", torch.autograd, "backward", inside="step")
        clock.watch("optimiser", torch.optim.SGD, "step", inside="step")
        clock.watch("look-ahead", gao, "lookahead", inside="step")
        tasks = run(shared, tmp_path / "timed")
    spent = clock.spent
    inside = ("backward", "optimiser", "look-ahead")
    training = {
        "loading, augmenting": spent["loading, augmenting"],
        "forward, head, loss": spent["step"] - sum(spent[name] for name in inside),
        **{name: spent[name] for name in inside},
        "all else": spent["fit"] - spent["step"] - spent["loading, augmenting"],
    }
    flops, groups = profiled(shared, tmp_path / "profiled", monkeypatch)
    images = tasks[-1]["seconds"]
    best = peak()
    with capsys.disabled():
        table("the second task", images, "s")
        table("training, both tasks", training, "s")
        table("an aligned step by operator, on the wall clock", groups, "ms")
        print(
            f"  a step: {1e3 * spent['step'] / clock.calls['step']:.0f} ms; "
            f"{flops / 1e9:.2f} GFLOP in products, "
            f"{1e3 * flops / best:.0f} ms at the {best / 1e9:.0f} GFLOP/s of a product of 1024"
        )
    assert flops > 0
