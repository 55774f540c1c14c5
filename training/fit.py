"""Training on one task: epochs of mini-batches over the method's tensors and the task's head."""

import time
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn

from backends.torch import RowsLoss
from training.data import cut_loader, start_at, train_transform
from training.files import nested, not_finite
from training.monitoring.progress import Meter, Progress
from training.randomness import derive
from training.setup import Run
from training.step.compiled import training_model
from training.step.losses import cosface
from training.step.optimizers import learning_rate, make_optimizer
from training.survival.position import Position


def fit(run: Run, task: int, progress: Progress, began: dict[str, float]) -> dict[str, float]:
    """Train the method's tensors and the task's head; the optimiser is new for every task.

    Parameters
    ----------
    run : Run
        May stand inside the task already, where an earlier process left it.
    task : int
        Number of the task.
    progress : Progress
        Shows the steps.
    began : dict of str to float
        Seconds that the parts of the task before this one have taken.

    Returns
    -------
    dict of str to float
        The same with this part, over all processes that took part in it: ``load``, while training
        waited for images, and ``train``.

    Raises
    ------
    FloatingPointError
        If training diverges; the message says where.
    """
    clock = time.perf_counter()
    experiment, config, state = run.experiment, run.experiment.train, run.state
    accelerator, processes = run.accelerator, run.processes
    first = run.stream.tasks[task][0]
    images = run.stream.train.subset(run.stream.tasks[task])
    batches = cut_loader(
        images.with_transform(train_transform(experiment.data)),
        config.batch_size,
        shuffle=True,
        seed=derive(experiment.seed, task, "batches"),
        workers=experiment.data.workers,
        share=processes.share,
        device=accelerator.device,
    )
    head = state.heads.current
    adapted = state.method.parameters()
    parameters = [*adapted, *head.parameters()]
    progress.begin_task(task, config.epochs * len(batches), parameters)
    at = Position(
        make_optimizer(config, parameters),
        torch.Generator().manual_seed(derive(experiment.seed, task, "steps")),
    )
    resumed = run.saver.restore_position(at, epochs=config.epochs, batches=len(batches))
    before = {**began, "load": 0.0, "train": 0.0, **resumed}
    waited = 0.0
    if processes.rank:  # drop-out: other images, other masks, and others again after a checkpoint
        place = processes.rank + processes.count * (at.epoch * len(batches) + at.batch)
        torch.manual_seed(derive(experiment.seed, task, "dropout") + place)
    progress.advance(at.meter, at.epoch * len(batches) + at.batch)

    def seconds() -> dict[str, float]:
        spent = {"load": waited, "train": time.perf_counter() - clock - waited}
        return {**before, **{part: round(before[part] + spent[part], 3) for part in spent}}

    start_at(batches, at.epoch, at.batch, epochs=config.epochs - at.epoch)
    loading = iter(batches)
    forward = training_model(state.model, compiled=config.compile)
    while at.epoch < config.epochs:
        lr = learning_rate(config, at.epoch)
        for group in at.optimizer.param_groups:
            group["lr"] = lr
        _training_mode(state.model)
        for _ in range(len(batches) - at.batch):
            halt = time.perf_counter()
            pixels, labels = next(loading)
            waited += time.perf_counter() - halt
            targets, seen = labels - first, Meter()
            step = state.method.step(
                _loss(run, forward, pixels, targets, seen),
                targets,
                at.optimizer,
                generator=at.generator,
                backward=accelerator.backward,
            )
            at.meter.add(step.loss, len(labels))
            _join_counts(run, seen, at.meter)
            at.batch += 1
            progress.advance(at.meter)
            last = at.epoch + 1 == config.epochs and at.batch == len(batches)
            if not run.saver.inside_task(progress, at, seconds(), last=last):
                _raise_diverged(task, at)
        # The last step may have broken the weights after the last loss was taken.
        if not at.sound():
            _raise_diverged(task, at)
        values = at.meter.read()
        run.folder.log("epoch", task=task, epoch=at.epoch, lr=lr, **values)
        tracked = {f"train/{name}": value for name, value in {**values, "lr": lr}.items()}
        accelerator.log(tracked, step=task * config.epochs + at.epoch + 1)
        at.next_epoch()
    return seconds()


def _loss(
    run: Run,
    forward: Callable[[Tensor], Tensor],
    pixels: Tensor,
    targets: Tensor,
    seen: Meter,
) -> RowsLoss:
    """The mean loss over rows of a mini-batch, or the part of it that this process holds.

    ``pixels`` are those of the process, ``targets`` of the whole mini-batch.
    """
    accelerator, head, config = run.accelerator, run.state.heads.current, run.experiment.head
    start, stop = run.processes.share.bounds(len(targets))

    def loss(rows: Tensor) -> Tensor:
        alone = run.processes.count == 1
        own = rows if alone else rows[(rows >= start) & (rows < stop)]
        # Right ones among the rows of the others are added later, the rows themselves here.
        seen.predicted += len(rows) - len(own)
        if len(own) == 0:
            return 0 * head.weight.sum()
        with accelerator.autocast():
            mine = (own - start).to(accelerator.device, non_blocking=True)
            features = forward(pixels[mine])
        cosines = head(features.float())
        wanted = targets[own].to(accelerator.device, non_blocking=True)
        seen.count(cosines, wanted)
        value = cosface(cosines, wanted, scale=config.scale, margin=config.margin)
        return value if alone else value * (len(own) / len(rows))

    return loss


def _join_counts(run: Run, seen: Meter, meter: Meter) -> None:
    """Add what all processes have counted in a step to the meter of the epoch."""
    if run.processes.count > 1:
        right = torch.as_tensor(seen.right, device=run.accelerator.device).clone()
        run.processes.sum([right])
        seen.right = right
    meter.right = meter.right + seen.right
    meter.predicted += seen.predicted


def _raise_diverged(task: int, at: Position) -> NoReturn:
    loss, weights = at.meter.read()["loss"], "finite" if at.finite_weights() else "not finite"
    # Squares of large gradients may overflow in Adam before anything else does.
    if not_finite(nested(at.tensors(), "optimizer")):
        weights += ", the state of the optimiser is not"
    msg = (
        f"training diverged: in task {task + 1}, epoch {at.epoch + 1} the loss is {loss:.4g} and "
        f"the trained weights are {weights}; nothing was merged. "
        f"Lower train.lr or method.radius"
    )
    raise FloatingPointError(msg)


def _training_mode(model: nn.Module) -> None:
    """Enable drop-out, if any, but keep the running statistics of batch norms: they are frozen."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            module.eval()
