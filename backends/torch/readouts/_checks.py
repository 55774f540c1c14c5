"""Checks that the read-outs and their statistics share."""

from collections.abc import Collection

import torch
from torch import Tensor


def check_features(features: Tensor, dim: int) -> None:
    if features.ndim != 2 or features.shape[1] != dim or not features.is_floating_point():
        msg = (
            f"Features have shape {tuple(features.shape)} and type {features.dtype}; "
            f"the read-out takes floating (N, {dim})."
        )
        raise ValueError(msg)
    finite("features", features)


def check_filled(classes: int) -> None:
    if not classes:
        msg = "The statistics hold no class yet; collect a task and call end_task first."
        raise ValueError(msg)


def finite(name: str, tensor: Tensor) -> Tensor:
    if not bool(tensor.isfinite().all()):
        msg = f"The {name} hold NaN or infinity."
        raise ValueError(msg)
    # safetensors stores contiguous tensors only, and a copy later could change the last bits.
    return tensor.contiguous()


def check_batch(features: Tensor, labels: Tensor, *, first: int, width: int | None) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or not features.is_floating_point():
        msg = (
            f"Features have shape {tuple(features.shape)} and type {features.dtype}, labels shape "
            f"{tuple(labels.shape)}; give floating (N, D) and (N,)."
        )
        raise ValueError(msg)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        msg = f"Labels are {labels.dtype}; give integers."
        raise ValueError(msg)
    if width is not None and features.shape[1] != width:
        msg = f"Features are {features.shape[1]} wide; those before were {width} wide."
        raise ValueError(msg)
    if not bool(features.isfinite().all()):
        bad = int((~features.isfinite().all(1)).sum())
        msg = (
            f"{bad} of {len(features)} feature rows hold NaN or infinity; "
            "check the model and the images."
        )
        raise ValueError(msg)
    if len(labels) and int(labels.min()) < first:
        msg = (
            f"Label {int(labels.min())} is not of the open task, whose labels begin at {first}; "
            "classes of finished tasks are never refreshed."
        )
        raise ValueError(msg)


def task_end(
    present: Collection[int],
    first: int,
    classes: int | None,
) -> int:
    if classes is None:
        classes = max(present, default=first - 1) + 1 - first
    if classes < 1:
        msg = "The task has no classes; collect features of at least one class before end_task."
        raise ValueError(msg)
    end = first + classes
    missing = sorted(set(range(first, end)) - set(present))
    if missing:
        msg = f"Classes {missing} have no features; collect some of every class of the task."
        raise ValueError(msg)
    beyond = sorted(label for label in present if label >= end)
    if beyond:
        msg = f"Labels {beyond} lie beyond the task, whose labels are {first} to {end - 1}."
        raise ValueError(msg)
    return end


def check_closed(*, open_task: bool) -> None:
    if open_task:
        msg = "A task is being collected; call end_task before the state is taken."
        raise ValueError(msg)


def check_keys(state: dict[str, Tensor], expected: set[str]) -> None:
    if state.keys() != expected:
        msg = f"The state holds {sorted(state)}; it must hold {sorted(expected)}."
        raise ValueError(msg)
