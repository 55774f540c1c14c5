"""A run from its settings to its results, top to bottom.

Set up, tasks, epochs, steps, evaluate, save: in this order. What a method does at the three
points of a task (choose directions, take steps, merge) is in `training.methods` and
`backends.torch`; formulas are in docs/theory.md. Inside this file tasks, epochs and mini-batches
count from 0; files and messages count tasks and epochs from 1.
"""

from __future__ import annotations

import json
import platform
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from backends.torch import LargeUpdateWarning, RowsLoss, TaskRecord
from backends.torch.readouts import CosineHeads, Readouts, class_mean_start
from training import overview
from training.backbones import Backbone, build_backbone, check_fits
from training.backbones.checks import check_features, check_target
from training.backbones.conv_vit import ConvStem
from training.calibration import calibrate
from training.checkpoint import Checkpoint, Checkpoints, StopSignals, write_final_state
from training.config import (
    NEUTRAL,
    Experiment,
    TrainConfig,
    as_recorded,
    begun_experiment,
    dump_experiment,
    effective,
    flat_settings,
    resolved,
    resume_command,
)
from training.data import (
    Batches,
    ImageSet,
    Stream,
    build_stream,
    loader,
    test_transform,
    train_transform,
    verify_data,
)
from training.data.images import TokenSet, fits_cache
from training.data.stream import require_outside
from training.distributed import Processes, Share, launched_processes, make_accelerator
from training.logging import Progress, peak_memory, require_tracker, reset_peak, start_tracker
from training.loss import cosface
from training.methods import Context
from training.methods.base import fact
from training.metrics import Meter, count_correct
from training.plots import accuracy_figure
from training.run_dir import (
    CLASSES,
    ENVIRONMENT,
    FIGURE,
    MODEL,
    READOUTS_FILE,
    Overwrite,
    RunFolder,
    choose_folder,
    environment,
    flattened,
    is_finished,
    nested,
    not_finite,
    read_json,
    readable,
    write_tensors,
)
from training.seeds import derive, seeded
from training.spelling import some
from training.state import OpenTask, State
from training.updates import Before, Update, sample, weights_of

_COMPILERS = ("c++", "g++", "clang++", "cl")
_SMALLER_STEPS = "Lower train.lr, or method.radius if the method has one"


def train(experiment: Experiment, *, overwrite: Overwrite = False, quiet: bool = False) -> Path:
    """Run an experiment; returns the folder with its results.

    Parameters
    ----------
    experiment : Experiment
        All settings.
    overwrite : bool or "unfinished"
        Replace the run in a folder that is not empty: any, or only one without results.
    quiet : bool
        Show no progress bars and no table.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    ValueError, OSError
        If settings, data, weights or the folder are invalid; raised before training starts. A
        later OSError means a full disk, or a lost loader worker or process.
    FloatingPointError
        If training diverges; the message says where.
    """
    return run_to_end(prepare(experiment, overwrite=overwrite), quiet=quiet)


def resume(path: Path, experiment: Experiment | None = None, *, quiet: bool = False) -> Path:
    """Resume an interrupted run from its newest undamaged checkpoint.

    On the CPU of the same machine the result is the same, bit for bit, as without interruption.

    Parameters
    ----------
    path : Path
        The run folder.
    experiment : Experiment, optional
        Its settings. Those that may change on resuming (data folder, workers, checkpoint
        interval) can differ from the recorded ones.
    quiet : bool
        Show no progress bars and no table.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    ValueError, OSError
        If the folder holds no run that can be resumed, or another process is writing to it.
    FloatingPointError
        If training diverges.
    """
    if is_finished(path):
        msg = f"the run in {path} is finished: nothing is left to resume"
        raise ValueError(msg)
    return run_to_end(prepare(experiment or begun_experiment(path), resume_from=path), quiet=quiet)


# --- set up ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run that is set up: everything that could be wrong at the start has been checked.

    Parameters
    ----------
    experiment, stream, backbone, accelerator, processes, folder, checkpoints
        The parts of the run, fixed from here on.
    state : State
        What changes while it trains.
    stop : StopSignals
        Whether a signal asks the run to stop.
    resumed : bool
        Whether it continues from a checkpoint of its own.
    extends : dict, optional
        What is recorded of the finished run that it extends; see `Origin.lineage`.
    on_step : callable, optional
        Called with the run after every mini-batch, before the run may be saved.
    """

    experiment: Experiment
    stream: Stream
    backbone: Backbone
    accelerator: Accelerator
    processes: Processes
    folder: RunFolder
    checkpoints: Checkpoints
    state: State
    stop: StopSignals = field(default_factory=StopSignals)
    resumed: bool = False
    extends: Mapping[str, Any] | None = None
    on_step: Callable[[Run], object] | None = None


class Origin(Protocol):
    """A finished run that a new one extends; see `training.extend`."""

    path: Path
    checkpoint: Checkpoint

    def lineage(self, stream: Stream, environment: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What ``environment.json`` says of the runs that the new one extends, the first first."""


