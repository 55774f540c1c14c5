"""A finished run as a classifier: predict your own images, evaluate it again on its data."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from backends.torch.readouts import Classifier as FittedReadout
from training.analysis.saved_tasks import read_finite
from training.backbones import Backbone, build_backbone, check_fits
from training.config import Experiment, read_experiment
from training.data import Stream, build_stream, open_image, test_transform
from training.distributed import make_accelerator
from training.metrics import count_correct
from training.run_dir import (
    CLASSES,
    CONFIG,
    MODEL,
    READOUTS_FILE,
    nested,
    read_json,
    readable,
    require_intact,
)
from training.seeds import seeded
from training.train import evaluation_batches, extract_features


class Prediction(NamedTuple):
    """A class and the score that the read-out gives it; higher is better.

    Scores are cosines in [-1, 1], or for the ridge read-out regressed memberships (about 0 to 1).
    """

    name: str
    score: float


@dataclass
class Classifier:
    """The trained classifier of a run.

    Parameters
    ----------
    classes : list of str
        Names of the classes, in the order in which they were learned.
    experiment : Experiment
        Settings of the run.
    backbone : Backbone
        The merged model.
    readouts : dict of str to backends.torch.readouts.Classifier
        Classifiers on its features, the primary one first.
    """

    classes: list[str]
    experiment: Experiment
    backbone: Backbone
    readouts: dict[str, FittedReadout]

    @property
    def model(self) -> nn.Module:
        """The merged backbone: images (N, C, H, W) to features (N, D)."""
        return self.backbone.module

    def to(self, device: str | torch.device) -> Self:
        """Move the model and its read-outs to a device, in place.

        Raises
        ------
        ValueError
            If there is no such device here.
        """
        try:
            self.model.to(device)
        except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
            msg = f"cannot use the device {str(device)!r}: {' '.join(str(error).split())}"
            raise ValueError(msg) from error
        for readout in self.experiment.head.build():
            tensors = self.readouts[readout.name].tensors()
            self.readouts[readout.name] = readout.load(
                {name: tensor.to(device) for name, tensor in tensors.items()}
            )
        return self

    @torch.no_grad()
    def logits(self, images: Tensor, readout: str | None = None) -> Tensor:
        """Scores (N, classes) of already transformed images.

        Parameters
        ----------
        images : Tensor, shape (N, C, H, W)
            As the test transform of the experiment gives them.
        readout : str, optional
            A read-out of the run; the primary one by default.

        Raises
        ------
        ValueError
            If the images do not fit the model, or the run has no such read-out.
        """
        chosen = readout or next(iter(self.readouts))
        if chosen not in self.readouts:
            msg = f"readout must be one of {list(self.readouts)}, got {chosen!r}"
            raise ValueError(msg)
        if images.ndim != 4 or not len(images) or not images.is_floating_point():
            msg = (
                f"images must be floating, of shape (N, C, H, W) with N at least 1, got "
                f"{images.dtype} of shape {tuple(images.shape)}"
            )
            raise ValueError(msg)
        check_fits(self.backbone, images[0])
        self.model.eval()
        device = next(self.model.parameters()).device
        return self.readouts[chosen].logits(self.model(images.to(device)).float())

    def predict(
        self, images: Sequence[str | Path], *, top: int = 1, readout: str | None = None
    ) -> list[list[Prediction]]:
        """Most likely classes of image files, best first.

        Parameters
        ----------
        images : sequence of paths
            BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF or WebP files.
        top : int, default 1
            Number of classes per image.
        readout : str, optional
            A read-out of the run; the primary one by default.

        Returns
        -------
        list of list of Prediction

        Raises
        ------
        ValueError
            If an image cannot be read; the message names it.
        TypeError
            If a single path is given instead of a sequence.
        """
        if isinstance(images, (str, Path)):
            msg = f"images must be a list of image files, got {str(images)!r}; put it in brackets"
            raise TypeError(msg)
        if not 1 <= top <= len(self.classes):
            msg = f"top must be from 1 to {len(self.classes)}, got {top}"
            raise ValueError(msg)
        data, size = self.experiment.data, self.experiment.train.eval_batch_size
        transform = test_transform(data)
        results = []
        for first in range(0, len(images), size):
            files = images[first : first + size]
            pixels = torch.stack([transform(open_image(path, data)) for path in files])
            best = self.logits(pixels, readout).topk(top)
            for classes, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                names = [self.classes[index] for index in classes]
                results.append([Prediction(*pair) for pair in zip(names, scores, strict=True)])
        return results


def load(
    run: str | Path, *, device: str | torch.device = "cpu", allow: Sequence[str] = ()
) -> Classifier:
    """Load the trained classifier of a finished run.

    Parameters
    ----------
    run : str or Path
        A run folder.
    device : str or torch.device, default "cpu"
        Where the model and its read-outs go, ``"cuda"`` say.
    allow : sequence of str
        Import paths of classes of other packages that the run may load: a run may come from
        anybody, and importing a class runs its code.

    Returns
    -------
    Classifier
        With ``classes``, ``predict(images)`` and ``logits(batch)``.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished run.
    ValueError
        If there is no such device here, files of the run are damaged, or it needs a class that is
        not allowed.

    Examples
    --------
    >>> load("no/such/run")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no run folder no/such/run
    """
    folder = Path(run)
    if not folder.is_dir():
        msg = f"no run folder {folder}"
        raise FileNotFoundError(msg)
    missing = [n for n in (CONFIG, CLASSES, MODEL, READOUTS_FILE) if not (folder / n).is_file()]
    if missing:
        msg = f"{folder} holds no finished run: {', '.join(missing)} missing"
        raise FileNotFoundError(msg)
    require_intact(folder, CLASSES, MODEL, READOUTS_FILE)
    experiment = read_experiment(folder / CONFIG, allow)
    classes, _ = read_classes(folder)
    with seeded(0):  # the random initial weights are overwritten at once
        backbone = build_backbone(experiment.backbone, initialise=False)
    weights = read_finite(folder / MODEL)
    with readable(folder / MODEL):
        backbone.module.load_state_dict(weights)
    tensors, wanted = read_finite(folder / READOUTS_FILE), experiment.head.build()
    with readable(folder / READOUTS_FILE):
        readouts = {x.name: x.load(nested(tensors, x.name)) for x in wanted}
        for name, readout in readouts.items():
            # Only trying shows whether the tensors fit the features and the classes.
            count = readout.logits(torch.ones(1, backbone.features)).shape[1]
            if count != len(classes):
                msg = f"the read-out {name!r} has {count} classes, {CLASSES} has {len(classes)}"
                raise ValueError(msg)
    return Classifier(classes, experiment, backbone, readouts).to(device)


def read_classes(folder: Path) -> tuple[list[str], list[int]]:
    """Names of the classes of a run in the order of learning, and their labels in the data set."""
    content = read_json(folder / CLASSES)
    with readable(folder / CLASSES):
        return [str(name) for name in content["class_names"]], list(content["order"])


def evaluate_run(
    folder: Path, *, root: str | None = None, allow: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Evaluate the saved model of a run on all its classes, from its weights and data only.

    Parameters
    ----------
    folder : Path
        A finished run.
    root : str, optional
        Where the data are now, if they moved since the training.
    allow : sequence of str
        As in :func:`load`.

    Returns
    -------
    dict
        By read-out, the primary one first: ``accuracy`` per image, ``by_task``, and ``correct``
        and ``total`` by class.

    Raises
    ------
    ValueError
        If the data set no longer has the classes of the run.
    """
    classifier = load(folder, allow=allow)
    experiment = classifier.experiment
    stream, accelerator = set_up(folder, experiment, root=root)
    classifier.to(accelerator.device)
    batches = evaluation_batches(stream.test, experiment, accelerator.device)
    features, labels = extract_features(classifier.model, batches, accelerator)
    counts = count_correct(classifier.readouts, features, labels, len(stream.order))
    return {
        name: {
            "accuracy": sum(correct) / sum(total),
            "by_task": [
                sum(correct[c] for c in task) / sum(total[c] for c in task) for task in stream.tasks
            ],
            "correct": correct,
            "total": total,
        }
        for name, (correct, total) in counts.items()
    }


