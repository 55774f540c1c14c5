"""LoDA over a model: adapt it to one task after another without keeping old data."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from backends.torch._checks import check_bases
from backends.torch.adapt import find_layers
from backends.torch.finish import finish
from backends.torch.gao import draw_permutation, gradient_aligned_step
from backends.torch.record import TaskRecord
from backends.torch.state import LoDAState
from backends.torch.step import AlignedStep, RowsLoss


class LoDA(LoDAState):
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
    >>> from backends.torch import LoDASettings
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
        record, self.history = finish(self._task(), self.history, self.tasks, batches)
        self._close()
        self.tasks += 1
        return record

    def abandon_task(self) -> None:
        """Drop the branches of the open task and restore the layers as they were before it.

        Parameters named by ``trainable`` keep what they learned.
        """
        self._close()
