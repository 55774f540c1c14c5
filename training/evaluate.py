"""Features of images, read-outs from them, and right predictions by class."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from backends.torch.readouts import READOUTS, Alignment, Classifier, Readout, Ridge
from training.config import Experiment, HeadConfig
from training.metrics import class_counts
from training.monitoring.trackers import require_tracker
from training.processes import started_with


def make_accelerator(experiment: Experiment, folder: Path | None = None) -> Accelerator:
    """Device, precision and tracker of an experiment; the tracker writes into the folder."""
    if experiment.tracker is not None:
        require_tracker(experiment.tracker)
    # Several processes without a GPU are for Accelerate one, unless it is told.
    cpu = experiment.device == "cpu" or (started_with() > 1 and not torch.cuda.is_available())
    # Accelerate holds a process to the settings of its first Accelerator; one process may well
    # run several experiments.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=experiment.precision,
        log_with=experiment.tracker,
        project_dir=folder,
    )
    if accelerator.device.type == "cuda" and experiment.precision == "no":
        # float32 is meant: by default convolutions on recent GPUs would use TF32.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return accelerator


@torch.no_grad()
def extract_features(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Features (N, D) in float32 on the device, and labels (N,) on the CPU, of all batches."""
    model.eval()
    features, labels = [], []
    for images, targets in batches:
        with accelerator.autocast():
            features.append(model(images.to(accelerator.device)).float())
        labels.append(targets)
    found = torch.cat(features)
    if not bool(found.isfinite().all()):
        msg = (
            "the model gives features that are not finite: its weights have grown too large. "
            "Lower train.lr or method.radius"
        )
        raise FloatingPointError(msg)
    return found, torch.cat(labels)


def wanted_readouts(config: HeadConfig) -> list[str]:
    """Kinds of read-out of an experiment, the primary one first."""
    return list(dict.fromkeys([config.readout, *config.also]))


def build_readouts(config: HeadConfig) -> list[Readout]:
    """The read-outs of an experiment with their options, the primary one first."""
    options = {
        "alignment": Alignment(
            epochs=config.alignment_epochs,
            temperature=config.alignment_temperature,
            covariance=config.alignment_covariance,
            shrinkage=config.alignment_shrinkage,
            lr=config.alignment_lr,
        ),
        "ridge": Ridge(features=config.ridge_features),
    }
    return [options.get(kind) or READOUTS[kind]() for kind in wanted_readouts(config)]


def count_correct(
    readouts: Mapping[str, Classifier],
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    task_sizes: Sequence[int] | None = None,
) -> dict[str, tuple[list[int], list[int]]]:
    """Right predictions and images by class, for each read-out.

    With ``task_sizes``, the number of classes of each task, the task of an image is given: only
    its classes are candidates.
    """
    foreign = torch.zeros(len(labels), classes, dtype=torch.bool)
    if task_sizes is not None:
        task_of = torch.repeat_interleave(torch.arange(len(task_sizes)), torch.tensor(task_sizes))
        foreign = task_of[labels][:, None] != task_of
    found = {}
    for kind, readout in readouts.items():
        logits = readout.logits(features)
        chosen = logits.masked_fill(foreign.to(logits.device), -torch.inf).argmax(dim=1)
        found[kind] = class_counts(chosen.cpu(), labels, classes)
    return found
