"""A finished run evaluated again, from its weights and the data alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from training.data import build_stream, loader, test_transform
from training.distributed import make_accelerator
from training.finished.inference import load_classifier, read_classes
from training.metrics import count_correct
from training.train import extract_features


def evaluate_run(folder: Path, *, root: str | None = None) -> dict[str, dict[str, Any]]:
    """Evaluate the saved model of a run on all its classes, from weights and data alone.

    Parameters
    ----------
    folder : Path
        A finished run.
    root : str, optional
        Where the data are now, if they moved since the training.

    Returns
    -------
    dict
        By read-out: ``accuracy`` per image, ``by_task``, and ``correct`` and ``total`` by class.

    Raises
    ------
    ValueError
        If the data set no longer has the classes of the run.
    """
    classifier = load_classifier(folder)
    experiment = classifier.experiment
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    data = experiment.data if root is None else replace(experiment.data, root=root)
    stream = build_stream(data, experiment.seed)
    if (stream.class_names, stream.order) != read_classes(folder):
        msg = f"the data set has other classes now than when {folder} was trained"
        raise ValueError(msg)
    accelerator = make_accelerator(replace(experiment, tracker=None))
    classifier.to(accelerator.device)
    batches = loader(
        stream.test.with_transform(test_transform(experiment.data)),
        experiment.train.eval_batch_size,
        shuffle=False,
        seed=0,
        workers=experiment.data.workers,
        device=accelerator.device,
    )
    features, labels = extract_features(classifier.model, batches, accelerator)
    counts = count_correct(classifier.readouts, features, labels, len(stream.order))
    results: dict[str, dict[str, Any]] = {}
    primary = experiment.head.readout
    for kind in sorted(counts, key=lambda kind: kind != primary):
        correct, total = counts[kind]
        by_task = [
            sum(correct[c] for c in task) / sum(total[c] for c in task) for task in stream.tasks
        ]
        results[kind] = {
            "accuracy": sum(correct) / sum(total),
            "by_task": by_task,
            "correct": correct,
            "total": total,
        }
    return results
