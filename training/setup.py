"""Setting a run up: everything that can be wrong at the start is found here."""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from accelerate import Accelerator

from backends.torch.readouts import CosineHeads, Readouts
from training.backbones import Backbone, build_backbone, check_fits
from training.config import Experiment
from training.config.neutral import NEUTRAL
from training.data import Stream, build_stream, test_transform, train_transform, verify_data
from training.evaluate import build_readouts, make_accelerator
from training.methods import Context, Method, build_method, sums_over_processes
from training.metrics import AccuracyMatrix
from training.monitoring.trackers import flat_settings, start_tracker
from training.presets import effective, method_stream
from training.processes import Processes, join_processes
from training.randomness import derive, seeded
from training.run_folder import RunFolder, choose_folder
from training.state import RunState
from training.step.compiled import require_compiler
from training.survival.saver import Saver
from training.watched_folder import WatchedFolder


@dataclass
class Run:
    """A run that is set up: everything that could be wrong at the start has been checked."""

    experiment: Experiment
    stream: Stream
    backbone: Backbone
    accelerator: Accelerator
    state: RunState
    folder: RunFolder
    saver: Saver
    processes: Processes


def prepare(experiment: Experiment, resume: Path | None = None) -> Run:
    """Set a run up, in the order in which mistakes are cheapest to find.

    Parameters
    ----------
    experiment : Experiment
        All settings.
    resume : Path, optional
        Folder of a run of these settings to go on with, from its newest checkpoint.
    """
    experiment = effective(experiment)
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    processes = join_processes(experiment.device)
    processes.require_same("settings", _settings(experiment))
    path = resume or Path(processes.from_first(lambda: str(choose_folder(experiment))))
    accelerator = make_accelerator(experiment, path)
    if experiment.device == "cuda" and accelerator.device.type != "cuda":
        msg = f"device is cuda, but torch sees none here; it would use {accelerator.device}"
        raise ValueError(msg)
    if experiment.train.compile:
        require_compiler(accelerator.device)
    if experiment.data.verify:
        verify_data(experiment.data)
    with processes.first_of_each_machine():
        stream = method_stream(experiment, build_stream(experiment.data, experiment.seed))
        with seeded(derive(experiment.seed, 0, "backbone")):
            backbone = build_backbone(experiment.backbone)
    processes.require_same("images", _fingerprint(stream))
    processes.require_same("backbone", backbone.tensors_sha256)
    with seeded(derive(experiment.seed, 0, "backbone")):
        train_image, _ = stream.train.with_transform(train_transform(experiment.data))[0]
    test_image, _ = stream.test.with_transform(test_transform(experiment.data))[0]
    check_fits(backbone, train_image)
    check_fits(backbone, test_image)
    model = backbone.module.to(accelerator.device)
    context = Context(
        seed=derive(experiment.seed, 0, "method"),
        tasks=len(stream.tasks),
        processes=processes.count,
        reduce=processes.sum if processes.count > 1 else None,
    )
    method = build_method(experiment.method, model, context)
    _check_method(method, experiment.method.name, processes)
    readouts = Readouts(
        build_readouts(experiment.head),
        dim=backbone.features,
        seed=derive(experiment.seed, 0, "ridge"),
        keep_statistics=experiment.keep.statistics,
    )
    state = RunState(
        model=model,
        method=method,
        heads=CosineHeads(backbone.features).to(accelerator.device),
        readouts=readouts,
        matrices={kind: AccuracyMatrix() for kind in readouts.readouts},
        task_given={kind: AccuracyMatrix() for kind in readouts.readouts},
    )
    new = resume is None
    folder = _open_folder(path, processes, fresh=new and experiment.out is None, resume=not new)
    saver = Saver(
        experiment.checkpoint, folder, state, _identity(experiment, stream, backbone), processes
    )
    try:
        if new:
            folder.begin(experiment, stream, backbone)
        else:
            folder.check_stream(stream)
            saver.load()
        if processes.writes:
            start_tracker(accelerator, experiment, folder.path)
        processes.require_same(
            "checkpoint", [state.tasks, saver.passes, saver.resumes_in_task, state.record()]
        )
    except BaseException:
        folder.close()
        raise
    return Run(experiment, stream, backbone, accelerator, state, folder, saver, processes)


def _settings(experiment: Experiment) -> dict[str, object]:
    """What all processes of a run must have in common."""
    own = {*NEUTRAL, "out", "overwrite", "threads", "backbone.weights"}  # a path
    return {name: value for name, value in flat_settings(experiment).items() if name not in own}


def _identity(experiment: Experiment, stream: Stream, backbone: Backbone) -> str:
    """What a run is, wherever it lies: a hash of all that must be the same to go on with it."""
    tasks = [list(task) for task in stream.tasks]
    parts = [_settings(experiment), list(stream.class_names), tasks, backbone.tensors_sha256]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _fingerprint(stream: Stream) -> list[object]:
    sets = (stream.train, stream.test)
    labels = [sha256(bytes(images.labels.numpy())).hexdigest() for images in sets]
    return [list(stream.class_names), [list(task) for task in stream.tasks], *labels]


def _check_method(method: Method, name: str, processes: Processes) -> None:
    if processes.count > 1 and not sums_over_processes(method):
        msg = (
            f"method {name} does not say that it sums over processes "
            f"(sums_over_processes = True): train it with one process"
        )
        raise ValueError(msg)


def _open_folder(path: Path, processes: Processes, *, fresh: bool, resume: bool) -> RunFolder:
    opened: list[RunFolder] = []

    def first() -> str:
        opened.append(RunFolder(path, fresh=fresh, resume=resume))
        return str(opened[0].path)

    found = Path(processes.from_first(first))
    return opened[0] if opened else WatchedFolder(found)
