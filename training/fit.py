"""Training on one task: epochs of mini-batches over the method's tensors and the task's head."""

import numpy as np
import torch
from torch import Tensor, nn

from training.data import loader, train_transform
from training.losses import cosface
from training.optimizers import learning_rate, make_optimizer
from training.progress import Meter, Progress
from training.randomness import derive
from training.setup import Run


def fit(run: Run, task: int, progress: Progress) -> None:
    """Train the method's tensors and the task's head; the optimiser is new for every task."""
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
    optimizer = make_optimizer(config, parameters)
    generator = torch.Generator().manual_seed(derive(experiment.seed, task, "steps"))
    for epoch in range(config.epochs):
        lr = learning_rate(config, epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        _training_mode(state.model)
        meter = Meter()
        for pixels, labels in batches:
            inputs, targets = pixels.to(device, non_blocking=True), labels - first

            def loss(
                rows: Tensor,
                inputs: Tensor = inputs,
                targets: Tensor = targets,
                meter: Meter = meter,
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
                loss, targets, optimizer, generator=generator, backward=accelerator.backward
            )
            meter.add(step.loss, len(labels))
            progress.advance(meter)
        values = meter.read()
        # The last step may have broken the weights after the last loss was taken.
        sound = all(bool(parameter.isfinite().all()) for parameter in parameters)
        if not (sound and np.isfinite(values["loss"])):
            msg = (
                f"training diverged: in task {task + 1}, epoch {epoch + 1} the loss is "
                f"{values['loss']:.4g} and the trained weights are "
                f"{'finite' if sound else 'not finite'}; nothing was merged. Lower train.lr or "
                f"method.radius"
            )
            raise FloatingPointError(msg)
        run.folder.log("epoch", task=task, epoch=epoch, lr=lr, **values)
        tracked = {f"train/{name}": value for name, value in {**values, "lr": lr}.items()}
        accelerator.log(tracked, step=task * config.epochs + epoch + 1)


def _training_mode(model: nn.Module) -> None:
    """Enable drop-out, if any, but keep the running statistics of batch norms: they are frozen."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            module.eval()
