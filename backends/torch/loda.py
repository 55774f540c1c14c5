"""LoDA over a model: adapt it to one task after another without keeping old data."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backends.torch._checks import check_bases, check_state
from backends.torch.adapt import adapt, check_rank, find_layers, restore
from backends.torch.gao import AlignedStep, RowsLoss, draw_permutation, gradient_aligned_step
from backends.torch.lora import LoRALinear
from backends.torch.moments import Forward, collect_moments, default_forward
from backends.torch.record import TaskRecord
from backends.torch.settings import LoDASettings
from backends.torch.solve import solve_bases, solve_recalibration


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

    Attributes
    ----------
    history : dict of str to Tensor, shape (D, D)
        Sum of the mean second moments of past tasks by layer; empty before the first.
    tasks : int
        Tasks completed.
    layers : dict of str to LoRALinear
        The adapted layers during a task; empty between tasks.

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
    ) -> None:
        self.model = model
        self.settings = settings or LoDASettings()
        self.trainable = tuple(trainable)
        self.forward = forward
        self.history: dict[str, Tensor] = {}
        self.tasks = 0
        self.layers: dict[str, LoRALinear] = {}
        self._new: dict[str, Tensor] = {}
        self._required_grad: dict[nn.Parameter, bool] = {}
        check_rank(find_layers(model, self.settings.target), self.settings.rank)

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
            Bases by layer and branch to use instead of solving for them.

        Raises
        ------
        RuntimeError
            If a task is open already.
        ValueError
            If there is no batch, inputs are not finite, injected bases do not fit, or a pattern of
            ``trainable`` matches no parameter. The model is then as it was before the call.
        """
        self._require_open(False)
        found = find_layers(self.model, self.settings.target)
        if bases is not None:
            check_bases(self.settings, found, self.tasks, bases)
        self._attach()
        try:
            # Branches are not there yet, so this is a pass through the previous merged model.
            self._new = self._pass(batches)
            # The model may have moved to another device since the last task.
            self.history = {n: m.to(self._new[n].device) for n, m in self.history.items()}
            if bases is None:
                bases = solve_bases(
                    self.settings, self._new, self.history or None, self._gram_eps()
                )
            for name, layer in self.layers.items():
                for branch, basis in bases[name].items():
                    layer.add_branch(
                        branch,
                        basis.mT * self.settings.down_scale,
                        scale=self.settings.weight(branch),
                        train_down=self.tasks == 0,
                    )
        except BaseException:
            self._detach()
            raise

    def lora_parameters(self) -> list[nn.Parameter]:
        """The tensors of the branches that are trained in the open task."""
        self._require_open(True)
        return [p for layer in self.layers.values() for p in layer.parameters() if p.requires_grad]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Everything of the model that is trained in the open task."""
        self._require_open(True)
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
            Moments, branches and coefficients of the task, by layer.

        Raises
        ------
        RuntimeError
            If no task is open.
        ValueError, FloatingPointError
            If there is no batch, or moments or merged weights are not finite. The task then stays
            open and the weights are as before the call.
        """
        self._require_open(True)
        first = self.tasks == 0
        passes = self.settings.history
        form = None if first or "general" not in self.settings.names(first) else self.settings.form
        needs_trained = form is not None or passes in ("trained", "both")
        needs_merged = passes in ("merged", "both")
        if needs_trained and needs_merged and isinstance(batches, Iterator):
            msg = (
                f"end_task walks the batches twice, but a {type(batches).__name__} is used up "
                f"after one pass; pass a DataLoader or a list (the task stays open)"
            )
            raise ValueError(msg)
        trained = self._pass(batches) if needs_trained else {}
        coefficients: dict[str, Tensor] = {}
        if form is not None:
            factors = {
                name: (layer.branch("general").up, layer.branch("general").down)
                for name, layer in self.layers.items()
            }
            coefficients = solve_recalibration(
                form, self.settings.gamma, factors, trained, self.history
            )
        try:
            for name, layer in self.layers.items():
                layer.merge({"general": coefficients[name]} if name in coefficients else None)
            merged = self._pass(batches) if needs_merged else {}
            record = TaskRecord.of(self.layers, self._new, trained, merged, coefficients)
            history = {}
            for name in self.layers:
                parts = [trained[name]] if passes in ("trained", "both") else []
                parts += [merged[name]] if needs_merged else []
                past = self.history.get(name, torch.zeros_like(parts[0]))
                history[name] = sum(parts, start=past)
        except BaseException:
            for layer in self.layers.values():
                if layer.merged:
                    layer.unmerge()
            raise
        self.history = history
        self._detach()
        self.tasks += 1
        return record

    def abandon_task(self) -> None:
        """Drop the branches of the open task and restore the layers as they were before it.

        Parameters named by ``trainable`` keep what they learned.
        """
        self._require_open(True)
        self._detach()

    def state_dict(self) -> dict[str, Tensor]:
        """Flat state: tasks done, the history, and the branches of an open task.

        The model's own weights are not in it; save them beside it.
        """
        state = {"tasks": torch.tensor(self.tasks)}
        state.update({f"history/{name}": moment for name, moment in self.history.items()})
        for name, layer in self.layers.items():
            state[f"new/{name}"] = self._new[name]
            for branch in layer.branches:
                state[f"down/{branch}/{name}"] = layer.branch(branch).down.detach()
                state[f"up/{branch}/{name}"] = layer.branch(branch).up.detach()
        return state

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
        self._require_open(False)
        found = find_layers(self.model, self.settings.target)
        tasks, is_open = check_state(self.settings, found, state)
        device = {name: layer.weight.device for name, layer in found.items()}
        history, new = (
            {n: state[f"{kind}/{n}"].to(device[n], copy=True) for n in found if present}
            for kind, present in (("history", tasks > 0), ("new", is_open))
        )
        if is_open:
            self._attach()
            for name, layer in self.layers.items():
                for branch in self.settings.names(tasks == 0):
                    layer.add_branch(
                        branch,
                        state[f"down/{branch}/{name}"],
                        up=state[f"up/{branch}/{name}"],
                        scale=self.settings.weight(branch),
                        train_down=tasks == 0,
                    )
        self.tasks, self.history, self._new = tasks, history, new

    def _attach(self) -> None:
        """Put adapted layers in place, and freeze all but what ``trainable`` names."""
        named = list(self.model.named_parameters(remove_duplicate=False))
        for pattern in self.trainable:
            if not any(fnmatchcase(name, pattern) for name, _ in named):
                there = ", ".join(name for name, _ in named)
                msg = f"trainable pattern {pattern!r} matches no parameter; parameters: {there}"
                raise ValueError(msg)
        kept = {p for n, p in named if any(fnmatchcase(n, pattern) for pattern in self.trainable)}
        required = {parameter: parameter.requires_grad for _, parameter in named}
        self.layers = adapt(self.model, self.settings.target)
        self._required_grad = required
        kept -= {p for layer in self.layers.values() for p in layer.base.parameters()}
        for parameter, wanted in required.items():
            parameter.requires_grad_(wanted and parameter in kept)

    def _detach(self) -> None:
        restore(self.model, self.layers)
        for parameter, required in self._required_grad.items():
            parameter.requires_grad_(required)
        self.layers, self._new, self._required_grad = {}, {}, {}

    def _gram_eps(self) -> float:
        """Rounding unit of the collected Gram matrices: float32, or wider in a wider model."""
        dtypes = [layer.base.weight.dtype for layer in self.layers.values()]
        return max(torch.finfo(torch.promote_types(d, torch.float32)).eps for d in dtypes)

    def _pass(self, batches: Iterable[Any]) -> dict[str, Tensor]:
        moments = collect_moments(self.model, batches, self.settings.target, forward=self.forward)
        return {name: m.mean for name, m in moments.items()}

    def _require_open(self, wanted: bool) -> None:
        if bool(self.layers) != wanted:
            msg = (
                "no task is open: call begin_task first"
                if wanted
                else "a task is open already: call end_task (or abandon_task) first"
            )
            raise RuntimeError(msg)
