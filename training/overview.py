"""What a run is about to do, and what can be done with it afterwards, in words for the terminal."""

import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.backbones.config import PACKAGED_WEIGHTS
from training.config import Experiment
from training.logging import per_cent

if TYPE_CHECKING:
    import torch

    from training.backbones import Backbone
    from training.data import Stream

_NAME_WIDTH = 10
_BETTER = "vit_small_patch16_224.augreg_in21k"
_MISCALIBRATED = 0.2  # a calibration error above it
_RISE = 0.2  # of the mean training loss from one epoch to the next; smaller rises are common


def beginning(
    experiment: Experiment,
    stream: "Stream",
    backbone: "Backbone",
    *,
    device: "torch.device",
    processes: int,
    folder: Path,
    done: int,
    extends: Mapping[str, Any] | None = None,
) -> list[str]:
    """Lines that say what a run trains on what, and where its results go.

    ``processes`` train together; ``done`` tasks were completed before, if the run is resumed.
    ``extends`` holds the ``run`` that it extends, the number of ``tasks`` learned there, and
    ``notes`` of what differs from one run without interruption.
    """
    import torch

    from training.backbones import preprocessing_of

    data, train, head = experiment.data, experiment.train, experiment.head
    parameters = parameter_count(backbone.module)
    order_seed = experiment.seed if data.order_seed is None else data.order_seed
    order = f"in random order (seed {order_seed})" if data.shuffle else "in order"
    if data.class_order is not None:
        order = "in the order of data.class_order"
    schedule = (
        f"{_count(train.epochs, 'epoch')} a task, {train.optimizer}, learning rate {train.lr}"
    )
    trains = f"{schedule}, batches of {train.batch_size}" if train.epochs else "nothing is trained"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    threads = "" if device.type != "cpu" else f", {_count(torch.get_num_threads(), 'thread')}"
    where = f"{device}{f' ({name})' if name else ''}{threads}"
    precision = {"no": "float32", "bf16": "mixed precision (bfloat16)"}[experiment.precision]
    lines = {
        "data": f"{data_name(experiment)}: {len(stream.train):,} images to train on, "
        f"{len(stream.test):,} to evaluate on",
        "tasks": f"{_count(len(stream.order), 'class', 'classes')} {order}, "
        f"in {task_sizes([len(task) for task in stream.tasks])}",
        "backbone": f"{backbone.name}: {parameters:,} parameters, {backbone.features} features",
        "images": _images(experiment, backbone),
        "method": f"{experiment.method.name}: {trains}",
        "read-out": ", ".join(head.names),
        "device": f"{where}, {precision}{f', {processes} processes' if processes > 1 else ''}",
        "results": str(folder),
    }
    if done:
        lines["resumed"] = f"after task {done} of {len(stream.tasks)}"
    texts = [*backbone.notes, *stream.notes, *_small_backbone(experiment, backbone)]
    if extends is not None:
        lines["extends"] = f"{extends['run']}, after {_count(extends['tasks'], 'task')}"
        texts += extends["notes"]
    pretrained = experiment.backbone.options.get("pretrained", True)
    wanted = preprocessing_of(experiment.backbone)
    if pretrained and wanted is None:
        texts.append(
            f"nothing says how {backbone.name} was trained to see images: mean {data.mean} and std "
            f"{data.std} are used; data.mean and data.std set others"
        )
    warnings = data.unlike(wanted) if pretrained else []
    shown = [named(name, text) for name, text in lines.items()]
    notes = [named("note", note) for note in texts]
    return [
        *shown,
        *notes,
        *(f"warning: {text}" for text in warnings),
        *_one_class(experiment, stream),
    ]


def named(name: str, text: str) -> str:
    """A line of the overview.

    Examples
    --------
    >>> named("device", "cpu")
    'device    cpu'
    """
    return f"{name:<{_NAME_WIDTH}}{text}"


