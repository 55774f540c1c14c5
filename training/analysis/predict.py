"""A finished run as a classifier of one's own images: files, PIL images, arrays and tensors."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from backends.torch.readouts import Classifier as FittedReadout
from training.analysis.saved_tasks import read_finite
from training.backbones import Backbone, build_backbone, check_fits
from training.calibration import probabilities
from training.components import check, positive
from training.config import Experiment, read_experiment
from training.data import DataConfig, open_image, test_transform
from training.data.datasets import IMAGE_SUFFIXES, walk_classes
from training.data.image_files import reading
from training.data.images import images_of
from training.distributed import usable_cpus
from training.run_dir import (
    CLASSES,
    CONFIG,
    MODEL,
    READOUTS_FILE,
    SUMMARY,
    nested,
    read_json,
    readable,
    require_intact,
    require_new,
    write_atomically,
)
from training.seeds import seeded

if TYPE_CHECKING:
    from pandas import DataFrame

ImageLike = str | Path | Image.Image | NDArray[Any] | Tensor
"""An image: a file, a PIL image, an array (H, W, C) or (H, W), or a tensor (C, H, W)."""

UNKNOWN = "unknown"
"""The answer for an image whose best class is below the threshold."""

TABLES = (".csv", ".json", ".parquet")
"""Endings of the files that tables can be written to."""


class Prediction(NamedTuple):
    """A class, and how much the read-out is for it.

    Attributes
    ----------
    name : str
        The class.
    score : float
        What the read-out gives it; higher is better. A cosine in [-1, 1], or for the ridge
        read-out a regressed membership (about 0 to 1).
    probability : float or None
        Between 0 and 1, over all classes; None of a read-out without likelihoods (nearest mean,
        ridge), whose scores are no probabilities.
    """

    name: str
    score: float
    probability: float | None = None

    @property
    def value(self) -> float:
        """The probability, or the score where there is none."""
        return self.score if self.probability is None else self.probability


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
    temperatures : dict of str to float
        Of the read-outs whose scores can be turned into probabilities, softmax(scores / T).
    """

    classes: list[str]
    experiment: Experiment
    backbone: Backbone
    readouts: dict[str, FittedReadout]
    temperatures: dict[str, float] = field(default_factory=dict)

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
        chosen = self.chosen(readout)
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

    def chosen(self, readout: str | None = None) -> str:
        """Name of a read-out: the given one, or by default the primary one.

        Raises
        ------
        ValueError
            If the run has no such read-out.
        """
        name = readout or next(iter(self.readouts))
        if name not in self.readouts:
            msg = f"readout must be one of {list(self.readouts)}, got {name!r}"
            raise ValueError(msg)
        return name

    def predict(
        self,
        images: Sequence[ImageLike] | NDArray[Any] | Tensor,
        *,
        top: int = 1,
        readout: str | None = None,
        on_error: Callable[[Any, Exception], object] | None = None,
    ) -> list[list[Prediction]]:
        """Most likely classes of images, best first.

        Every image is prepared as the run's own test images were: rotation by EXIF, channels,
        resize, crop and normalisation.

        Parameters
        ----------
        images : sequence
            Each one a file (BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF or WebP), a PIL image, an
            array (H, W, C) or (H, W), or a tensor (C, H, W). Arrays and tensors are uint8, or
            floating in [0, 1], not normalised. A whole array (N, H, W, C) or tensor (N, C, H, W)
            will do too.
        top : int, default 1
            Number of classes per image; all of them where there are fewer.
        readout : str, optional
            A read-out of the run; the primary one by default.
        on_error : callable, optional
            Called with an image that cannot be used and the error, instead of raising it; its
            predictions are an empty list.

        Returns
        -------
        list of list of Prediction

        Raises
        ------
        ValueError
            If an image cannot be read or has no such values, shape or type; the message names it.
        TypeError
            If a single image is given instead of a sequence, or something that is no image.

        See Also
        --------
        table : the same as a pandas.DataFrame.
        """
        single = isinstance(images, str | Path | Image.Image)
        if single or (isinstance(images, np.ndarray | Tensor) and images.ndim != 4):
            given = repr(str(images)) if isinstance(images, str | Path) else _described(images)
            msg = f"images must be a list of images, got {given}; put it in brackets"
            raise TypeError(msg)
        check(top >= 1, "top", top, "at least 1")
        top = min(top, len(self.classes))
        name = self.chosen(readout)
        results = []
        for pixels in self._batches(images, on_error):
            usable = [x for x in pixels if x is not None]
            best = iter(self._best(torch.stack(usable), top, name) if usable else [])
            results += [[] if x is None else next(best) for x in pixels]
        return results

    def table(
        self,
        images: Sequence[ImageLike],
        *,
        top: int = 1,
        readout: str | None = None,
        threshold: float | None = None,
        on_error: Callable[[Any, Exception], object] | None = None,
    ) -> "DataFrame":
        """Predictions as a table, one row per image that could be read.

        Parameters
        ----------
        images, top, readout, on_error
            As in :meth:`predict`.
        threshold : float, optional
            Answer "unknown" where the probability (or, of a read-out without likelihoods, the
            score) of the best class is below this.

        Returns
        -------
        pandas.DataFrame
            Columns ``image`` (the file, or the position from 0 of another image), ``answer`` if
            there is a threshold, and ``class_1``, ``probability_1`` or ``score_1``, ``class_2``
            and so on.

        Raises
        ------
        ValueError, TypeError
            As from :meth:`predict`, and if the threshold is not finite, or of probabilities and
            not from 0 to 1.
        """
        from pandas import DataFrame

        kind = "probability" if self.chosen(readout) in self.temperatures else "score"
        if threshold is not None:
            fits, rule = math.isfinite(threshold), "finite"
            if kind == "probability":
                fits, rule = 0 <= threshold <= 1, "from 0 to 1, as probabilities are"
            check(fits, "threshold", threshold, rule)
        predictions = self.predict(images, top=top, readout=readout, on_error=on_error)
        rows: list[dict[str, Any]] = []
        for position, (image, best) in enumerate(zip(images, predictions, strict=True)):
            if not best:
                continue
            row: dict[str, Any] = {
                "image": printable(image) if isinstance(image, str | Path) else position
            }
            if threshold is not None:
                row["answer"] = answer(best, threshold)
            for rank, guess in enumerate(best, start=1):
                row |= {f"class_{rank}": guess.name, f"{kind}_{rank}": guess.value}
            rows.append(row)
        return DataFrame(rows)

    def _batches(
        self,
        images: Iterable[ImageLike],
        on_error: Callable[[Any, Exception], object] | None,
    ) -> Iterator[list[Tensor | None]]:
        """Transformed images, batch by batch; None for one that cannot be used."""
        data = self.experiment.data
        transform = test_transform(data)

        def prepare(image: ImageLike) -> Tensor | Exception:
            try:
                return transform(_pixels(image, data))
            except (ValueError, TypeError) as error:
                return error

        rest = iter(images)
        with ThreadPoolExecutor(usable_cpus()) as pool:  # decoding holds no lock
            while batch := list(islice(rest, self.experiment.train.eval_batch_size)):
                pixels: list[Tensor | None] = []
                for image, prepared in zip(batch, pool.map(prepare, batch), strict=True):
                    if isinstance(prepared, Tensor):
                        pixels.append(prepared)
                    elif on_error is None:
                        raise prepared
                    else:
                        on_error(image, prepared)
                        pixels.append(None)
                yield pixels

    def _best(self, pixels: Tensor, top: int, readout: str) -> list[list[Prediction]]:
        """The best classes of transformed images (N, C, H, W)."""
        scores = self.logits(pixels, readout)
        best = scores.topk(top)
        shares: list[Any] = [[None] * top] * len(pixels)
        if readout in self.temperatures:
            shares = (
                probabilities(scores, self.temperatures[readout]).gather(1, best.indices).tolist()
            )
        columns = zip(best.indices.tolist(), best.values.tolist(), shares, strict=True)
        return [
            [Prediction(self.classes[c], s, p) for c, s, p in zip(*row, strict=True)]
            for row in columns
        ]


