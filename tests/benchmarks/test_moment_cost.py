"""What second moments cost at width 3072, and the memory of a task: ``make bench``.

Times are processor time on one thread, of routes that take turns. Memory is counted in bytes of
live tensors, so that it does not depend on the machine.
"""

import statistics
from typing import Any

import pytest
import torch
from live_memory import LiveBytes
from torch import nn
from turns import in_turn, ratio

from backends.torch import LoDA, MomentCollector
from loda_math import Moments, combine, second_moment

WIDTH, TOKENS, ROUNDS = 3072, 394, 5  # tokens of two images of 224 px


def test_moments_cost_little_more_than_the_bare_product(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    collector = MomentCollector(nn.Sequential(nn.Linear(WIDTH, 1)), "0")
    sums: list[Moments] = [second_moment(x[:0], check=False)]

    def apart() -> None:
        sums[0] = combine(sums[0], second_moment(x, check=False))

    routes = {
        "bare product": lambda: x.mT @ x,
        "symmetric and added each time": apart,
        "added in place": lambda: collector._on_read("0", x),
    }
    times = in_turn(routes, rounds=ROUNDS)
    benchmark.pedantic(routes["added in place"], rounds=1)
    with capsys.disabled():
        print()
        for name, found in times.items():
            print(f"  {name:32} {1e3 * statistics.median(found):8.0f} ms")
        for name in ("symmetric and added each time", "added in place"):
            print(f"  {name}, to the bare product: {ratio(times, name, 'bare product'):.2f}")
    assert ratio(times, "added in place", "bare product") <= 1.5
    total, count = collector.moments["0"].total, collector.moments["0"].count
    torch.testing.assert_close(
        total / count, x.double().mT @ x.double() / TOKENS, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("outputs", [1, 3], ids=["square layers", "fused qkv"])
def test_memory_of_a_task(capsys: pytest.CaptureFixture[str], outputs: int) -> None:
    layers, width = 12, 768
    torch.manual_seed(0)
    blocks = []
    for _ in range(layers):
        blocks += [nn.Linear(width, outputs * width), nn.Unflatten(-1, (outputs, width)), Last()]
    model, batches = nn.Sequential(*blocks), [torch.randn(512, width) for _ in range(2)]
    history = layers * width**2 * 8
    with capsys.disabled():
        print(f"\n  peak memory in histories of float64, {outputs * width} outputs: begin, end")
    for options in ({}, {"moment_dtype": "float32"}, {"record_moments": True}):
        loda = LoDA(model, target="all-linear", rank=16, **options)  # type: ignore[arg-type]
        for _ in range(2):
            past = [moment.total for moment in loda.history.values()]
            with LiveBytes(past, [*model.parameters(), *batches]) as live:
                loda.begin_task(batches)
                begun, live.peak = live.peak, live.now
                loda.end_task(batches)
        with capsys.disabled():
            print(f"  {options or 'default'!s:32} {begun / history:.2f}, {live.peak / history:.2f}")
        if not options:
            # Beside history and moments there are the weights that a failure would put back.
            assert live.peak / history <= 2.6 + outputs / 2


class Last(nn.Module):
    """The last of several vectors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., -1, :]