def prepare(
    experiment: Experiment,
    resume_from: Path | None = None,
    *,
    overwrite: Overwrite = False,
    origin: Origin | None = None,
) -> Run:
    """Set a run up, in the order in which mistakes are cheapest to find.

    It starts anew, or from the newest checkpoint of a run with these settings, in the folder
    ``resume_from``, or from the state of a finished run, ``origin``. ``overwrite`` as in `train`.

    Raises
    ------
    ValueError, OSError
        If anything is wrong; nothing has been written then.
    """
    experiment = resolved(effective(experiment))
    seed = experiment.seed
    method = experiment.method.build()
    processes = launched_processes()
    if processes.count > 1 and not fact(method, "sums_over_processes"):
        msg = (
            f"method {experiment.method.name} does not declare sums_over_processes = True: "
            f"train it with one process"
        )
        raise ValueError(msg)
    if experiment.tracker is not None:
        require_tracker(experiment.tracker)
    accelerator = make_accelerator(experiment.device, experiment.precision, experiment.tracker)
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    processes.require_same("settings", _shared_settings(experiment))
    name = f"{experiment.data.name}-{experiment.method.name}-seed{experiment.seed}"
    # Only the name is chosen here, so that an unusable folder fails early. The folder is created
    # after data and weights have been checked.
    path = resume_from or Path(
        processes.from_first(lambda: str(choose_folder(experiment.out, name, overwrite=overwrite)))
    )
    if experiment.device == "cuda" and accelerator.device.type != "cuda":
        msg = f"device is cuda, but torch sees none here; it would use {accelerator.device}"
        raise ValueError(msg)
    if experiment.train.compile:
        require_compiler(accelerator.device)
    # What a run that was extended has learned is in its state: its first weights are not needed,
    # and neither are its first images.
    lineage = [] if resume_from is None else _lineage(resume_from)
    before = origin.path if origin is not None else (resume_from if lineage else None)
    extends = before is not None
    if experiment.data.verify and not extends:
        verify_data(experiment.data)

    if resume_from is None:
        require_outside(path, experiment.data)
    with processes.first_of_each_machine():  # the first process may download data and weights
        stream = build_stream(experiment.data, seed, partial=extends)
        if fact(method, "joins_tasks"):
            stream = stream.as_one_task()
        with seeded(derive(seed, 0, "backbone")):
            backbone = build_backbone(experiment.backbone, initialise=not extends)
    if before is not None:
        backbone = _as_begun(backbone, before)
    here = environment(_backbone_record(backbone))
    if origin is not None:
        lineage = origin.lineage(stream, here)
    learned = lineage[-1]["tasks"] if lineage else 0
    require_images(stream, learned)
    classes = _classes_record(stream)
    if before is not None:
        with readable(before / CLASSES):
            # Counted when they were learned: the images may be gone.
            classes["images"][:learned] = read_json(before / CLASSES)["images"][:learned]
    processes.require_same("images", classes)
    processes.require_same("backbone", backbone.tensors_sha256)
    # One image of each split, only to check that it fits the backbone. Seeding the block keeps its
    # random augmentation from moving torch's global generators.
    with seeded(derive(seed, 0, "backbone")):
        for image, _ in stream.train.with_transform(train_transform(experiment.data)).first(1):
            check_fits(backbone, image)
    # An extension by an image or two of known classes may have nothing to be evaluated on.
    images = (stream.test, stream.train, *(extension.known for extension in stream.extensions))
    first = next(part for part in images if len(part))
    test_image, _ = first.with_transform(test_transform(experiment.data))[0]
    check_fits(backbone, test_image)

    model = backbone.module.to(accelerator.device)
    check_features(backbone, test_image)
    check_target(backbone, test_image, experiment.method)
    context = Context(
        seed=derive(seed, 0, "method"),
        tasks=len(stream.tasks),
        processes=processes.count,
        reduce=processes.sum if processes.count > 1 else None,
    )
    method.start(model, context)
    readouts = Readouts(
        experiment.head.build(),
        dim=backbone.features,
        seed=derive(seed, 0, "ridge"),
        keep_statistics=experiment.keep.statistics,
    )
    heads = CosineHeads(backbone.features).to(accelerator.device)
    state = State(model, method, heads, readouts)

    # Only the first process opens the folder; `opened` hands its RunFolder out of the function,
    # which can return only what is sent to the other processes: the path.
    opened: list[RunFolder] = []

    def open_folder() -> str:
        fresh, again = resume_from is None and experiment.out is None, resume_from is not None
        opened.append(RunFolder(path, fresh=fresh, resume=again, overwrite=overwrite))
        return str(opened[0].path)

    path = Path(processes.from_first(open_folder))
    folder = opened[0] if opened else RunFolder(path, writes=False)
    identity = _identity_hash(experiment, classes, backbone)
    resume_by = resume_command(path, experiment)
    checkpoints = Checkpoints(path, experiment.checkpoint, identity, resume_by=resume_by)
    run = Run(experiment, stream, backbone, accelerator, processes, folder, checkpoints, state)
    run.resumed, run.extends = resume_from is not None, lineage[-1] if lineage else None
    try:
        if resume_from is None:
            record = {**here, "extends": lineage} if lineage else here
            folder.begin(dump_experiment(as_recorded(experiment)), classes, record)
            if origin is not None:
                folder.copy_tasks(origin.path)
                restore(run, origin.checkpoint)
        else:
            folder.check_classes(classes)
            restore(run, checkpoints.newest())
            folder.log("resumed", **{k: v for k, v in here.items() if k != "backbone"})
        if processes.writes and experiment.tracker is not None:
            start_tracker(accelerator, flat_settings(experiment), path)
        processes.require_same("checkpoint", state.record())
    except BaseException:
        if resume_from is None:
            folder.discard()
        folder.close()
        raise
    return run