def answer(best: Sequence[Prediction], threshold: float) -> str:
    """The best class, or "unknown" where its probability or score is below a threshold.

    Examples
    --------
    >>> answer([Prediction("cat", 0.4, 0.9)], 0.5), answer([Prediction("cat", 0.4)], 0.5)
    ('cat', 'unknown')
    """
    return best[0].name if best[0].value >= threshold else UNKNOWN


def image_files(paths: Iterable[str | Path]) -> tuple[list[Path], list[Path]]:
    """Image files of files and folders, and the files of folders that are left out.

    Folders are walked recursively, as those of training images are: links are followed, hidden
    files and folders are passed over. In folders only files with an image's ending count; a file
    that is named is always taken.

    Parameters
    ----------
    paths : iterable of path
        Files and folders.

    Returns
    -------
    tuple of (list of Path, list of Path)

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder, or a folder without an image.
    OSError
        If a folder cannot be read.
    """
    images: list[Path] = []
    others: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            if not path.exists():
                msg = f"there is no file or folder {path}"
                raise FileNotFoundError(msg)
            images.append(path)
            continue
        folders, beside = walk_classes(path)
        walks = (beside, *folders.values())
        below = sorted(file for walk in walks for file in (*walk.images, *walk.others))
        chosen = [file for file in below if file.suffix.lower() in IMAGE_SUFFIXES]
        if not chosen:
            endings = ", ".join(sorted(IMAGE_SUFFIXES))
            msg = f"no image in the folder {path}: none of its files ends in {endings}"
            raise FileNotFoundError(msg)
        images += chosen
        others += [file for file in below if file.suffix.lower() not in IMAGE_SUFFIXES]
    return images, others