def trained_line(method: str, adapted: int, head: int, total: int) -> str:
    """What is trained in a task: parameters of the backbone and of the task's head.

    Examples
    --------
    >>> trained_line("loda", 49152, 1536, 5_000_000)
    'trained   49,152 parameters of the backbone (0.98 %) and 1,536 of the head'
    >>> trained_line("frozen", 0, 1536, 5_000_000)
    'trained   1,536 parameters of the head; frozen does not adapt the backbone'
    """
    if not adapted:
        return named(
            "trained", f"{head:,} parameters of the head; {method} does not adapt the backbone"
        )
    share = per_cent(adapted / total)
    return named(
        "trained", f"{adapted:,} parameters of the backbone ({share}) and {head:,} of the head"
    )


def task_sizes(sizes: Sequence[int]) -> str:
    """Numbers of classes of the tasks, in words.

    Examples
    --------
    >>> task_sizes([8, 8, 8]), task_sizes([50, 10, 10, 10]), task_sizes([4])
    ('3 tasks of 8 classes', '4 tasks: 1 of 50 classes, 3 of 10', '1 task of 4 classes')
    """
    runs = [(size, len(list(same))) for size, same in groupby(sizes)]
    tasks, first = _count(len(sizes), "task"), _count(sizes[0], "class", "classes")
    if len(runs) == 1:
        return f"{tasks} of {first}"
    parts = [f"{runs[0][1]} of {first}", *(f"{times} of {size}" for size, times in runs[1:6])]
    return f"{tasks}: {', '.join(parts)}{', ...' if len(runs) > 6 else ''}"


def end(
    experiment: Experiment,
    folder: Path,
    log: bytes,
    *,
    before: int = 0,
    calibration: Mapping[str, Any] | None = None,
) -> list[str]:
    """Lines about what a finished run learned, by its ``log``, and the commands that use it.

    ``before`` is the number of tasks learned by the run that it extends, if it extends one, and
    ``calibration`` that of the primary read-out, if it has probabilities.
    """
    learned = {number: update for number, update in updates(log).items() if number > before}
    idle = [number for number, update in learned.items() if update and not update["changed"]]
    large = [n for n, update in learned.items() if update and update["relative"] > 1]
    lines = []
    if idle and experiment.train.epochs:
        lines.append(
            f"warning: little or nothing was learned in {_tasks(idle)}: the update changed no "
            "prediction of a training image. Compare with --method frozen; if that is as good, "
            "raise train.lr or train.epochs."
        )
    if large:
        lines.append(
            f"warning: the update was larger than the adapted weights in {_tasks(large)}, so "
            "probably little is left of what the backbone knew. Compare with --method frozen, and "
            "lower train.lr."
        )
    if risen := [number for number in _risen(log) if number > before]:
        lines.append(
            f"warning: the training loss rose in {_tasks(risen)}: the steps may have been too "
            "large, and features that other classes need may be lost. Try a lower train.lr."
        )
    if calibration and calibration["error"] > _MISCALIBRATED:
        lines.append(
            f"warning: probabilities are off by {100 * calibration['error']:.0f} % on average "
            f"(their mean is {100 * calibration['confidence']:.0f} %), so do not use a threshold. "
            f"Their temperature comes from {calibration['images']} images of the last task."
        )
    run = shlex.quote(str(folder))
    size = sum(event["bytes"] for event in _events(log) if event["event"] == "state")
    commands = {
        f"loda predict {run} PHOTO...": "classify images",
        f"loda extend {run} NEW_PHOTOS": "teach it new classes; for this it keeps "
        f"{size / 1e6:,.1f} MB (keep.state)",
        f"loda eval {run}": "measure it again, class by class",
        f"loda report {run} --out report": "tables and figures on a page",
    }
    if not experiment.keep.state:
        del commands[f"loda extend {run} NEW_PHOTOS"]
    width = max(map(len, commands))
    return [*lines, "next:", *(f"  {line:<{width}}  {what}" for line, what in commands.items())]