def set_up(
    folder: Path, experiment: Experiment, *, root: str | None = None
) -> tuple[Stream, Accelerator]:
    """The data of a run and the device of its settings; also sets its number of threads.

    Parameters
    ----------
    folder : Path
        The run.
    experiment : Experiment
        Its settings.
    root : str, optional
        Where the data are now, if they moved since the training.

    Raises
    ------
    ValueError
        If the data set no longer has the classes of the run.

    Warns
    -----
    RuntimeWarning
        If the test images are not those of the run.
    """
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    data = experiment.data
    if root is not None:
        data = replace(data, options={**data.options, "root": root})
    stream = build_stream(data, experiment.seed)
    if (stream.class_names, stream.order) != read_classes(folder):
        msg = f"the classes of the data set have changed since {folder} was trained; check --root"
        raise ValueError(msg)
    recorded, present = read_json(folder / CLASSES).get("test"), stream.test_record()
    if recorded is not None and recorded != present:
        sides = [f"{x['images']} ({x['fingerprint'][:8]})" for x in (recorded, present)]
        msg = (
            f"the test images are not those of {folder}: number (hash) recorded {sides[0]}, found "
            f"{sides[1]}"
        )
        warnings.warn(msg, RuntimeWarning, stacklevel=2)
    # Nothing is logged, so the run's tracker need not be installed.
    return stream, make_accelerator(experiment.device, experiment.precision)