def _shared_settings(experiment: Experiment) -> dict[str, object]:
    """Settings that all processes of a run must have in common."""
    # The path of the weights may differ: a hash of the loaded weights is compared instead.
    own = {*NEUTRAL, "out", "threads", "backbone.weights"}
    return {name: value for name, value in flat_settings(experiment).items() if name not in own}


def _identity_hash(experiment: Experiment, classes: dict[str, Any], backbone: Backbone) -> str:
    """Hash of everything that must match for a run to be resumed, independent of its folder."""
    parts = [_shared_settings(experiment), classes, backbone.tensors_sha256]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _classes_record(stream: Stream) -> dict[str, Any]:
    """Content of ``classes.json``."""
    labels = stream.train.labels
    return {
        "class_names": list(stream.class_names),
        "order": list(stream.order),
        "tasks": [list(task) for task in stream.tasks],
        "images": [int(torch.isin(labels, torch.tensor(task)).sum()) for task in stream.tasks],
        "fingerprint": stream.fingerprint(),
        "test": stream.test_record(),
        "left_out": stream.left_out,
    }


def _lineage(run: Path) -> list[dict[str, Any]]:
    """The finished runs that a run extends; see `Origin.lineage`."""
    with readable(run / ENVIRONMENT):
        return [
            {
                **before,
                "run": str(before["run"]),
                "tasks": int(before["tasks"]),
                "notes": [str(note) for note in before["notes"]],
            }
            for before in read_json(run / ENVIRONMENT).get("extends", [])
        ]


def _as_begun(backbone: Backbone, run: Path) -> Backbone:
    """The backbone with the hashes of the weights that a run began with."""
    with readable(run / ENVIRONMENT):
        record = read_json(run / ENVIRONMENT)["backbone"]
        return backbone._replace(
            tag=record["tag"],
            weights_sha256=record["weights_sha256"],
            tensors_sha256=record["tensors_sha256"],
        )


def require_images(stream: Stream, learned: int) -> None:
    """Refuse to learn a task of which a class has no training image.

    Images of the first ``learned`` tasks, which are learned already, may be missing.

    Raises
    ------
    FileNotFoundError
        If there is such a class.
    """
    present = set(stream.train.labels.tolist())
    lacking = [label for task in stream.tasks[learned:] for label in task if label not in present]
    if lacking:
        names = some([stream.class_names[label] for label in lacking])
        msg = "; ".join([f"there are no training images of {names}", *stream.missing])
        raise FileNotFoundError(msg)


def _backbone_record(backbone: Backbone) -> dict[str, Any]:
    """Description of the backbone in ``environment.json``."""
    return {
        "timm_name": backbone.timm_name,
        "options": backbone.timm_options,
        "tag": backbone.tag,
        "weights_sha256": backbone.weights_sha256,
        "tensors_sha256": backbone.tensors_sha256,
        "notes": list(backbone.notes),
    }


def require_compiler(device: torch.device) -> None:
    """Raise if `torch.compile` cannot work here, before any training.

    Raises
    ------
    ValueError
        If there is no C++ compiler, which torch needs for every device.
    """
    if not any(shutil.which(name) for name in _COMPILERS):
        msg = (
            f"train.compile is true, but torch.compile needs a C++ compiler for {device.type} on "
            f"{platform.system()}, and none of {', '.join(_COMPILERS)} was found: install one, or "
            "leave train.compile false"
        )
        raise ValueError(msg)


# --- tasks ----------------------------------------------------------------------------------------


def run_to_end(run: Run, *, quiet: bool = False) -> Path:
    """Learn all tasks that are left and write the results; returns the run folder."""
    experiment, state, tasks = run.experiment, run.state, len(run.stream.tasks)
    images = [len(run.stream.train.subset(task)) for task in run.stream.tasks]
    # Without checkpoints a run cannot be saved, so signals act at once.
    catching = run.stop if experiment.checkpoint.keep else nullcontext()
    quiet = quiet or not run.processes.writes
    try:
        with catching, Progress(images, quiet=quiet) as progress:
            progress.say(*_beginning(run))
            if not run.resumed:  # so that the first task can be resumed
                save_between_tasks(run)
            for task in range(state.tasks, tasks):
                take_known_images(run, task, progress)
                learn_task(run, task, progress)
                if task + 1 < tasks:  # after the last task the results are written instead
                    save_between_tasks(run)
            take_known_images(run, tasks, progress)
            if run.processes.writes:
                write_results(run)
    except Exception as error:
        # A first task that could not begin, or diverged, leaves nothing to resume.
        begun = state.tasks or (state.open and not isinstance(error, FloatingPointError))
        if not (run.resumed or begun):
            run.folder.discard()
        elif isinstance(error, ChildProcessError) and experiment.checkpoint.keep:
            msg = f"{error}; resume with: {_resume_command(run)}"
            raise ChildProcessError(msg) from error
        raise
    finally:
        run.accelerator.end_training()
        run.folder.close()
    figure = run.folder.path / FIGURE if experiment.keep.figure else None
    progress.finish(state.accuracy[state.readouts.primary], run.folder.path, figure)
    before = run.extends["tasks"] if run.extends else 0
    log = run.folder.read_log()
    calibration = state.calibration.get(state.readouts.primary)
    end = overview.end(experiment, run.folder.path, log, before=before, calibration=calibration)
    progress.say(*end)
    return run.folder.path


