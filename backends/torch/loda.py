"""LoDA over a model: adapt it to one task after another without keeping old data."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backends.torch._checks import check_bases, check_state
from backends.torch.adapt import check_rank, find_layers
from backends.torch.gao import AlignedStep, RowsLoss, draw_permutation, gradient_aligned_step
from backends.torch.lora import LoRALinear
from backends.torch.merging import MergePlan, plan_merge, remember
from backends.torch.moments import Forward, default_forward
from backends.torch.processes import Reduce
from backends.torch.record import TaskRecord
from backends.torch.session import OpenTask
from backends.torch.settings import LoDASettings


class LoDA:
    """Low-rank decomposition and adaptation of a model to a stream of tasks.

    Between tasks the model has its original modules, parameter names and size. During a task its
    target layers carry the branches, and every other parameter is frozen.

    Parameters
    ----------
    model : nn.Module
        Any module with linear layers; adapted in place.
    settings : LoDASettings, optional
        Rank, branches, recalibration and the layers to adapt.
    trainable : sequence of str
        Patterns over names of the model's own parameters that stay trainable during a task (the
        classifier, if it is part of the model).
    forward : callable, optional
        ``forward(model, batch)`` for the passes that collect moments; by default the model is
        called on the batch, or on the first element of a tuple.
    reduce : callable, optional
        Sums tensors over the processes that train the model together
        (:func:`sum_over_processes`): each passes batches of its own to ``begin_task`` and
        ``end_task``, and to ``step`` what :func:`gradient_aligned_step` says.

    Attributes
    ----------
    history : dict of str to Tensor, shape (D, D)
        Sum of the mean second moments of past tasks by layer, older ones weighing less if a decay
        is set; empty before the first.
    tasks : int
        Tasks completed.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    >>> x, y = torch.randn(32, 8), torch.randint(4, (32,))
    >>> loda = LoDA(model, LoDASettings(target="0", rank=2))
    >>> for task in range(2):
    ...     loda.begin_task([x])
    ...     optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=0.1)
    ...     loss = lambda rows: nn.functional.cross_entropy(model(x[rows]), y[rows])
    ...     step = loda.step(loss, y, optimizer, radius=0.1)
    ...     record = loda.end_task([x])
    >>> loda.tasks, model[0]
    (2, Linear(in_features=8, out_features=8, bias=True))
    """

    def __init__(
        self,
        model: nn.Module,
        settings: LoDASettings | None = None,
        *,
        trainable: Sequence[str] = (),
        forward: Forward = default_forward,
        reduce: Reduce | None = None,
    ) -> None:
        self.model = model
        self.settings = settings or LoDASettings()
        self.trainable = tuple(trainable)
        self.forward = forward
        self.reduce = reduce
        self.history: dict[str, Tensor] = {}
        self.tasks = 0
        self._open: OpenTask | None = None
        check_rank(find_layers(model, self.settings.target), self.settings.rank)

    @property
    def layers(self) -> dict[str, LoRALinear]:
        """The adapted layers during a task; empty between tasks."""
        return {} if self._open is None else self._open.layers

    def begin_task(
        self,
        batches: Iterable[Any],
        *,
        bases: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Choose the input directions of the branches and put the branches in place.

        Parameters
        ----------
        batches : iterable
            The task's training inputs, walked once to collect second moments.
        bases : mapping of str to mapping of str to Tensor, shape (D, r), optional
            Bases by layer and branch to use instead of solving for them; held-out ratios are
            then not measured.

        Raises
        ------
        RuntimeError
            If a task is open already.
        ValueError
            If there is no batch, inputs are not finite, injected bases do not fit, or a pattern of
            ``trainable`` matches no parameter. The model is then as it was before the call.
        """
        self._require_closed()
        if bases is not None:
            found = find_layers(self.model, self.settings.target)
            check_bases(self.settings, found, self.tasks, bases)
        task = self._attach(first=self.tasks == 0)
        # The model may have moved to another device since the last task.
        self.history = {
            name: moment.to(task.layers[name].base.weight.device)
            for name, moment in self.history.items()
        }
        try:
            task.start(batches, self.history, bases)
        except BaseException:
            task.close()
            raise
        self._open = task

    def lora_parameters(self) -> list[nn.Parameter]:
        """The tensors of the branches that are trained in the open task."""
        layers = self._task().layers.values()
        return [p for layer in layers for p in layer.parameters() if p.requires_grad]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Everything of the model that is trained in the open task."""
        self._task()
        return [p for p in self.model.parameters() if p.requires_grad]

    def step(
        self,
        loss: RowsLoss,
        labels: Tensor,
        optimizer: Optimizer,
        *,
        radius: float,
        permutation: Tensor | None = None,
        draw: float | None = None,
        generator: torch.Generator | None = None,
        backward: Callable[[Tensor], None] | None = None,
        skip_nonfinite: bool = False,
    ) -> AlignedStep:
        """One mini-batch of gradient-aligned optimisation over the branches.

        Parameters
        ----------
        loss, labels, optimizer, backward, skip_nonfinite
            As in :func:`gradient_aligned_step`.
        radius : float
            Largest radius ρ.
        permutation : Tensor, optional
            Classes in random order; drawn if not given.
        draw : float, optional
            u in [0, 1), the share of the radius for this mini-batch; drawn if not given.
        generator : torch.Generator, optional
            CPU generator of what is drawn.

        Returns
        -------
        AlignedStep
        """
        if not math.isfinite(radius) or radius < 0:
            msg = f"radius must be finite and at least 0, got {radius}"
            raise ValueError(msg)
        if draw is not None and not 0 <= draw <= 1:
            msg = f"draw must be from 0 to 1, got {draw}"
            raise ValueError(msg)
        if permutation is None:
            permutation = draw_permutation(labels, generator).to(labels.device)
        if draw is None:
            draw = float(torch.rand((), generator=generator))
        return gradient_aligned_step(
            loss,
            labels,
            optimizer,
            self.lora_parameters(),
            radius=radius * draw,
            permutation=permutation,
            backward=backward,
            skip_nonfinite=skip_nonfinite,
            reduce=self.reduce,
        )

    @torch.no_grad()
    def end_task(self, batches: Iterable[Any]) -> TaskRecord:
        """Recalibrate, merge, restore the model and add the task to the history.

        Parameters
        ----------
        batches : iterable
            The task's training inputs. Walked up to twice (through the trained and through the
            merged model), so not an iterator that is used up after one pass.

        Returns
        -------
        TaskRecord
            Moments, branches, coefficients and what they did, by layer.

        Raises
        ------
        RuntimeError
            If no task is open.
        ValueError, FloatingPointError
            If there is no batch, or moments or merged weights are not finite. The task then stays
            open and the weights are as before the call.
        """
        task, first = self._task(), self.tasks == 0
        passes = self.settings.passes()
        needs_trained = self.settings.form(first) is not None or "trained" in passes
        if needs_trained and "merged" in passes and isinstance(batches, Iterator):
            msg = (
                f"end_task walks the batches twice, but a {type(batches).__name__} is used up "
                f"after one pass; pass a DataLoader or a list (the task stays open)"
            )
            raise ValueError(msg)
        trained = task.collect(batches) if needs_trained else {}
        plan = MergePlan()
        if not first:
            new = trained or task.new
            plan = plan_merge(self.settings, task.layers, new, self.history, self.tasks)
        try:
            task.merge(plan.coefficients)
            merged = task.collect(batches) if "merged" in passes else {}
            record = TaskRecord.of(
                task.layers,
                task.new,
                trained,
                merged,
                plan.coefficients,
                task.heldout,
                plan.effects,
            )
            history = remember(self.settings, self.history, {"trained": trained, "merged": merged})
        except BaseException:
            task.unmerge()
            raise
        self.history = history
        self._close()
        self.tasks += 1
        return record

    def abandon_task(self) -> None:
        """Drop the branches of the open task and restore the layers as they were before it.

        Parameters named by ``trainable`` keep what they learned.
        """
        self._close()

    def state_dict(self) -> dict[str, Tensor]:
        """Flat state: tasks done, the history, and the branches of an open task.

        The model's own weights are not in it; save them beside it.
        """
        state = {"tasks": torch.tensor(self.tasks)}
        state.update({f"history/{name}": moment for name, moment in self.history.items()})
        return state if self._open is None else state | self._open.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state made by :meth:`state_dict` under the same settings.

        Parameters
        ----------
        state : mapping of str to Tensor
            Copied to the device of the model.

        Raises
        ------
        RuntimeError
            If a task is open.
        ValueError
            If the state belongs to other layers, or an open task to other settings.
        """
        self._require_closed()
        found = find_layers(self.model, self.settings.target)
        tasks, is_open = check_state(self.settings, found, state)
        if is_open:
            self._open = self._attach(first=tasks == 0)
            self._open.load_state_dict(state)
        self.history = {
            name: state[f"history/{name}"].to(layer.weight.device, copy=True)
            for name, layer in found.items()
            if tasks > 0
        }
        self.tasks = tasks

    def _attach(self, *, first: bool) -> OpenTask:
        return OpenTask(
            self.model,
            self.settings,
            self.trainable,
            self.forward,
            first=first,
            reduce=self.reduce,
        )

    def _task(self) -> OpenTask:
        if self._open is None:
            msg = "no task is open: call begin_task first"
            raise RuntimeError(msg)
        return self._open

    def _close(self) -> None:
        self._task().close()
        self._open = None

    def _require_closed(self) -> None:
        if self._open is not None:
            msg = "a task is open already: call end_task (or abandon_task) first"
            raise RuntimeError(msg)
