"""A finished run as a classifier: predict images of one's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from backends.torch.readouts import READOUTS as KINDS
from backends.torch.readouts import Classifier as Fitted
from training.backbones import Backbone, build_backbone, check_fits
from training.config import Experiment, read_experiment
from training.data import open_image, test_transform
from training.run_dir import CLASSES, CONFIG, MODEL, READOUTS, nested, not_finite, read_tensors
from training.seeds import seeded
from training.shapes import CLASSES_SHAPE, read_shaped


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
        Classifiers on its features; the primary one is named by ``experiment.head.readout``.
    """

    classes: list[str]
    experiment: Experiment
    backbone: Backbone
    readouts: dict[str, Fitted]

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
            msg = f"cannot use the device {str(device)!r}: {_one_line(error)}"
            raise ValueError(msg) from error
        for kind, readout in self.readouts.items():
            stored = {name: tensor.to(device) for name, tensor in readout.tensors().items()}
            self.readouts[kind] = KINDS[kind]().load(stored)
        return self

    @torch.no_grad()
    def logits(self, images: Tensor, readout: str | None = None) -> Tensor:
        """Scores (N, classes) of images (N, C, H, W) that are transformed already.

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
        chosen = readout or self.experiment.head.readout
        if chosen not in self.readouts:
            msg = f"the run has no read-out {chosen!r}; it has {list(self.readouts)}"
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
            Classes an image.
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
            msg = f"give a list of image files: [{str(images)!r}]"
            raise TypeError(msg)
        if not 1 <= top <= len(self.classes):
            msg = f"top must be from 1 to {len(self.classes)}, got {top}"
            raise ValueError(msg)
        transform, size = (
            test_transform(self.experiment.data),
            self.experiment.train.eval_batch_size,
        )
        results = []
        for first in range(0, len(images), size):
            files = images[first : first + size]
            pixels = [transform(open_image(path, self.experiment.data)) for path in files]
            best = self.logits(torch.stack(pixels), readout).topk(top)
            for classes, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                names = [self.classes[index] for index in classes]
                results.append([Prediction(*pair) for pair in zip(names, scores, strict=True)])
        return results


def load_classifier(folder: Path) -> Classifier:
    """Rebuild the classifier of a run from its weights; see :func:`training.load`."""
    if not folder.is_dir():
        msg = f"no run folder {folder}"
        raise FileNotFoundError(msg)
    missing = [n for n in (CONFIG, CLASSES, MODEL, READOUTS) if not (folder / n).is_file()]
    if missing:
        msg = f"{folder} holds no finished run: {', '.join(missing)} not there"
        raise FileNotFoundError(msg)
    experiment = read_experiment(folder / CONFIG)
    classes, _ = read_classes(folder)
    with seeded(0):  # the random weights of the new model are overwritten at once
        backbone = build_backbone(experiment.backbone, initialise=False)
    weights = _read_finite(folder / MODEL)
    try:
        backbone.module.load_state_dict(weights)
    except RuntimeError as error:
        msg = f"{folder / MODEL} does not fit the model of {folder / CONFIG}: {_one_line(error)}"
        raise ValueError(msg) from error
    readouts = _read_readouts(folder, len(classes), backbone.features)
    if experiment.head.readout not in readouts:
        msg = f"{folder / READOUTS} lacks the read-out {experiment.head.readout!r} of the run"
        raise ValueError(msg)
    return Classifier(classes, experiment, backbone, readouts)


def read_classes(folder: Path) -> tuple[list[str], list[int]]:
    """Names of the classes of a run, and their order in the data set."""
    content = read_shaped(folder / CLASSES, CLASSES_SHAPE)
    return list(content["class_names"]), list(content["order"])


def _read_finite(path: Path) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    broken = not_finite(tensors)
    if broken:
        msg = f"{path} holds NaN or infinite values: {', '.join(broken[:8])}"
        raise ValueError(msg)
    return tensors


def _read_readouts(folder: Path, classes: int, features: int) -> dict[str, Fitted]:
    path = folder / READOUTS
    tensors = _read_finite(path)
    kinds = dict.fromkeys(name.partition("/")[0] for name in tensors)
    try:
        readouts = {kind: KINDS[kind]().load(nested(tensors, kind)) for kind in kinds}
        found = {k: r.logits(torch.ones(1, features)).shape[1] for k, r in readouts.items()}
    except (ValueError, RuntimeError, LookupError, TypeError) as error:
        msg = f"{path} does not fit the model of {folder / CONFIG}: {_one_line(error)}"
        raise ValueError(msg) from error
    if set(found.values()) != {classes}:
        msg = f"{path} holds read-outs of {found} classes, {folder / CLASSES} {classes}"
        raise ValueError(msg)
    return readouts


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