def _beginning(run: Run) -> list[str]:
    return overview.beginning(
        run.experiment,
        run.stream,
        run.backbone,
        device=run.accelerator.device,
        processes=run.processes.count,
        folder=run.folder.path,
        done=run.state.tasks if run.resumed else 0,
        extends=run.extends,
    )


def learn_task(run: Run, task: int, progress: Progress) -> None:
    """Learn one task and evaluate on all tasks so far; a resumed task is open already."""
    experiment, state = run.experiment, run.state
    reset_peak(run.accelerator.device)
    clock = time.perf_counter()
    images = _training_images(run, task)

    position = state.open
    if position is None:
        # Before the method can change anything: SD-LoRA begins with other magnitudes.
        weights, compared = weights_of(state.model), None
        if task:
            before = _features(run, images)[0] if state.readouts.compensates else None
            if before is not None:
                state.readouts.begin_task(before)
            compared = compared_features(run, images, before)
        batches = _method_batches(run, task, images)
        state.method.begin_task(batches)  # LoDA: second moments, then the two subspaces
        state.passes = batches.order.epoch
        _copy_weights_from_first(run)
        features = add_head(run, task, images)
        position = state.open = open_task(run, task)
        if trained := state.method.parameters():
            # On the first task only now, so that a method can name the layer that overflows.
            if compared is None:
                compared = compared_features(run, images, features)
            position.before = Before.opened(weights, state.model, trained, compared)
        progress.say_once(_trained_line(run))
        position.spent("begin", clock)

    # Drop-out draws from torch's global generators: seeded here for the task. If the task was
    # resumed, `train_epochs` restores their saved states; it also seeds the processes apart.
    with seeded(derive(experiment.seed, task, "dropout")):
        train_epochs(run, task, images, position, progress)
    clock = time.perf_counter()

    # LoDA: recalibrate, merge, remember the moments
    with warnings.catch_warnings():  # the line of the task says so for every method
        warnings.simplefilter("ignore", LargeUpdateWarning)
        learned = state.method.end_task(_method_batches(run, task, images))
    _copy_weights_from_first(run)
    clock = position.spent("end", clock)

    fitted = fit_readouts(run, task, images)
    clock = position.spent("readouts", clock)

    tested = evaluate(run, task)
    update = None
    if position.before is not None:
        compared = compared_features(run, images, fitted[0] if fitted else None)
        classifier = state.readouts.classifiers[state.readouts.primary]
        update = position.before.compare(state.model, compared, classifier)
    position.spent("evaluate", clock)
    seconds = position.rounded_seconds()
    state.complete(seconds)  # only in memory: nothing is written before the next line
    _require_finite(run, task)
    if fitted is not None and task + 1 == len(run.stream.tasks):
        state.calibration = calibrate(state.readouts, fitted, tested)
    record_task(run, task, learned, update, seconds)
    accuracy = state.accuracy[state.readouts.primary].curve[-1]
    progress.end_task(task + 1, accuracy, sum(seconds.values()), update)


def _trained_line(run: Run) -> str:
    adapted, head = (
        sum(p.numel() for p in parameters)
        for parameters in (run.state.method.parameters(), run.state.heads.current.parameters())
    )
    total = overview.parameter_count(run.state.model)
    return overview.trained_line(run.experiment.method.name, adapted, head, total)


def record_task(
    run: Run,
    task: int,
    learned: TaskRecord | None,
    update: Update | None,
    seconds: Mapping[str, float],
) -> None:
    """Write the tensors kept of a task, and its line in the log."""
    state, keep = run.state, run.experiment.keep
    run.folder.keep(
        task + 1,
        branches=learned.branch_tensors() if learned and keep.branches else {},
        moments=learned.moment_tensors() if learned and keep.moments else {},
        heads=state.heads.state_dict() if keep.heads else {},
        statistics=state.readouts.statistics["statistics"].state_dict() if keep.statistics else {},
    )
    accuracy = {name: matrix.curve[-1] for name, matrix in state.accuracy.items()}
    run.folder.log(
        "task",
        task=task + 1,
        accuracy=accuracy,
        counts={name: [m.correct[-1], m.total[-1]] for name, m in state.accuracy.items()},
        seconds=seconds,
        memory=peak_memory(run.accelerator.device),
        **({} if update is None else {"update": update._asdict()}),
        **({"layers": learned.diagnostics()} if learned and learned.effects else {}),
    )
    tracked = {f"accuracy/{name}": value for name, value in accuracy.items()}
    # Without epochs, count tasks as steps: of several entries with one step a tracker shows only
    # the last. With epochs this is the step of the task's last epoch in `train_epochs`.
    run.accelerator.log(tracked, step=(task + 1) * max(run.experiment.train.epochs, 1))


