"""Real processes of ``torch.distributed`` that train one tiny model with LoDA, or one alone."""

import multiprocessing
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from tiny_models import MLP, mlp
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from backends.torch import (
    LoDA,
    collect_moments,
    gradient_aligned_step,
    plain_step,
    unshared,
)
from backends.torch.distributed import copy_from_first

ROWS = 20
PARTS = [range(6), range(6, ROWS)]
# The first process holds only one class, and so never a row of the other half.
LABELS = torch.tensor([0] * 6 + [0, 1, 2, 3, 1, 2, 3] * 2)
OPTIONS = ("static_graph", "find_unused_parameters")
"""Of DistributedDataParallel."""
WRAPS: dict[str, dict[str, bool]] = {
    "bare": {},
    **{
        f"{option} {when}": {option: True} if option in OPTIONS else {}
        for option in ("wrapped", *OPTIONS)
        for when in ("in the task", "before")
    },
}
TAKES = ("step", "phases", "window", "number")
STEPS = 2


def images(task: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 + task)
    scale = torch.rand(6, generator=generator).double() ** 3 * 3
    return torch.randn(ROWS, 6, generator=generator).double() * scale


def learn(wrap: str, take: str, rows: range, rank: int) -> dict[str, Tensor]:
    """Two tasks on the given rows; the model's tensors, the history and the losses."""
    # Weights and draws differ by rank: those of the first process must be everybody's.
    model: nn.Module = mlp(seed=rank)
    model.append(nn.BatchNorm1d(4, affine=False).double())  # buffers, which DDP would broadcast
    several = distributed.is_initialized()

    def wrapped(when: str) -> nn.Module:
        """The model as it is called, if it is wrapped then."""
        if not several or when not in wrap:
            return model
        return DistributedDataParallel(model, **WRAPS[wrap])

    whole = wrapped("before")
    loda = LoDA(whole, **MLP, trainable=["5.*"])  # type: ignore[arg-type]
    results: dict[str, Tensor] = {}
    for number in range(2):
        x, y = images(number)[rows.start : rows.stop], LABELS[rows.start : rows.stop]
        generator = torch.Generator().manual_seed(100 * rank + number)
        with loda.task(list(x.split(3))) as task:
            called = whole if "before" in wrap else wrapped("in the task")
            groups = task.parameters(lr=0.05, head_lr=0.02)
            optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1)
            called.train()
            for step in range(STEPS):
                key = f"task{number}/step{step}"
                if take in ("step", "number"):
                    done = task.step(
                        lambda rows, of=called, x=x, y=y: F.cross_entropy(of(x[rows]), y[rows]),
                        y if take == "step" else len(y), optimizer, radius=0.3, generator=generator,
                    )  # fmt: skip
                    assert done.source_loss is not None
                    assert done.alignment is not None
                    assert done.steps == 2
                    results[f"{key}/loss"], results[f"{key}/source"] = done.loss, done.source_loss
                    results[f"{key}/alignment"] = done.alignment
                    continue
                halves = 2 if take == "window" else 1
                xs, ys = x.chunk(halves), y.chunk(halves)
                taken = task.halves(list(ys), optimizer, radius=0.3, generator=generator)
                for half in taken:
                    for parts, leave in ((half.source, half.look_ahead), (half.target, half.share)):
                        for part in parts:
                            logits = called(xs[part.batch][part.rows])
                            value = F.cross_entropy(logits, ys[part.batch][part.rows])
                            (part.weight * value).backward()
                        leave()
                    nn.utils.clip_grad_norm_(task.trainable_parameters(), 0.5)
                    optimizer.step()
                    half.restore()
                assert taken.steps == 2
                assert taken.alignment is not None
                results[f"{key}/alignment"] = taken.alignment
    return {**results, **model.state_dict(), **loda.state_dict()}


def messages(rank: int) -> dict[str, str]:
    """What is said where nothing is shared although there are several processes."""
    said: dict[str, str] = {}
    model = mlp()
    x, y = images(0), LABELS
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(x[rows]), y[rows])

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        try:
            yield
            said[name] = "nothing"
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)

    order = torch.arange(4)
    with noted("aligned"):
        gradient_aligned_step(loss, y, optimizer, parameters, radius=0.1, permutation=order)
    with noted("plain"):
        plain_step(loss, y, optimizer)
    with noted("alone"):
        plain_step(loss, y, optimizer, reduce=unshared)
    loda = LoDA(mlp(), **MLP)  # type: ignore[arg-type]
    with loda.task([x]) as task:
        optimizer = torch.optim.SGD(task.parameters(lr=0.1))
        with noted("forgotten"):
            for half in task.halves(y, optimizer):
                for parts, leave in ((half.source, half.look_ahead), (half.target, optimizer.step)):
                    for part in parts:
                        F.cross_entropy(loda.model(x[part.rows]), y[part.rows]).backward()
                    leave()
        with noted("cached"):
            task.step(
                lambda rows: (x[rows].sum() * torch.ones(1, requires_grad=True)).sum(), y, optimizer
            )
    for name in ("wrapped too early", "wrapped in time"):
        loda = LoDA(mlp(), **MLP)  # type: ignore[arg-type]
        model = DistributedDataParallel(loda.model)
        own = images(rank)
        loda.begin_task([own])
        if name == "wrapped in time":
            model = DistributedDataParallel(loda.model)
        optimizer = torch.optim.SGD(loda.parameters(lr=0.1))
        F.cross_entropy(model(own), y).backward()
        optimizer.step()  # a loop that knows nothing of LoDA
        with noted(name):
            loda.end_task([own])
    return said


def moments(rank: int) -> dict[str, Tensor]:
    """Moments of a process's own images, summed by default and not."""
    x = images(0)[PARTS[rank].start : PARTS[rank].stop]
    shared, own = (
        collect_moments(mlp(), [x], "0"),
        collect_moments(mlp(), [x], "0", reduce=unshared),
    )
    return {"shared": shared["0"].mean, "own": own["0"].mean}


def copies(rank: int) -> list[Tensor]:
    """Tensors of many types and layouts after those of the first process were copied."""
    torch.manual_seed(rank)
    plain = (100 * torch.randn(3, 4)).abs()
    types = (torch.float64, torch.bfloat16, torch.int16, torch.int64, torch.bool, torch.uint8)
    tensors = [plain.to(dtype) for dtype in types]
    tensors += [plain.T.clone().T, plain[0, 0].clone(), plain[:0]]
    copy_from_first(tensors)
    return tensors


def work(rank: int, folder: Path) -> None:
    """Everything that two processes do, written to a file."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=len(PARTS)
    )
    results: dict[str, Any] = {}
    try:
        for wrap in WRAPS:
            for take in TAKES:
                results[f"{wrap}, {take}"] = learn(wrap, take, PARTS[rank], rank)
        results["messages"], results["moments"] = messages(rank), moments(rank)
        results["copies"] = copies(rank)
    except BaseException:
        results["error"] = traceback.format_exc()
        raise
    finally:
        torch.save(results, folder / f"{rank}.pt")
        distributed.destroy_process_group()


def together(folder: Path) -> list[dict[str, Any]]:
    """What every process has written."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(len(PARTS))]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(PARTS))]
