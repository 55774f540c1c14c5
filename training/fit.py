"""Training on one task: epochs of mini-batches over the method's tensors and the task's head."""

import time
from typing import NoReturn

import torch
from torch import Tensor, nn

from training.data import loader, start_at, train_transform
from training.losses import cosface
from training.optimizers import learning_rate, make_optimizer
from training.position import Position
from training.progress import Meter, Progress
from training.randomness import derive
from training.setup import Run


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
        The same with this part, over all processes that took part in it.

    Raises
    ------
    FloatingPointError
        If training diverges; the message says where.
    """
    clock = time.perf_counter()
    experiment, config, state = run.experiment, run.experiment.train, run.state
    accelerator, device = run.accelerator, run.accelerator.device
    first = run.stream.tasks[task][0]
    images = run.stream.train.subset(run.stream.tasks[task])
    batches = loader(
        images.with_transform(train_transform(experiment.data)),
        config.batch_size,
        shuffle=True,
        seed=derive(experiment.seed, task, "batches"),
        workers=experiment.data.workers,
    )
    head = state.heads.current
    adapted = state.method.parameters()
    parameters = [*adapted, *head.parameters()]
    progress.begin_task(task, config.epochs * len(batches), parameters)
    at = Position(
        make_optimizer(config, parameters),
        torch.Generator().manual_seed(derive(experiment.seed, task, "steps")),
    )
    before = run.saver.restore_position(at) or {**began, "train": 0.0}
    progress.advance(at.meter, at.epoch * len(batches) + at.batch)

    def seconds() -> dict[str, float]:
        return {**before, "train": round(before["train"] + time.perf_counter() - clock, 3)}

    start_at(batches, at.epoch, at.batch)
    while at.epoch < config.epochs:
        lr = learning_rate(config, at.epoch)
        for group in at.optimizer.param_groups:
            group["lr"] = lr
        _training_mode(state.model)
        for pixels, labels in batches:
            inputs, targets = pixels.to(device, non_blocking=True), labels - first

            def loss(
                rows: Tensor,
                inputs: Tensor = inputs,
                targets: Tensor = targets,
                meter: Meter = at.meter,
            ) -> Tensor:
                with accelerator.autocast():
                    features = state.model(inputs[rows.to(device)])
                cosines = head(features.float())
                wanted = targets[rows].to(device)
                meter.count(cosines, wanted)
                return cosface(
                    cosines, wanted, scale=experiment.head.scale, margin=experiment.head.margin
                )

            step = state.method.step(
                loss,
                targets,
                at.optimizer,
                generator=at.generator,
                backward=accelerator.backward,
            )
            at.meter.add(step.loss, len(labels))
            at.batch += 1
            progress.advance(at.meter)
            run.saver.inside_task(progress, at, seconds())
        # The last step may have broken the weights after the last loss was taken.
        values = at.meter.read()
        if not at.sound():
            _raise_diverged(task, at, values["loss"])
        run.folder.log("epoch", task=task, epoch=at.epoch, lr=lr, **values)
        tracked = {f"train/{name}": value for name, value in {**values, "lr": lr}.items()}
        accelerator.log(tracked, step=task * config.epochs + at.epoch + 1)
        at.next_epoch()
    return seconds()


def _raise_diverged(task: int, at: Position, loss: float) -> NoReturn:
    weights = "finite" if at.finite_weights() else "not finite"
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
