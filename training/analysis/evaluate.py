"""A finished run evaluated again: recorded against measured, by class, and what is confused."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from training.analysis.predict import load, read_classes
from training.calibration import measured
from training.config import Experiment
from training.data import Stream, build_stream
from training.distributed import make_accelerator
from training.methods.base import fact
from training.metrics import AccuracyMatrix
from training.run_dir import CLASSES, SUMMARY, read_json, readable
from training.spelling import visible
from training.train import evaluation_batches, extract_features

if TYPE_CHECKING:
    from pandas import DataFrame

Device = Literal["auto", "cpu", "cuda"]

_TOP = 5
_LISTED = 20  # classes up to which every one is shown; of more, the worst half of that
_PAIRS = 5


@dataclass(frozen=True)
class Evaluation:
    """What a read-out of a run decides on the evaluation images.

    Parameters
    ----------
    classes : list of str
        Names, in the order in which they were learned.
    tasks : list of tuple of int
        Numbers of the classes of each task.
    confusion : array of int, shape (C, C)
        Images by their class (row) and by the class that they are taken for (column).
    top : float
        Share of the images whose class is among the five with the highest scores.
    recorded : tuple of (tuple of int, tuple of int) or None
        Right predictions and images of each class as the run recorded them.
    calibration : dict of str to float or None
        ``error`` and ``confidence`` of the probabilities, as in
        `training.calibration.calibrate`; None for a read-out without.
    """

    classes: list[str]
    tasks: list[tuple[int, ...]]
    confusion: NDArray[np.int64]
    top: float
    recorded: tuple[tuple[int, ...], tuple[int, ...]] | None
    calibration: dict[str, float] | None

    @property
    def correct(self) -> list[int]:
        """Right predictions of each class."""
        counts: list[int] = self.confusion.diagonal().tolist()
        return counts

    @property
    def total(self) -> list[int]:
        """Images of each class."""
        counts: list[int] = self.confusion.sum(axis=1).tolist()
        return counts

    @property
    def accuracy(self) -> float:
        """Share of right predictions among all images."""
        return sum(self.correct) / sum(self.total)

    @property
    def by_task(self) -> list[float]:
        """Share of right predictions among the images of each task; NaN without images."""
        correct, total = self.correct, self.total
        return [_share(sum(correct[c] for c in t), sum(total[c] for c in t)) for t in self.tasks]

    @property
    def is_as_recorded(self) -> bool:
        """Whether every class has as many right predictions and images as recorded."""
        return self.recorded == (tuple(self.correct), tuple(self.total))

    def by_class(self) -> "DataFrame":
        """Columns ``class``, ``task`` (from 1), ``images``, ``correct``, ``accuracy`` (in [0, 1]),
        ``taken_for`` (the wrong class given most often, None if there is none) and ``times``.
        """  # noqa: D205
        from pandas import DataFrame

        wrong = self.confusion - np.diag(self.confusion.diagonal())
        times, taken = wrong.max(axis=1), wrong.argmax(axis=1)
        task = {c: number for number, members in enumerate(self.tasks, start=1) for c in members}
        return DataFrame(
            {
                "class": self.classes,
                "task": [task[c] for c in range(len(self.classes))],
                "images": self.total,
                "correct": self.correct,
                "accuracy": [_share(c, t) for c, t in zip(self.correct, self.total, strict=True)],
                "taken_for": [
                    self.classes[k] if n else None for k, n in zip(taken, times, strict=True)
                ],
                "times": times,
            }
        )


def evaluate_run(
    folder: Path,
    *,
    root: str | None = None,
    device: Device | None = None,
    allow: Sequence[str] = (),
) -> dict[str, Evaluation]:
    """Evaluate the saved model of a run on all its classes, from its weights and data only.

    Parameters
    ----------
    folder : Path
        A finished run.
    root : str, optional
        Where the data are now, if they moved since the training.
    device : str, optional
        ``cpu``, ``cuda`` or ``auto``; by default as the settings of the run say.
    allow : sequence of str
        As in :func:`training.load`.

    Returns
    -------
    dict of str to Evaluation
        By read-out, the primary one first.

    Raises
    ------
    ValueError
        If the data set no longer has the classes of the run.
    """
    classifier = load(folder, allow=allow)
    experiment = classifier.experiment
    if device is not None:
        experiment = replace(experiment, device=device)
    stream, accelerator = set_up(folder, experiment, root=root)
    # The device that was asked for: where it is missing, the accelerator would be the CPU.
    classifier.to(accelerator.device if device in (None, "auto") else device)
    if not len(stream.test):
        msg = "; ".join(["there is no image to evaluate on", *stream.missing])
        raise ValueError(msg)
    batches = evaluation_batches(stream.test, experiment, accelerator.device)
    features, labels = extract_features(classifier.model, batches, accelerator)
    recorded = _recorded(folder)
    count, evaluations = len(stream.order), {}
    for name, readout in classifier.readouts.items():
        scores = readout.logits(features).cpu()
        pairs = labels * count + scores.argmax(dim=1)
        confusion = pairs.bincount(minlength=count**2).reshape(count, count).numpy()
        highest = scores.topk(min(_TOP, count)).indices
        temperature = classifier.temperatures.get(name)
        evaluations[name] = Evaluation(
            classifier.classes,
            list(stream.tasks),
            confusion,
            float((highest == labels[:, None]).any(dim=1).double().mean()),
            recorded.get(name),
            None if temperature is None else measured(scores, labels, temperature),
        )
    return evaluations


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
        If the test images are not those of the run, or those of a part of an extended run are not
        there.
    """
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    data = experiment.data
    if root is not None:
        data = replace(data, options={**data.options, "root": root})
    # The images of an extended run may be gone but for those of its extension.
    stream = build_stream(data, experiment.seed, partial=bool(data.extensions))
    if experiment.method.is_known and fact(experiment.method.kind, "joins_tasks"):
        stream = stream.as_one_task()
    for reason in stream.missing:
        warnings.warn(f"{reason}; the other images are used", RuntimeWarning, stacklevel=2)
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


