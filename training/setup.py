"""Setting a run up: everything that can be wrong at the start is found here."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from backends.torch.readouts import ClassStatistics, RidgeStatistics
from training.backbone import Backbone, build_backbone, check_fits
from training.config import Experiment
from training.data import Stream, build_stream, test_transform, train_transform, verify_data
from training.evaluate import make_accelerator, wanted_readouts
from training.heads import Heads
from training.methods import Context, build_method
from training.metrics import AccuracyMatrix
from training.presets import effective, method_stream
from training.randomness import derive, seeded
from training.run_folder import RunFolder, choose_folder
from training.saver import Saver
from training.state import RunState
from training.trackers import start_tracker


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
    path = choose_folder(experiment) if resume is None else resume
    accelerator = make_accelerator(experiment, path)
    if experiment.device == "cuda" and accelerator.device.type != "cuda":
        msg = f"device is cuda, but torch sees none here; it would use {accelerator.device}"
        raise ValueError(msg)
    if experiment.data.verify:
        verify_data(experiment.data)
    stream = build_stream(experiment.data, experiment.seed)
    stream = method_stream(experiment, stream)
    with seeded(derive(experiment.seed, 0, "backbone")):
        backbone = build_backbone(experiment.backbone)
        train_image, _ = stream.train.with_transform(train_transform(experiment.data))[0]
    test_image, _ = stream.test.with_transform(test_transform(experiment.data))[0]
    check_fits(backbone, train_image)
    check_fits(backbone, test_image)
    model = backbone.module.to(accelerator.device)
    context = Context(seed=derive(experiment.seed, 0, "method"), tasks=len(stream.tasks))
    method = build_method(experiment.method, model, context)
    kinds = wanted_readouts(experiment.head)
    needs_statistics = experiment.keep.statistics or {"nearest_mean", "alignment"} & set(kinds)
    ridge = None
    if "ridge" in kinds:  # its sums take the square of the number of features
        ridge = RidgeStatistics(
            backbone.features,
            features=experiment.head.ridge_features,
            seed=derive(experiment.seed, 0, "ridge"),
        )
    state = RunState(
        model=model,
        method=method,
        heads=Heads(backbone.features).to(accelerator.device),
        statistics=ClassStatistics() if needs_statistics else None,
        ridge=ridge,
        matrices={kind: AccuracyMatrix() for kind in kinds},
        task_given={kind: AccuracyMatrix() for kind in kinds},
    )
    new = resume is None
    folder = RunFolder(path, fresh=new and experiment.out is None, resume=not new)
    saver = Saver(experiment.checkpoint, folder, state)
    try:
        if new:
            folder.begin(experiment, stream, backbone)
        else:
            folder.check_stream(stream)
            saver.load()
        start_tracker(accelerator, experiment, folder.path)
    except BaseException:
        folder.close()
        raise
    return Run(experiment, stream, backbone, accelerator, state, folder, saver)