def _tasks(numbers: Sequence[int]) -> str:
    return f"task{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def updates(log: bytes) -> dict[int, dict[str, Any] | None]:
    """What the update of each task did, by its number; None where a method adapted nothing.

    Examples
    --------
    >>> updates(b'{"event": "task", "task": 1, "update": {"changed": 0.5}}')
    {1: {'changed': 0.5}}
    """
    tasks = [event for event in _events(log) if event["event"] == "task"]
    return {event["task"]: event.get("update") for event in tasks}


def rose(before: float | None, loss: float) -> bool:
    """Whether a mean training loss is above that of the epoch before by more than noise.

    Examples
    --------
    >>> rose(None, 3.0), rose(1.2, 1.3), rose(1.2, 1.5)
    (False, False, True)
    """
    return before is not None and loss > before + _RISE


def _risen(log: bytes) -> list[int]:
    """Tasks within which the training loss rose."""
    epochs = [event for event in _events(log) if event["event"] == "epoch"]
    pairs = [(a, b) for a, b in pairwise(epochs) if a["task"] == b["task"]]
    return sorted({b["task"] for a, b in pairs if rose(a["loss"], b["loss"])})


def _events(log: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.splitlines()]


def data_name(experiment: Experiment) -> str:
    """The images of an experiment: the data set, and where it is."""
    options = experiment.data.options
    place = options.get("dataset") or options.get("root")
    name = experiment.data.name
    name = f"{name} ({place})" if place else name
    return ", then ".join([name, *experiment.data.extensions])


def parameter_count(module: "torch.nn.Module") -> int:
    """Parameters of a network, without the branches of a task that is open after a resume."""
    from backends.torch import LoRALinear

    branches = sum(
        parameter.numel()
        for layer in module.modules()
        if isinstance(layer, LoRALinear)
        for name, parameter in layer.named_parameters()
        if not name.startswith("base.")
    )
    return sum(parameter.numel() for parameter in module.parameters()) - branches


def _images(experiment: Experiment, backbone: "Backbone") -> str:
    data, images = experiment.data, experiment.data.images
    colours = {1: "grey", 3: "RGB"}.get(backbone.channels, f"{backbone.channels} channels")
    side = images.image_size
    crops = {
        "none": [],
        "pad": [f"random crops after a border of {data.pad}"],
        "random_resized": ["random crops"],
    }[images.train_crop]
    augmented = " and ".join([*crops, *["mirroring"] * images.flip])
    training = f"; {augmented} in training" if augmented else ""
    how = {
        "center": f" (shorter side resized to {images.resize}, middle cut out)",
        "squash": f" (squashed to {images.resize} x {images.resize})",
        "border": f" (longer side resized to {images.resize}, border added)",
    }
    resized = how[images.crop_mode] if images.resize else ""
    return f"{side} x {side} pixels{resized}, {colours}, mean {data.mean}, std {data.std}{training}"


def _small_backbone(experiment: Experiment, backbone: "Backbone") -> list[str]:
    """What would recognise photos better than a packaged network of few pixels."""
    if experiment.data.side is not None or backbone.name not in PACKAGED_WEIGHTS:
        return []
    side = experiment.data.images.image_size
    return [
        f"{backbone.name} sees {side} by {side} pixels; a larger network recognises photos far "
        f"better: --backbone {_BETTER} (downloaded once, best with a GPU)"
    ]


def _one_class(experiment: Experiment, stream: "Stream") -> list[str]:
    """A warning about tasks of one class, in which nothing can be trained."""
    single = [number for number, task in enumerate(stream.tasks, 1) if len(task) == 1]
    if not single or not experiment.train.epochs:
        return []
    tasks = f"task{'s' if len(single) > 1 else ''} {', '.join(map(str, single))}"
    return [
        f"warning: {tasks} with one class: there is nothing to tell apart, so the loss is 0 and "
        "nothing is trained; give every task at least two classes (data.init_cls, data.increment "
        "or data.task_sizes)"
    ]


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or f'{one}s'}"