def evaluation_text(name: str, evaluation: Evaluation, *, details: bool = True) -> str:
    """An evaluation in words and numbers, for a terminal.

    Parameters
    ----------
    name : str
        The read-out.
    evaluation : Evaluation
        Its result.
    details : bool
        Also list accuracies by class, and the classes that are confused most often.
    """
    right, total = sum(evaluation.correct), sum(evaluation.total)
    lines = [
        f"{name}: accuracy {100 * evaluation.accuracy:.2f} % ({right} of {total} images), "
        f"{_against_record(evaluation)}"
    ]
    if len(evaluation.classes) > _TOP:
        lines.append(f"  right class among the first {_TOP}: {100 * evaluation.top:.2f} %")
    if evaluation.calibration is not None:
        error, sure = (100 * evaluation.calibration[key] for key in ("error", "confidence"))
        lines.append(
            f"  probabilities: calibration error {error:.1f} % (mean probability of the answer "
            f"{sure:.1f} %)"
        )
    shares = "  ".join("-" if isnan(x) else f"{100 * x:.2f}" for x in evaluation.by_task)
    lines.append(f"  by task (%): {shares}")
    return "\n".join(lines + (_details(evaluation) if details else []))


def _share(right: int, images: int) -> float:
    return right / images if images else nan


def _against_record(evaluation: Evaluation) -> str:
    if evaluation.recorded is None:
        return "nothing recorded to compare with"
    if evaluation.is_as_recorded:
        return "as recorded"
    correct, total = evaluation.recorded
    both = zip(
        zip(*evaluation.recorded, strict=True), evaluation.correct, evaluation.total, strict=True
    )
    differing = sum(was != (c, t) for was, c, t in both)
    return (
        f"recorded {100 * sum(correct) / sum(total):.2f} % ({sum(correct)} of {sum(total)}): "
        f"{differing} class{'es' if differing > 1 else ''} differ{'' if differing > 1 else 's'}"
    )


def _details(evaluation: Evaluation) -> list[str]:
    table = evaluation.by_class().query("images > 0")
    lines = ["  by class (%):"]
    if len(table) > _LISTED:
        table = table.sort_values("accuracy", kind="stable").head(_LISTED // 2)
        lines = [f"  by class (%), the lowest {len(table)} of {len(evaluation.classes)}:"]
    shown = [*map(visible, evaluation.classes)]
    width = max(len(visible(name)) for name in table["class"])
    lines += [
        f"    {visible(row['class']):{width}}  {100 * row['accuracy']:6.2f}  ({row['correct']} of "
        f"{row['images']}, task {row['task']})"
        for row in table.to_dict("records")
    ]
    wrong = evaluation.confusion - np.diag(evaluation.confusion.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    pairs = [np.unravel_index(place, wrong.shape) for place in order]
    confused = [
        f"    {shown[a]} taken for {shown[b]}: {wrong[a, b]} of {evaluation.total[a]}"
        for a, b in pairs
        if wrong[a, b]
    ]
    return [*lines, "  confused most often:", *confused] if confused else lines


def _recorded(folder: Path) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Right predictions and images of each class after the last task, by read-out."""
    path = folder / SUMMARY
    if not path.is_file():
        return {}
    with readable(path):
        counts: dict[str, Any] = read_json(path)["counts"]
        matrices = {name: AccuracyMatrix.from_dict(record) for name, record in counts.items()}
        return {name: (m.correct[-1], m.total[-1]) for name, m in matrices.items()}
