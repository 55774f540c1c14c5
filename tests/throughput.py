"""Images a second, share of the matmul peak, memory and waiting, on any device.

For GPUs it is run by ``make bench`` (``test_gpu_speed.py``), with a tiny model on the CPU by a
test, so that what is written here runs where there is no GPU.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backends.torch import LoDA, LoDASettings
from backends.torch.solve import solve_bases

PRECISIONS = ("fp32", "tf32", "bf16")


@dataclass(frozen=True)
class Setting:
    """A model with random weights in its second task."""

    device: str = "cuda"
    model: str = "vit_base_patch16_224"
    image_size: int = 224
    batch: int = 48
    classes: int = 10
    rank: int = 16
    options: tuple[tuple[str, Any], ...] = ()

    def images(self, number: int | None = None) -> Tensor:
        size = (number or self.batch, 3, self.image_size, self.image_size)
        return torch.randn(size, device=self.device)

    def second_task(self) -> LoDA:
        torch.manual_seed(0)
        options = {"img_size": self.image_size, **dict(self.options)}
        model = timm.create_model(self.model, num_classes=self.classes, **options)
        loda = LoDA(
            model.to(self.device),
            LoDASettings(rank=self.rank, heldout=False),
            trainable=["head.*"],
            record_moments=True,
        )
        for _ in range(2):
            loda.begin_task([self.images()])
            if loda.tasks == 0:
                loda.end_task([self.images()])
        return loda


@contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """Products in float32, in TF32, or in bfloat16 by autocast."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    autocast: AbstractContextManager[Any] = nullcontext()
    if name == "bf16":
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16)
    try:
        with autocast:
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def finish(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], device: str, *, rounds: int) -> float:
    """Mean seconds of a call on the wall clock, until the device is done with all of them."""
    for _ in range(2):
        function()
    finish(device)
    start = time.perf_counter()
    for _ in range(rounds):
        function()
    finish(device)
    return (time.perf_counter() - start) / rounds


def peak(name: str, device: str, *, size: int, rounds: int) -> float:
    """Operations a second of a large square product in a precision."""
    a, b = torch.randn(2, size, size, device=device)
    with precision(name, device):
        return 2 * size**3 / seconds(lambda: a @ b, device, rounds=rounds)


def aligned(loda: LoDA, model: nn.Module, setting: Setting, name: str) -> Callable[..., None]:
    """A step of gradient-aligned training on images that lie on the device, or on given ones."""
    at_hand = setting.images()
    labels = torch.arange(setting.batch) % setting.classes  # halves of equal size: one graph
    optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=1e-4, momentum=0.9)
    generator = torch.Generator().manual_seed(0)

    def step(images: Tensor | None = None) -> None:
        pixels = at_hand if images is None else images

        def loss(rows: Tensor) -> Tensor:
            chosen = rows.to(setting.device, non_blocking=True)
            wanted = labels[rows].to(setting.device, non_blocking=True)
            with precision(name, setting.device):
                logits = model(pixels[chosen])
            return F.cross_entropy(logits.float(), wanted)

        # The backward pass is in the precision of products alone: autocast is for the forward one.
        with precision("tf32" if name == "tf32" else "fp32", setting.device):
            loda.step(loss, labels, optimizer, radius=0.1, generator=generator)

    loda.model.train()
    return step


def training(setting: Setting, name: str, *, compiled: bool, rounds: int) -> dict[str, float]:
    """Images a second, operations of the products a second, and bytes at most."""
    loda = setting.second_task()
    model: Any = torch.compile(loda.model) if compiled else loda.model
    with FlopCounterMode(display=False) as counter:
        aligned(loda, loda.model, setting, name)()
    step = aligned(loda, model, setting, name)
    if torch.device(setting.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = seconds(step, setting.device, rounds=rounds)
    found = {
        "images a second": setting.batch / took,
        "operations a second": counter.get_total_flops() / took,
    }
    if torch.device(setting.device).type == "cuda":
        found["peak bytes"] = torch.cuda.max_memory_allocated()
    return found


def evaluation(setting: Setting, name: str, *, compiled: bool, rounds: int) -> float:
    """Images a second without gradients, through the model between two tasks."""
    loda = setting.second_task()
    loda.abandon_task()
    images = setting.images()
    model: Any = torch.compile(loda.model.eval()) if compiled else loda.model.eval()

    def run() -> None:
        with torch.no_grad(), precision(name, setting.device):
            model(images)

    return setting.batch / seconds(run, setting.device, rounds=rounds)


def solves(setting: Setting, *, rounds: int) -> float:
    """Seconds of all solves at the start of a task, on the device."""
    loda = setting.second_task()
    state = loda.state_dict()
    new = {name: state[f"new/{name}"] for name in loda.layers}
    eps = torch.finfo(torch.float32).eps
    return seconds(
        lambda: solve_bases(loda.settings, new, loda.history, eps), setting.device, rounds=rounds
    )


def waiting(setting: Setting, name: str, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of the time for which training waits for a pipeline, by training without one.

    The batches are walked twice: worker processes are started in the first pass.
    """
    loda = setting.second_task()
    step = aligned(loda, loda.model, setting, name)
    images, number = setting.images(), 0
    fed = 0.0
    for _ in range(2):
        finish(setting.device)
        start, number = time.perf_counter(), 0
        for pixels, _labels in batches:
            if len(pixels) == setting.batch:  # the last one may be smaller
                step(pixels.to(setting.device, non_blocking=True))
                number += 1
        finish(setting.device)
        fed = time.perf_counter() - start
    alone = seconds(lambda: step(images), setting.device, rounds=number) * number
    return max(0.0, 1 - alone / fed)