def add_head(run: Run, task: int, images: ImageSet) -> Tensor | None:
    """Add a head for the task, initialised as configured and identical in all processes.

    Returns the features of the task's training images, ``images``, if they were needed for that.
    """
    classes = run.stream.tasks[task]
    features = start = None
    if run.experiment.head.start == "class_mean":
        features, labels = _features(run, images)
        means = [features[(labels == label).to(features.device)].mean(dim=0) for label in classes]
        start = class_mean_start(torch.stack(means))
    generator = torch.Generator().manual_seed(derive(run.experiment.seed, task, "head"))
    head = run.state.heads.add(len(classes), start=start, generator=generator)
    head.to(run.accelerator.device)
    run.processes.copy_from_first([head.weight])
    return features


def _training_images(run: Run, task: int) -> ImageSet:
    """The task's training images; as tokens if every pass would compute the same ones.

    A stem of convolutions takes half the time of a pass through the packaged transformers, and
    has no layer that a packaged method could adapt.
    """
    images, experiment = run.stream.train.subset(run.stream.tasks[task]), run.experiment
    data, method = experiment.data, experiment.method
    model = run.state.model
    # A network of somebody else's may do something to images before its stem sees them.
    stem = model.patch_embed if type(model) is VisionTransformer else None
    if not (
        isinstance(stem, ConvStem)
        and method.registry.is_packaged(method.name)
        and not data.images.augments
        # Under mixed precision training and evaluation cast, and a method's own passes do not;
        # a compiled stem may round differently.
        and experiment.precision == "no"
        and not experiment.train.compile
        and fits_cache(data, len(images) * stem.token_bytes)
    ):
        return images
    batches = evaluation_batches(images, experiment, run.accelerator.device)
    tokens, labels = extract_features(stem, batches, run.accelerator)
    return TokenSet.of(tokens.cpu(), labels)


def _method_batches(run: Run, task: int, images: ImageSet) -> Batches:
    """The images of a task for the method's own passes: one before training, some at the end."""
    batches = loader(
        images.with_transform(train_transform(run.experiment.data)),
        run.experiment.train.eval_batch_size,
        shuffle=True,
        seed=derive(run.experiment.seed, task, "moments"),
        workers=run.experiment.data.workers,
        share=run.processes,
        device=run.accelerator.device,
    )
    # Each pass draws new augmentations: those at the end count on from the ones already made.
    batches.order.start_at(run.state.passes, 0)
    return batches


def _copy_weights_from_first(run: Run) -> None:
    """Copy the weights of the first process to all: the same solve may round differently there."""
    model = run.state.model
    run.processes.copy_from_first([*model.parameters(), *model.buffers()])


def _require_finite(run: Run, task: int) -> None:
    """Raise if a task left NaN or infinite values, before anything of it is written."""
    state = run.state
    broken = not_finite(state.tensors() | flattened(readouts=state.readouts.tensors()))
    if broken:
        msg = (
            f"task {task + 1} left values that are not finite in {some(broken, 4)}; "
            f"nothing of this task was saved, the task before it is. {_SMALLER_STEPS}"
        )
        raise FloatingPointError(msg)


# --- epochs and steps -----------------------------------------------------------------------------


def open_task(run: Run, task: int) -> OpenTask:
    """The start of the task's training: a new optimiser, and a generator for its steps.

    The number of values that it trains is added to the state, for the summary.
    """
    parameters = run.state.trained()
    run.state.trainable.append(sum(p.numel() for p in parameters))
    generator = torch.Generator().manual_seed(derive(run.experiment.seed, task, "steps"))
    return OpenTask(make_optimizer(run.experiment.train, parameters), generator)


