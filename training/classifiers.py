"""The classifiers of a run: the head of a task, the read-outs after it, and what they get right."""

import torch
from torch import Tensor

from backends.torch.readouts import class_mean_start
from training.data import ImageSet, loader, test_transform
from training.evaluate import count_correct, extract_features
from training.randomness import derive
from training.setup import Run


def add_head(run: Run, task: int) -> None:
    """Give the task a head, which starts as the settings say and is the same in all processes."""
    classes = run.stream.tasks[task]
    start = None
    if run.experiment.head.start == "class_mean":
        features, labels = _task_features(run, task)
        means = [features[(labels == label).to(features.device)].mean(dim=0) for label in classes]
        start = class_mean_start(torch.stack(means))
    generator = torch.Generator().manual_seed(derive(run.experiment.seed, task, "head"))
    head = run.state.heads.add(len(classes), start=start, generator=generator)
    head.to(run.accelerator.device)
    run.processes.copy_first([head.weight])


def update_readouts(run: Run, task: int) -> None:
    """Statistics of the task's classes through the merged model; old ones are never refreshed."""
    state, classes = run.state, len(run.stream.tasks[task])
    if state.readouts.statistics:
        features, labels = _task_features(run, task)
        state.readouts.add_task(features, labels, classes)
    state.readouts.fit(state.heads.weight(), derive(run.experiment.seed, task, "alignment"))


def evaluate_task(run: Run, task: int) -> None:
    """What the read-outs get right on the images of all tasks so far, with and without the task."""
    seen = [label for labels in run.stream.tasks[: task + 1] for label in labels]
    features, labels = _features(run, run.stream.test.subset(seen))
    state, sizes = run.state, [len(labels) for labels in run.stream.tasks[: task + 1]]
    for matrices, given in ((state.matrices, None), (state.task_given, sizes)):
        counts = count_correct(
            state.readouts.classifiers, features, labels, len(seen), task_sizes=given
        )
        for kind, (correct, total) in counts.items():
            matrices[kind] = matrices[kind].extended(sizes[-1], correct, total)


def _task_features(run: Run, task: int) -> tuple[Tensor, Tensor]:
    """Features of the task's training images under the test transform, and their labels."""
    return _features(run, run.stream.train.subset(run.stream.tasks[task]))


def _features(run: Run, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Features under the test transform, in the order of the images, and labels."""
    share, device = run.processes.share, run.accelerator.device
    batches = loader(
        images.with_transform(test_transform(run.experiment.data)),
        run.experiment.train.eval_batch_size,
        shuffle=False,
        seed=0,
        workers=run.experiment.data.workers,
        share=share,
        device=device,
    )
    if share.count == 1:
        return extract_features(run.state.model, batches, run.accelerator)
    part = torch.zeros(0, run.backbone.features, device=device)
    if len(batches):
        part, _ = extract_features(run.state.model, batches, run.accelerator)
    return run.processes.rows(part, len(images)), images.labels