def write_table(table: "DataFrame", path: Path, *, overwrite: bool = False) -> Path:
    """Write a table as CSV, JSON (a list of rows) or Parquet, by the ending of the path.

    Parameters
    ----------
    table : pandas.DataFrame
        Its index is left out.
    path : Path
        Written whole or not at all.
    overwrite : bool
        Replace a file that is there.

    Raises
    ------
    ValueError, ModuleNotFoundError, FileExistsError
        As from :func:`require_table`.
    OSError
        If the file cannot be written.
    """
    require_table(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.lower()

    def write(temporary: Path) -> None:
        if kind == ".csv":
            table.to_csv(temporary, index=False, lineterminator="\n")
        elif kind == ".json":
            rows = table.to_dict("records")
            text = json.dumps(
                rows, indent=1, ensure_ascii=False, default=lambda number: number.item()
            )
            temporary.write_text(text + "\n", encoding="utf-8")
        else:
            table.to_parquet(temporary, index=False)

    write_atomically(path, write)
    return path


def require_table(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a path that a table cannot be written to, before it is computed.

    Raises
    ------
    ValueError
        If the ending is of no kind of table.
    ModuleNotFoundError
        If nothing that writes Parquet is installed.
    FileExistsError
        If the file is there, and ``overwrite`` is off.
    """
    if path.suffix.lower() not in TABLES:
        msg = f"a table must end in {', '.join(TABLES[:-1])} or {TABLES[-1]}, got {path}"
        raise ValueError(msg)
    engines = ("pyarrow", "fastparquet")
    if path.suffix.lower() == ".parquet" and not any(map(find_spec, engines)):
        msg = f"{path}: writing Parquet needs pyarrow, which is not installed; pip install pyarrow"
        raise ModuleNotFoundError(msg)
    require_new(path, overwrite=overwrite)


def printable(path: str | Path) -> str:
    """A path as text that any file can hold: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _pixels(image: ImageLike, data: DataConfig) -> Tensor:
    """An image after the first resize: uint8, or float in [0, 1], of shape (C, H, W)."""
    if isinstance(image, str | Path):
        return open_image(image, data)
    if isinstance(image, Image.Image):
        with reading("a PIL image"):
            image.load()  # the file behind it may be cut off
        return images_of([image], data)[0]
    if not isinstance(image, np.ndarray | Tensor):
        msg = (
            f"images must be files, PIL images, arrays or tensors, got {type(image).__name__}; "
            "convert it first"
        )
        raise TypeError(msg)
    whole = _checked(image)
    if whole.dtype == torch.uint8:  # the way of a file with these pixels
        rows = whole.permute(1, 2, 0).numpy()
        return images_of([Image.fromarray(rows[..., 0] if len(whole) == 1 else rows)], data)[0]
    if len(whole) == 4:
        msg = f"a floating image must have 1 or 3 channels, got {_described(image)}; drop the alpha"
        raise ValueError(msg)
    # As of a file: where the settings leave the size alone, the images of the data have one.
    return images_of(whole[None], replace(data, resize=data.images.resize or data.side))[0]


def _checked(image: NDArray[Any] | Tensor) -> Tensor:
    """Pixels (C, H, W) on the CPU, uint8 or float32, of an array or tensor that can be an image."""
    if isinstance(image, Tensor):
        tensor, layout = image.detach().cpu(), "(C, H, W)"
    else:
        # A copy: the array may be read-only or have negative steps, which torch does not take.
        array = image.astype(image.dtype.newbyteorder("="), copy=True)
        if array.dtype.kind not in "uif":
            msg = f"an image must be uint8 or floating in [0, 1], got {_described(image)}"
            raise TypeError(msg)
        tensor, layout = torch.from_numpy(array), "(H, W, C)"
        tensor = tensor[..., None] if tensor.ndim == 2 else tensor
        tensor = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor
    if tensor.ndim != 3 or len(tensor) not in (1, 3, 4) or 0 in tensor.shape:
        msg = (
            f"an image must have shape {layout} with 1, 3 or 4 channels, got {_described(image)}; "
            "arrays have their channels last, tensors first"
        )
        raise ValueError(msg)
    if tensor.dtype == torch.uint8:
        return tensor
    if not tensor.is_floating_point():
        msg = (
            f"an image must be uint8 or floating in [0, 1], got {_described(image)}; convert it to "
            "uint8 if its values are from 0 to 255"
        )
        raise TypeError(msg)
    low, high = float(tensor.min()), float(tensor.max())
    if not (low >= 0 and high <= 1):  # also of NaN
        cure = "divide it by 255" if low >= 0 and 1 < high <= 255 else "undo its normalisation"
        msg = (
            f"a floating image must have values from 0 to 1, got {low:.4g} to {high:.4g}; {cure}, "
            "or give transformed images to logits"
        )
        raise ValueError(msg)
    return tensor.float()


def _described(image: Any) -> str:
    shape = getattr(image, "shape", None)
    return type(image).__name__ if shape is None else f"{image.dtype} of shape {tuple(shape)}"


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
    temperatures = _temperatures(folder, readouts)
    return Classifier(classes, experiment, backbone, readouts, temperatures).to(device)


def _temperatures(folder: Path, readouts: Mapping[str, Any]) -> dict[str, float]:
    """Temperatures of the read-outs that have one, from the summary of a run."""
    path = folder / SUMMARY
    if not path.is_file():  # scores need none
        return {}
    require_intact(folder, SUMMARY)
    with readable(path):
        calibration = read_json(path).get("calibration") or {}
        temperatures = {
            name: float(entry["temperature"])
            for name, entry in calibration.items()
            if name in readouts
        }
        for name, temperature in temperatures.items():
            positive(f"the temperature of {name!r}", temperature)
    return temperatures


def read_classes(folder: Path) -> tuple[list[str], list[int]]:
    """Names of the classes of a run in the order of learning, and their labels in the data set."""
    content = read_json(folder / CLASSES)
    with readable(folder / CLASSES):
        return [str(name) for name in content["class_names"]], list(content["order"])
