"""Loss of old and new tasks along the general direction of a task (the paper's figure 3)."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from backends.torch.readouts import CosineHeads
from backends.torch.settings import LoDASettings
from training.analysis.evaluate import set_up
from training.analysis.predict import load
from training.analysis.saved_tasks import (
    Layer,
    read_finite,
    read_settings,
    read_task,
    task_file,
)
from training.config import Experiment, HeadConfig
from training.data import Stream
from training.loss import cosface
from training.run_dir import readable
from training.train import evaluation_batches

_AGES = ("old", "new")
_CANDIDATES = ("own", "seen")

Tensors = dict[str, Tensor]
"""One tensor per layer, by its name."""


def loss_landscape(
    path: Path,
    tasks: Sequence[int],
    steps: Sequence[float],
    *,
    root: str | None = None,
    allow: Sequence[str] = (),
) -> list[dict[str, Any]]:
    r"""Mean CosFace loss of old and of new evaluation images at several points, by task.

    The points are :math:`W + \alpha w_G B_G A_G` for the given steps α, with W the weights before
    the task, and two marks: ``recalibrated``, :math:`W + w_G B_G \Lambda A_G`, and ``merged``, the
    model after the task with both branches. A mark has no α of its own: its ``step`` is that of
    the point of the line whose outputs on the new task's inputs are nearest,
    :math:`\operatorname{tr}(B\Lambda A S A^\top B^\top) / \operatorname{tr}(B A S A^\top B^\top)`
    with S their moment, both traces summed over layers: the part of the branch's effect on the
    new task that is kept. The heads are those after the task. ``own`` is the loss among the classes
    of an image's own task, as in training; ``seen`` that among all classes seen.

    Parameters
    ----------
    path : Path
        A finished run of LoDA with ``keep.branches``, ``keep.moments`` and ``keep.heads``.
    tasks : sequence of int
        Counted from 1; not the first one, which has no old tasks.
    steps : sequence of float
        Values of α.
    root : str, optional
        Where the data are now, if they moved since the training.
    allow : sequence of str
        As in :func:`training.load`.

    Returns
    -------
    list of dict
        One per task: ``task``, ``step``, ``own`` and ``seen`` with ``old`` and ``new`` losses at
        every step, and ``marks``.

    Raises
    ------
    FileNotFoundError
        If the folder is not a run, or lacks branches, moments or heads.
    ValueError
        If the run has no general branch, the classes of the data have changed, or a file is
        damaged.

    Notes
    -----
    LoDA, arXiv:2603.00191, Figure 3.
    """
    settings = read_settings(path, allow=allow)
    classifier = load(path, allow=allow)
    experiment, model = classifier.experiment, classifier.model
    stream, accelerator = set_up(path, experiment, root=root)
    final = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    landscapes = []
    for update in task_updates(path, settings, final, len(stream.tasks)):
        if update.task in tasks:
            if not update.general:
                msg = f"{path} has no general branch after its first task: no direction to follow"
                raise ValueError(msg)
            heads = CosineHeads(
                classifier.backbone.features, [len(c) for c in stream.tasks[: update.task]]
            )
            file = task_file(path, update.task, "heads")
            with readable(file):
                heads.load_state_dict(read_finite(file))
            line = _UpdateLine(model.to(accelerator.device), update, _new_moments(path, update))
            heads.eval().to(accelerator.device)
            landscapes.append(_measure(line, steps, heads, experiment, stream, accelerator))
    return landscapes[::-1]


class TaskUpdate(NamedTuple):
    """Updates of the adapted layers in one task, by layer, in float64.

    Attributes
    ----------
    task : int
        Counted from 1.
    before : dict of str to Tensor, shape (O, D)
        Weights before the task.
    general : dict of str to Tensor, shape (O, D)
        w_G·B_G A_G, the general branch as trained; empty without one.
    recalibrated : dict of str to Tensor, shape (O, D)
        w_G·B_G Λ A_G; empty where Λ belongs to both branches together.
    whole : dict of str to Tensor, shape (O, D)
        Everything that was merged.
    """

    task: int
    before: Tensors
    general: Tensors
    recalibrated: Tensors
    whole: Tensors


def task_updates(
    path: Path, settings: LoDASettings, final: Mapping[str, Tensor], tasks: int
) -> Iterator[TaskUpdate]:
    """Updates of the tasks from the last to the first, each subtracted from the weights in turn.

    Parameters
    ----------
    path : Path
        A run of LoDA with ``keep.branches``.
    settings : LoDASettings
        Of the run.
    final : mapping of str to Tensor, shape (O, D)
        Final weights by name of the adapted layer; may hold other layers too.
    tasks : int
        Number of tasks.

    Raises
    ------
    FileNotFoundError
        If the branches of a task are missing.
    ValueError
        If they are damaged or do not belong to the model.
    """
    # A run saves only its last weights, and what each task added to them.
    now: Tensors = {}
    for task in range(tasks, 0, -1):
        layers = read_task(path, task, "branches")
        with readable(task_file(path, task, "branches")):
            if not now:
                now = {name: final[name].detach().to("cpu", torch.float64) for name in layers}
            own = settings.by_layer(layers)
            parts = {name: _layer_update(own[name], layer) for name, layer in layers.items()}
            general, recalibrated, whole = (
                {name: part[kind] for name, part in parts.items() if kind in part}
                for kind in ("general", "recalibrated", "whole")
            )
            now = {name: now[name] - whole[name] for name in layers}
        yield TaskUpdate(task, now, general, recalibrated, whole)


def _layer_update(settings: LoDASettings, layer: Layer) -> Tensors:
    tensors = {name: torch.from_numpy(array).double() for name, array in layer.items()}
    branches = [name for name in ("general", "isolated") if f"A_{name}" in tensors]
    downs = {name: tensors[f"A_{name}"] for name in branches}
    ups = {name: settings.weight(name) * tensors[f"B_{name}"] for name in branches}
    products = {name: ups[name] @ downs[name] for name in branches}
    update = {"general": products["general"]} if "general" in products else {}
    coefficients = tensors.get("coefficients")
    # A joint Λ mixes the branches: the general one is not recalibrated by itself.
    if coefficients is not None and settings.joint:
        up, down = torch.cat(list(ups.values()), dim=1), torch.cat(list(downs.values()))
        return {**update, "whole": up @ coefficients @ down}
    if coefficients is not None:
        products["general"] = ups["general"] @ coefficients @ downs["general"]
    if "general" in products:
        update["recalibrated"] = products["general"]
    return {**update, "whole": torch.stack(list(products.values())).sum(dim=0)}


def _new_moments(path: Path, update: TaskUpdate) -> Tensors:
    """Moments of the task's inputs: those used by the recalibration, if there was one."""
    layers = read_task(path, update.task, "moments")
    with readable(task_file(path, update.task, "moments")):
        moments = {name: layers[name] for name in update.before}
        return {
            name: torch.from_numpy(x.get("moment_new_trained", x["moment_new"])).double()
            for name, x in moments.items()
        }


