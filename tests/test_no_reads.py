"""The host never waits for the device inside a step, and cannot: it reads no value of it.

On the meta device tensors have no values, so whatever would read one raises. It stands in for a
GPU here; where there is one, torch itself watches for synchronisation.
"""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from tiny_models import inputs, vit
from torch import Tensor

from backends.torch import LoDA, LoDASettings
from backends.torch.readouts import CosineHeads
from training.config import TrainConfig
from training.loss import cosface
from training.metrics import Meter
from training.train import make_optimizer


def step_on(device: str, *, in_phases: bool = False) -> Callable[[], None]:
    """An aligned step as the training loop takes it, or in phases, with labels on the CPU."""
    model = vit()
    model.reset_classifier(0)
    loda = LoDA(model, LoDASettings(rank=3))
    images, labels = inputs(0, model)
    for _ in range(2):
        loda.begin_task([images])
        if loda.tasks == 0:
            loda.end_task([images])
    heads, meter = CosineHeads(12, [4]).to(device), Meter()
    model.to(device)
    pixels = images.to(device)
    optimizer = make_optimizer(
        TrainConfig(lr=0.1), [*loda.lora_parameters(), *heads.current.parameters()]
    )
    generator = torch.Generator().manual_seed(0)

    def loss(rows: Tensor) -> Tensor:
        cosines = heads.current(model(pixels[rows.to(device, non_blocking=True)]).float())
        wanted = labels[rows].to(device, non_blocking=True)
        meter.count(cosines, wanted)
        return cosface(cosines, wanted, scale=20.0, margin=0.1)

    def phases() -> None:
        halves = loda.halves(labels, optimizer, generator=generator)
        for half in halves:
            for part in half.source:
                (part.weight * loss(part.rows)).backward()
            half.look_ahead()
            for part in half.target:
                (part.weight * loss(part.rows)).backward()
            half.share()
            optimizer.step()
            half.restore()
        assert halves.steps == 2

    def step() -> None:
        found = loda.step(loss, labels, optimizer, radius=0.3, generator=generator)
        meter.add(found.loss, len(labels))
        assert found.steps == 2

    return phases if in_phases else step


@pytest.mark.parametrize("in_phases", [False, True])
def test_a_step_reads_no_value_of_the_device(
    in_phases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Autocast, which heads and loss switch off for themselves, does not know the meta device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    step = step_on("meta", in_phases=in_phases)
    for _ in range(2):  # the second finds the momentum of the first
        step()


def test_the_meta_device_would_tell() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(1, device="meta").item()
    with pytest.raises(NotImplementedError, match="meta"):
        torch.ones(1, device="meta").cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("in_phases", [False, True])
def test_a_step_never_waits_for_a_gpu(in_phases: bool) -> None:
    step = step_on("cuda", in_phases=in_phases)
    step()  # what only a first call does may wait
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