def make_optimizer(config: TrainConfig, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """A new optimiser for the parameters of a task; no momentum is carried over."""
    if config.optimizer == "adam":
        return Adam(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Learning rate of an epoch, counted from 0; a cosine reaches zero after the last one.

    Examples
    --------
    >>> learning_rate(TrainConfig(epochs=2, lr=0.1), 1)
    0.05
    >>> learning_rate(TrainConfig(epochs=2, lr=0.1, schedule="constant"), 1)
    0.1
    """
    if config.schedule == "constant":
        return config.lr
    return float(config.lr * (1 + np.cos(np.pi * epoch / config.epochs)) / 2)


def train_epochs(
    run: Run, task: int, images: ImageSet, position: OpenTask, progress: Progress
) -> None:
    """Train the method's tensors and the task's head, from the position of the open task on.

    Raises
    ------
    FloatingPointError
        If training diverges; the message says where.
    """
    experiment, config, state = run.experiment, run.experiment.train, run.state
    clock = time.perf_counter()
    batches = loader(
        images.with_transform(train_transform(experiment.data)),
        config.batch_size,
        shuffle=True,
        seed=derive(experiment.seed, task, "batches"),
        workers=experiment.data.workers,
        share=run.processes,
        cut=True,
        device=run.accelerator.device,
    )
    steps_done = position.epoch * len(batches) + position.batch
    progress.begin_task(task + 1, config.epochs * len(batches), steps_done)
    position.restore_generators()
    if run.processes.rank:
        # Drop-out masks must differ between processes, and after a resume from those already drawn:
        # rank + count · steps is another number for every process and number of steps. Only the
        # first process has its generator in the checkpoint.
        offset = run.processes.rank + run.processes.count * steps_done
        torch.manual_seed(derive(experiment.seed, task, "dropout") + offset)

    first_class = run.stream.tasks[task][0]  # the labels of a task are consecutive
    # Dynamic: the halves of a mini-batch vary in size, and one compiled graph must serve them all.
    # Passes for moments and evaluation use the model without compiling it.
    forward = torch.compile(state.model, dynamic=True) if config.compile else state.model
    batches.order.start_at(position.epoch, position.batch, epochs=config.epochs - position.epoch)
    loading = iter(batches)  # over all epochs that are left
    while position.epoch < config.epochs:
        lr = learning_rate(config, position.epoch)
        for group in position.optimizer.param_groups:
            group["lr"] = lr
        _training_mode(state.model)
        for _ in range(len(batches) - position.batch):
            clock = position.spent("train", clock)
            inputs, labels = _next_batch(run, loading)
            clock = position.spent("load", clock)
            targets = labels - first_class
            step_meter = Meter()
            step = state.method.step(
                _rows_loss(run, forward, inputs, targets, step_meter),
                targets,
                position.optimizer,
                generator=position.generator,
                backward=run.accelerator.backward,
            )
            position.meter.add(step.loss, len(labels))
            _join_counts(run, step_meter, position.meter)
            position.batch += 1
            clock = position.spent("train", clock)
            progress.advance(position.meter)
            if run.on_step is not None:
                run.on_step(run)
            last = position.epoch + 1 == config.epochs and position.batch == len(batches)
            save_in_task(run, task, position, last=last)
        # The last step may have broken the weights after the last loss was taken.
        if not position.is_finite():
            _raise_diverged(task, position)
        values = position.meter.read()
        run.folder.log("epoch", task=task + 1, epoch=position.epoch + 1, lr=lr, **values)
        tracked = {f"train/{name}": value for name, value in {**values, "lr": lr}.items()}
        run.accelerator.log(tracked, step=task * config.epochs + position.epoch + 1)
        if overview.rose(position.loss, values["loss"]):
            progress.say(
                f"warning: the training loss of task {task + 1} rose from {position.loss:.3g} to "
                f"{values['loss']:.3g} in epoch {position.epoch + 1}. {_SMALLER_STEPS}"
            )
        position.loss = values["loss"]
        position.epoch, position.batch, position.meter = position.epoch + 1, 0, Meter()
    position.spent("train", clock)


def _rows_loss(
    run: Run,
    forward: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    step_meter: Meter,
) -> RowsLoss:
    """The mean loss over rows of a mini-batch, or the part of it that this process holds.

    ``inputs`` are those of the process, ``targets`` of the whole mini-batch.
    """
    accelerator, head, config = run.accelerator, run.state.heads.current, run.experiment.head
    start, stop = run.processes.bounds(len(targets))

    def loss(rows: Tensor) -> Tensor:
        single_process = run.processes.count == 1
        local_rows = rows if single_process else rows[(rows >= start) & (rows < stop)]
        # Rows of other processes are counted here; their correct predictions are added in
        # _join_counts.
        step_meter.predicted += len(rows) - len(local_rows)
        if len(local_rows) == 0:  # a zero with a graph, so that backward() works here too
            return 0 * head.weight.sum()
        with accelerator.autocast():
            local_index = (local_rows - start).to(accelerator.device, non_blocking=True)
            features = forward(inputs[local_index])
        cosines = head(features.float())
        local_targets = targets[local_rows].to(accelerator.device, non_blocking=True)
        step_meter.count(cosines, local_targets)
        value = cosface(cosines, local_targets, scale=config.scale, margin=config.margin)
        # The processes' parts of the mean add up to the mean over all rows.
        return value if single_process else value * (len(local_rows) / len(rows))

    return loss


def _join_counts(run: Run, step_meter: Meter, meter: Meter) -> None:
    """Add the predictions that all processes counted in a step to the meter of the epoch."""
    if run.processes.count > 1:
        right = torch.as_tensor(step_meter.right, device=run.accelerator.device).clone()
        run.processes.sum([right])
        step_meter.right = right
    meter.right = meter.right + step_meter.right
    meter.predicted += step_meter.predicted


def _training_mode(model: nn.Module) -> None:
    """Enable drop-out, if any, but keep the running statistics of batch norms: they are frozen."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            module.eval()


def _raise_diverged(task: int, position: OpenTask) -> NoReturn:
    loss, weights = (
        position.meter.read()["loss"],
        "finite" if position.has_finite_weights() else "not finite",
    )
    # Squares of large gradients may overflow in Adam before anything else does.
    if not_finite(nested(position.tensors(), "optimizer")):
        weights += ", the state of the optimiser is not"
    msg = (
        f"training diverged: in task {task + 1}, epoch {position.epoch + 1} the loss is "
        f"{loss:.4g} and the trained weights are {weights}; nothing was merged. "
        f"{_SMALLER_STEPS}"
    )
    raise FloatingPointError(msg)


# --- evaluate -------------------------------------------------------------------------------------


def take_known_images(run: Run, tasks: int, progress: Progress) -> None:
    """Begin the extensions of the stream that are due after so many tasks.

    Their images of classes that are known already update the statistics of these classes, through
    the model as it is; it is not trained on them. Then the read-outs are fitted and evaluated again
    on the classes so far, if there are images to evaluate on.
    """
    state, task = run.state, tasks - 1
    while state.extensions < len(run.stream.extensions):
        extension = run.stream.extensions[state.extensions]
        if extension.first_task > tasks or state.open is not None:
            return
        state.extensions += 1
        if not len(extension.known):
            continue
        clock = time.perf_counter()
        fitted = _features(run, extension.known)
        state.readouts.update(*fitted)
        _fit(run, task)
        _require_finite(run, task)
        accuracy = {}
        measured = "no test image is there, so that accuracies stay as they were measured before"
        if len(run.stream.evaluated(tasks, state.extensions)):
            tested = evaluate(run, task)
            if tasks == len(run.stream.tasks):
                state.calibration = calibrate(state.readouts, fitted, tested, state.calibration)
            accuracy = {name: matrix.curve[-1] for name, matrix in state.accuracy.items()}
            reached = 100 * accuracy[state.readouts.primary]
            measured = f"accuracy over all classes so far {reached:.2f} %"
        seconds = round(time.perf_counter() - clock, 3)
        run.folder.log(
            "known",
            task=tasks,
            images=len(extension.known),
            **({"accuracy": accuracy} if accuracy else {}),
            seconds={"readouts": seconds},
        )
        progress.say(
            f"{len(extension.known)} new images of known classes: {measured} ({seconds:.1f} s)"
        )
        if tasks < len(run.stream.tasks):  # otherwise the results are written next
            save_between_tasks(run)


def fit_readouts(run: Run, task: int, images: ImageSet) -> tuple[Tensor, Tensor] | None:
    """Fit the read-outs to all classes; features of old classes are never computed again.

    Returns features and labels of the task's training images, if anything needs them.
    """
    state, classes = run.state, run.stream.tasks[task]
    calibrated = any(readout.likelihoods for readout in state.readouts.readouts.values())
    gathered = None
    if state.readouts.statistics or (calibrated and task + 1 == len(run.stream.tasks)):
        gathered = _features(run, images)
        state.readouts.add_task(*gathered, len(classes))
    _fit(run, task)
    return gathered


def _fit(run: Run, task: int) -> None:
    state = run.state
    state.readouts.fit(state.heads.weight(), derive(run.experiment.seed, task, "alignment"))


def compared_features(run: Run, images: ImageSet, features: Tensor | None) -> Tensor:
    """Features of the training images by which a task's update is judged, see `Update`.

    They are taken from those of all training images of the task where these are known.
    """
    chosen = sample(len(images))
    if features is not None:
        return features[chosen]
    part = replace(images, indices=images.indices[chosen], labels=images.labels[chosen])
    return _features(run, part)[0]


def evaluate(run: Run, task: int) -> tuple[Tensor, Tensor]:
    """Count the correct predictions of every read-out on the test images of all tasks so far.

    Once with all classes as candidates, and once with only those of the image's task. Counts after
    the task that are there already are replaced. Returns features and labels of the images.
    """
    state, sizes = run.state, [len(labels) for labels in run.stream.tasks[: task + 1]]
    features, labels = _features(run, run.stream.evaluated(task + 1, state.extensions))
    for matrices, task_sizes in ((state.accuracy, None), (state.task_given, sizes)):
        counts = count_correct(
            state.readouts.classifiers, features, labels, sum(sizes), task_sizes=task_sizes
        )
        for name, (correct, total) in counts.items():
            matrix = matrices[name]
            again = len(matrix) == task + 1
            matrices[name] = (
                matrix.updated(correct, total)
                if again
                else matrix.extended(sizes[-1], correct, total)
            )
    return features, labels


def _features(run: Run, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Features under the test transform, in the order of the images, and labels."""
    device = run.accelerator.device
    batches = evaluation_batches(images, run.experiment, device, run.processes)
    if run.processes.count == 1:
        return extract_features(run.state.model, batches, run.accelerator)
    part = torch.zeros(0, run.backbone.features, device=device)
    if len(batches):
        part, _ = extract_features(run.state.model, batches, run.accelerator)
    return run.processes.gather_rows(part, len(images)), images.labels


def evaluation_batches(
    images: ImageSet, experiment: Experiment, device: torch.device, share: Share | None = None
) -> Batches:
    """Batches of images, in order, under the test transform; those of one process's share."""
    return loader(
        images.with_transform(test_transform(experiment.data)),
        experiment.train.eval_batch_size,
        shuffle=False,
        seed=0,
        workers=experiment.data.workers,
        share=share,
        device=device,
    )


@torch.no_grad()
def extract_features(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Features (N, D) in float32 on the device, and labels (N,) on the CPU, of all batches.

    Raises
    ------
    FloatingPointError
        If a feature is not finite.
    """
    model.eval()
    parts, labels = [], []
    for images, targets in batches:
        with accelerator.autocast():
            parts.append(model(images.to(accelerator.device)).float())
        labels.append(targets)
    features = torch.cat(parts)
    if not bool(features.isfinite().all()):
        msg = (
            "the model produces features that are not finite: its weights have grown too large. "
            f"{_SMALLER_STEPS}"
        )
        raise FloatingPointError(msg)
    return features, torch.cat(labels)


# --- save -----------------------------------------------------------------------------------------


def save_between_tasks(run: Run) -> None:
    """Save the run, and end it if a signal asks for that."""
    _save(run)
    _leave_if_asked(run, saved=True)


def save_in_task(run: Run, task: int, position: OpenTask, *, last: bool) -> None:
    """Save the run after a step, the ``last`` of the task or another, if that is due.

    It is due by the settings of checkpoints, or because a signal to stop was received.

    Raises
    ------
    KeyboardInterrupt, SystemExit
        After the run was saved, if a signal was received.
    FloatingPointError
        If training has diverged; nothing is saved then.
    """
    due = run.checkpoints.count_step(last=last) or run.stop.received is not None
    if not run.processes.maximum(int(due)):  # clocks differ, and one of them may get the signal
        return
    if not position.is_finite():
        _raise_diverged(task, position)
    saved = fact(run.state.method, "saves_open_task")
    if saved:
        _save(run)
    else:  # restart the interval, or every following step would check again
        run.checkpoints.restart_interval()
    _leave_if_asked(run, saved=saved)


def _next_batch(run: Run, loading: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The next mini-batch; where it cannot be read, the run is saved as the last step left it."""
    try:
        return next(loading)
    except (OSError, ValueError):
        position = run.state.open
        if position and fact(run.state.method, "saves_open_task") and position.is_finite():
            with suppress(OSError):  # what has happened first is told
                _save(run)
        raise


def _save(run: Run) -> None:
    """Write a checkpoint, in one process: between two steps all have the same state."""
    if run.processes.writes and run.experiment.checkpoint.keep:
        run.checkpoints.write(run.state.tensors(), run.state.record(), run.folder.read_log())
    run.checkpoints.restart_interval()


def _leave_if_asked(run: Run, *, saved: bool) -> None:
    """End all processes if one of them received a signal to stop.

    A signal that arrives after this call is acted on after the next step, when all know of it.
    """
    number = run.processes.maximum(int(run.stop.received or 0))
    if not number:
        return
    run.stop.received = signal.Signals(number)
    run.processes.wait()  # the launcher ends the others as soon as one has ended
    what = "a checkpoint was written" if saved else "the last task has a checkpoint"
    run.stop.leave(f"{what}; resume with: {_resume_command(run)}")


def _resume_command(run: Run) -> str:
    return resume_command(run.folder.path, run.experiment)


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Bring a fresh run and its log to the state of a checkpoint."""
    with readable(checkpoint.path):
        optimizer = partial(make_optimizer, run.experiment.train)
        run.state.load(checkpoint.tensors, checkpoint.record, optimizer)
    run.folder.restore_log(checkpoint.metrics)


def write_results(run: Run) -> None:
    """Write the model, the read-outs, the state, the figure and the summary."""
    experiment, state, path = run.experiment, run.state, run.folder.path
    primary = run.state.readouts.primary
    write_tensors(path / MODEL, state.model.state_dict())
    write_tensors(path / READOUTS_FILE, state.readouts.tensors())
    if experiment.keep.state:
        record = {"identity": run.checkpoints.identity, **state.record()}
        size = write_final_state(path, state.tensors(), record, run.folder.read_log())
        run.folder.log("state", bytes=size)
    if experiment.keep.figure:
        data = (
            experiment.data.options.get("root")
            if experiment.data.name == "folder"
            else experiment.data.name
        )
        title = f"{experiment.method.name} on {Path(str(data)).name}, read-out {primary}"
        accuracy_figure(state.accuracy[primary], path / FIGURE, title=title)
    run.folder.finish(
        {
            "readout": primary,
            "readouts": {name: matrix.summary() for name, matrix in state.accuracy.items()},
            "counts": {name: matrix.to_dict() for name, matrix in state.accuracy.items()},
            "task_given": {name: matrix.summary() for name, matrix in state.task_given.items()},
            "calibration": state.calibration,
            "stored_bytes": state.stored_bytes(),
            "trainable_parameters": state.trainable,
            "updates": list(overview.updates(run.folder.read_log()).values()),
            "seconds": state.seconds,
        }
    )