class _UpdateLine:
    """A model whose adapted layers can be set to points of a line, and to marks beside it."""

    def __init__(self, model: nn.Module, update: TaskUpdate, moments: Tensors) -> None:
        self.model, self.task = model.eval(), update.task
        self.weights = {name: model.get_parameter(f"{name}.weight") for name in update.before}
        self.before, self.general = self._like(update.before), self._like(update.general)
        self.marks = {"merged": self._like(update.whole)}
        self.mark_step = 1.0
        if update.recalibrated:
            self.marks = {"recalibrated": self._like(update.recalibrated), **self.marks}
            self.mark_step = _nearest(update.recalibrated, update.general, moments)

    @torch.no_grad()
    def points(self, steps: Sequence[float]) -> Iterator[str | int]:
        """Set the model to each step, then to each mark, and yield its number or name."""
        for number, step in enumerate(steps):
            for name, weight in self.weights.items():
                weight.copy_(self.before[name] + step * self.general[name])
            yield number
        for mark, moved in self.marks.items():
            for name, weight in self.weights.items():
                weight.copy_(self.before[name] + moved[name])
            yield mark

    def _like(self, tensors: Tensors) -> Tensors:
        return {name: tensor.to(self.weights[name]) for name, tensor in tensors.items()}


def _measure(
    line: _UpdateLine,
    steps: Sequence[float],
    heads: CosineHeads,
    experiment: Experiment,
    stream: Stream,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Losses at every step and mark, with one pass over the images."""
    sums: defaultdict[tuple[str, str, str | int], float] = defaultdict(float)
    counts: Counter[str] = Counter()
    seen = [label for task in stream.tasks[: line.task] for label in task]
    images = stream.test.subset(seen)
    for pixels, labels in evaluation_batches(images, experiment, accelerator.device):
        new = labels >= stream.tasks[line.task - 1][0]
        for age, rows in zip(_AGES, (~new, new), strict=True):
            count = int(rows.sum())
            if count:
                counts[age] += count
                # Moving the weights costs less than decoding and loading the images again.
                for point in line.points(steps):
                    with accelerator.autocast(), torch.no_grad():
                        features = line.model(pixels[rows])
                    losses = _losses(heads, features.float(), labels[rows], experiment.head)
                    for among, loss in losses.items():
                        sums[among, age, point] += loss * count

    def at(among: str, point: str | int) -> dict[str, float]:
        return {age: sums[among, age, point] / counts[age] for age in _AGES}

    curves = {among: [at(among, number) for number in range(len(steps))] for among in _CANDIDATES}
    return {
        "task": line.task,
        "step": list(steps),
        **{
            among: {age: [point[age] for point in points] for age in _AGES}
            for among, points in curves.items()
        },
        "marks": {
            mark: {"step": line.mark_step, **{among: at(among, mark) for among in _CANDIDATES}}
            for mark in line.marks
        },
    }


@torch.no_grad()
def _losses(
    heads: CosineHeads, features: Tensor, labels: Tensor, config: HeadConfig
) -> dict[str, float]:
    """Mean loss of some images, among the classes of their own tasks and among all seen."""
    cosines = heads(features).cpu()
    sizes = torch.tensor(heads.sizes)
    task_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    foreign = task_of[labels][:, None] != task_of
    candidates = {"own": cosines.masked_fill(foreign, -torch.inf), "seen": cosines}
    return {
        among: float(cosface(scores, labels, scale=config.scale, margin=config.margin))
        for among, scores in candidates.items()
    }


def _nearest(moved: Tensors, direction: Tensors, moments: Tensors) -> float:
    """Step of the point of the line with the nearest outputs; 1 if the line changes no output."""
    outputs = {name: direction[name] @ moment for name, moment in moments.items()}
    along = sum(float((moved[name] * output).sum()) for name, output in outputs.items())
    length = sum(float((direction[name] * output).sum()) for name, output in outputs.items())
    return along / length if length > 0 else 1.0
