"""Loss of old and new tasks along the general direction of a task (the paper's figure 3)."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from backends.torch.readouts import CosineHeads
from training.analyse.rebuild import TaskUpdate, task_updates
from training.config import Experiment, HeadConfig
from training.data import Stream, build_stream, loader, test_transform
from training.distributed import make_accelerator
from training.finished.inference import load_classifier
from training.finished.kept import read_method
from training.loss import cosface
from training.run_dir import TASKS, nested, read_tensors

_KINDS = ("own", "seen")


def losses(
    path: Path, tasks: Sequence[int], steps: Sequence[float], *, root: str | None = None
) -> list[dict[str, Any]]:
    r"""Mean CosFace loss of old and of new evaluation images at several points, by task.

    The points are :math:`W + \alpha w_G B_G A_G` for the given steps α, with W the weights before
    the task, and two marks: ``recalibrated``, :math:`W + w_G B_G \Lambda A_G`, and ``merged``, the
    model after the task with both branches. A mark has no α of its own; its ``step`` is that of
    the point of the line with the nearest outputs on the new task's inputs,
    :math:`\operatorname{tr}(B\Lambda A S A^\top B^\top) / \operatorname{tr}(B A S A^\top B^\top)`
    with S their moment, both traces summed over layers: the share of the branch's effect on the
    new task that is kept. The heads are those after the task. ``own`` is the loss among the classes
    of an image's own task, as in training; ``seen`` that among all classes seen.

    Parameters
    ----------
    path : Path
        A finished run of LoDA with ``keep.branches``, ``keep.moments`` and ``keep.heads``.
    tasks : sequence of int
        Counted from 0; not the first one, which has no past.
    steps : sequence of float
        Values of α.
    root : str, optional
        Where the data are now, if they moved since the training.

    Returns
    -------
    list of dict
        A task each: ``task``, ``step``, ``own`` and ``seen`` with ``old`` and ``new`` losses at
        every step, and ``marks``.

    Raises
    ------
    FileNotFoundError
        If the folder is no run, or lacks branches, moments or heads.
    ValueError
        If the run has no general branch, or the data have other classes now.

    Notes
    -----
    LoDA, arXiv:2603.00191, Figure 3.
    """
    classifier = load_classifier(path)
    experiment, model = classifier.experiment, classifier.model
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    data = experiment.data if root is None else replace(experiment.data, root=root)
    stream = build_stream(data, experiment.seed)
    if stream.class_names != classifier.classes:
        msg = f"the data set has other classes now than when {path} was trained"
        raise ValueError(msg)
    accelerator = make_accelerator(experiment)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    final = {name: layer.weight for name, layer in linear.items()}
    found = []
    for update in task_updates(path, read_method(path), final, len(stream.tasks)):
        if update.task in tasks:
            if not update.general:
                msg = f"{path} has no general branch after its first task: no direction to follow"
                raise ValueError(msg)
            model.to(accelerator.device)
            heads = _heads(path, update.task, stream, classifier.backbone.features)
            moments = _new_moments(path, update)
            line = _Line(model, update, moments, heads.to(accelerator.device), accelerator)
            found.append(line.measure(experiment, stream, steps))
    return found[::-1]


class _Line:
    """A model whose adapted layers are moved along a direction."""

    def __init__(
        self,
        model: nn.Module,
        update: TaskUpdate,
        moments: Mapping[str, Tensor],
        heads: CosineHeads,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.heads, self.accelerator = model, heads, accelerator
        self.task = update.task
        linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.layers = {name: linear[name] for name in update.before}
        self.before, self.general = self._floats(update.before), self._floats(update.general)
        place = 1.0
        marks = {"merged": update.whole}
        if update.recalibrated:
            place = _nearest(update.recalibrated, update.general, moments)
            marks = {"recalibrated": update.recalibrated, **marks}
        self.marks = {name: self._floats(moved) for name, moved in marks.items()}
        self.places = dict.fromkeys(marks, place)

    def measure(
        self, experiment: Experiment, stream: Stream, steps: Sequence[float]
    ) -> dict[str, Any]:
        """Losses at every step and mark, with one pass over the images."""
        sums: defaultdict[tuple[str, str, str | int], float] = defaultdict(float)
        counts: Counter[str] = Counter()
        seen = [label for task in stream.tasks[: self.task + 1] for label in task]
        batches = loader(
            stream.test.subset(seen).with_transform(test_transform(experiment.data)),
            experiment.train.eval_batch_size,
            shuffle=False,
            seed=0,
            workers=experiment.data.workers,
            device=self.accelerator.device,
        )
        self.model.eval()
        for pixels, labels in batches:
            new = labels >= stream.tasks[self.task][0]
            for age, rows in (("old", ~new), ("new", new)):
                if bool(rows.any()):
                    counts[age] += int(rows.sum())
                    for point in self._points(steps):
                        found = self._losses(pixels[rows], labels[rows], experiment.head)
                        for kind, loss in found.items():
                            sums[kind, age, point] += loss * int(rows.sum())

        def at(kind: str, point: str | int) -> dict[str, float]:
            return {age: sums[kind, age, point] / counts[age] for age in ("old", "new")}

        curves = {kind: [at(kind, number) for number in range(len(steps))] for kind in _KINDS}
        return {
            "task": self.task,
            "step": list(steps),
            **{
                kind: {age: [point[age] for point in points] for age in ("old", "new")}
                for kind, points in curves.items()
            },
            "marks": {
                name: {"step": self.places[name], **{kind: at(kind, name) for kind in _KINDS}}
                for name in self.marks
            },
        }

    @torch.no_grad()
    def _points(self, steps: Sequence[float]) -> Iterator[str | int]:
        """Put the model at one point after the other."""
        for number, step in enumerate(steps):
            for name, layer in self.layers.items():
                layer.weight.copy_(self.before[name] + step * self.general[name])
            yield number
        for mark, moved in self.marks.items():
            for name, layer in self.layers.items():
                layer.weight.copy_(self.before[name] + moved[name])
            yield mark

    @torch.no_grad()
    def _losses(self, pixels: Tensor, labels: Tensor, config: HeadConfig) -> dict[str, float]:
        """Mean loss of some images, among the classes of their own tasks and among all seen."""
        with self.accelerator.autocast():
            features = self.model(pixels)
        cosines = self.heads(features.float()).cpu()
        sizes = torch.tensor(self.heads.sizes)
        task_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        foreign = task_of[labels][:, None] != task_of
        candidates = {"own": cosines.masked_fill(foreign, -torch.inf), "seen": cosines}
        return {
            kind: float(cosface(among, labels, scale=config.scale, margin=config.margin))
            for kind, among in candidates.items()
        }

    def _floats(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.layers[name].weight) for name, tensor in tensors.items()}


def _nearest(
    moved: Mapping[str, Tensor], direction: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> float:
    """Step of the point of the line with the nearest outputs; 1 where none changes any."""
    outputs = {name: direction[name] @ moment for name, moment in moments.items()}
    along = sum(float((moved[name] * output).sum()) for name, output in outputs.items())
    length = sum(float((direction[name] * output).sum()) for name, output in outputs.items())
    return along / length if length > 0 else 1.0


def _new_moments(path: Path, update: TaskUpdate) -> dict[str, Tensor]:
    """Moments of the task's inputs by layer: those that the recalibration used, if it did."""
    kept = read_tensors(path / TASKS / f"{update.task:03d}" / "moments.safetensors")
    found = nested(kept, "trained") or nested(kept, "new")
    return {name: found[name].double() for name in update.before}


def _heads(path: Path, task: int, stream: Stream, features: int) -> CosineHeads:
    heads = CosineHeads(features, [len(classes) for classes in stream.tasks[: task + 1]])
    heads.load_state_dict(read_tensors(path / TASKS / f"{task:03d}" / "heads.safetensors"))
    return heads.eval()
