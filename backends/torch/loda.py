"""LoDA for a PyTorch model: adapt it to one task after another without keeping old data."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backends.torch.distributed import Reduce
from backends.torch.gao import AlignedStep, RowsLoss, draw_permutation, gradient_aligned_step
from backends.torch.layers import (
    adapt,
    check_rank,
    check_same_layers,
    check_weights,
    find_layers,
    restore,
)
from backends.torch.lora import LoRALinear, warn_of_rounding, weight_matrix
from backends.torch.moments import Forward, collect_halves, collect_moments, default_forward
from backends.torch.record import TaskRecord
from backends.torch.settings import LoDASettings
from backends.torch.solve import (
    HeldoutRatios,
    solve_bases,
    solve_effects,
    solve_heldout,
    solve_recalibration,
)
from loda_math import HeldoutRatio, History, UpdateEffect, remember, rounding_unit


@dataclass
class _OpenTask:
    """State between the beginning and the end of a task.

    Attributes
    ----------
    layers : dict of str to LoRALinear
        The adapted layers.
    requires_grad_before : dict of Parameter to bool
        ``requires_grad`` of every parameter of the model before the task.
    new : dict of str to Tensor, shape (D, D)
        Second moment of the new task that the directions were chosen from, by layer.
    heldout : dict of str to dict of str to HeldoutRatio
        By layer and branch; empty where it was not measured.
    """

    layers: dict[str, LoRALinear]
    requires_grad_before: dict[nn.Parameter, bool]
    new: dict[str, Tensor] = field(default_factory=dict)
    heldout: HeldoutRatios = field(default_factory=dict)


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
        ``end_task``, and to ``step`` the arguments that :func:`gradient_aligned_step` asks for.

    Attributes
    ----------
    history : dict of str to History
        Weighted sum of the mean second moments of past tasks by layer; empty before the first.
    tasks : int
        Tasks completed.
    masters : dict of str to Tensor, shape (out_features, in_features)
        Weights in float32 by layer, with the setting ``master`` and layers in half precision. Where
        a weight was changed between tasks, its master starts again from it.

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
        self.history: dict[str, History] = {}
        self.tasks = 0
        self._open: _OpenTask | None = None
        self.masters: dict[str, Tensor] = {}
        # Settings that do not fit the model should fail here, not after an hour of loading data.
        layers = self.target_layers()
        check_rank(layers, {n: own.rank for n, own in self.settings.by_layer(layers).items()})
        check_weights(model, layers, untie=self.settings.untie)

    @property
    def layers(self) -> dict[str, LoRALinear]:
        """The adapted layers during a task; empty between tasks."""
        return {} if self._open is None else self._open.layers

    def target_layers(self) -> dict[str, nn.Module]:
        """The layers that the settings name, adapted or not."""
        return find_layers(self.model, self.settings.target, self.settings.exclude)

    def lora_parameters(self) -> list[nn.Parameter]:
        """The tensors of the branches that are trained in the open task."""
        layers = self._require_open().layers.values()
        return [p for layer in layers for p in layer.parameters() if p.requires_grad]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Everything of the model that is trained in the open task."""
        self._require_open()
        return [p for p in self.model.parameters() if p.requires_grad]

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
            The task's training inputs; one pass collects their second moments.
        bases : mapping of str to mapping of str to Tensor, shape (D, r), optional
            Bases by layer and branch to use instead of solving for them; held-out ratios are
            then not measured.

        Raises
        ------
        RuntimeError
            If a task is open already.
        ValueError
            If there is no batch, inputs are not finite, given bases do not fit, the target layers
            are not those of the past tasks, or a pattern of ``trainable`` names no parameter that
            can be trained. The model is then as it was before the call.

        Warns
        -----
        UserWarning
            If a layer saw fewer tokens than a branch has directions.
        """
        self._require_closed()
        settings, first_task = self.settings, self.tasks == 0
        if self.history:
            totals = {name: past.total for name, past in self.history.items()}
            check_same_layers(self.target_layers(), totals)
        if bases is not None:
            self._check_bases(bases)
        task = self._open_task()
        try:
            # The model may have moved to another device since the last task.
            self.history = {
                name: past._replace(total=past.total.to(task.layers[name].frozen.device))
                for name, past in self.history.items()
            }
            # Directions with less energy than the rounding of the Gram matrices are noise. The
            # solvers of loda_math call this unit ``accumulation_eps``.
            gram_eps = rounding_unit(*(layer.frozen for layer in task.layers.values()))
            # Branches are not there yet, so this is a pass through the previous merged model.
            if settings.heldout and bases is None and not first_task:
                moments, halves = collect_halves(
                    self.model, batches, list(task.layers), forward=self.forward, reduce=self.reduce
                )
                task.new = {name: m.mean for name, m in moments.items()}
                task.heldout = solve_heldout(settings, halves, self.history, gram_eps)
            else:
                task.new = self._moments(batches)
            if bases is None:
                # Before the first task there is no history: None instead of an empty dict.
                bases = solve_bases(settings, task.new, self.history or None, gram_eps)
            for name in task.layers:
                for branch in settings.names(first_task):
                    down = bases[name][branch].mT * settings.down_scale
                    self._add_branch(name, branch, down, train_down=first_task)
        except BaseException:  # also for Ctrl-C during the pass
            self._close_task()
            raise

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

        Draws a permutation of the classes and a fraction of the radius, then calls
        :func:`gradient_aligned_step`.

        Parameters
        ----------
        loss, labels, optimizer, backward, skip_nonfinite
            As in :func:`gradient_aligned_step`.
        radius : float
            Largest radius ρ.
        permutation : Tensor, optional
            Classes in random order; drawn if not given.
        draw : float, optional
            u from 0 to 1, the fraction of the radius for this mini-batch; if not given, drawn
            uniformly from [0, 1).
        generator : torch.Generator, optional
            CPU generator for the two draws, the permutation first.

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
        # After the permutation: another order of the draws would change the results of a seed.
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
            The task's training inputs. Up to two passes are made (through the trained and through
            the merged model), so not an iterator that is used up after one pass.

        Returns
        -------
        TaskRecord
            Moments, branches, coefficients and their effect, by layer.

        Raises
        ------
        RuntimeError
            If no task is open.
        ValueError, FloatingPointError
            If there is no batch, or moments or merged weights are not finite. The task then stays
            open and the weights are as before the call.
        """
        task, settings, first_task = self._require_open(), self.settings, self.tasks == 0
        form = settings.form(first_task)  # of Λ; None if nothing is recalibrated
        # The pass through the trained model serves Λ, the history or both; the one through the
        # merged model serves the history only.
        passes = settings.passes()
        needs_trained = form is not None or "trained" in passes
        # Checked before the first pass, which may take an hour.
        if needs_trained and "merged" in passes and isinstance(batches, Iterator):
            msg = (
                f"end_task needs two passes over the batches, but a {type(batches).__name__} is "
                f"used up after one; pass a DataLoader or a list (the task stays open)"
            )
            raise ValueError(msg)
        moments: dict[str, dict[str, Tensor]] = {"trained": {}, "merged": {}}
        if needs_trained:
            moments["trained"] = self._moments(batches)
        coefficients: dict[str, Tensor] = {}
        effects: dict[str, UpdateEffect] = {}
        if not first_task:
            # Prefer the moments through the trained model: the branches have changed the inputs
            # of later layers.
            new = moments["trained"] or task.new
            if form is not None:
                coefficients = solve_recalibration(settings, form, task.layers, new, self.history)
            effects = solve_effects(task.layers, coefficients, new, self.history)
        try:
            for name, layer in task.layers.items():
                if name not in coefficients:  # nothing is recalibrated: Λ = I
                    layer.merge()
                elif settings.joint:  # one Λ (R, R) for all branches side by side
                    layer.merge(coefficients[name])
                else:  # Λ (r, r) of the general branch; the isolated one is merged as trained
                    layer.merge({"general": coefficients[name]})
            if "merged" in passes:
                moments["merged"] = self._moments(batches)
            record = TaskRecord.of(
                task.layers,
                new=task.new,
                trained=moments["trained"],
                merged=moments["merged"],
                coefficients=coefficients,
                heldout=task.heldout,
                effects=effects,
                rounding={n: x.rounding for n, x in task.layers.items() if x.rounding is not None},
            )
            # Every pass that the settings name adds its moment to the history of a layer.
            history = {
                name: remember(
                    self.history.get(name),
                    *(moments[kind][name] for kind in passes),
                    decay=settings.history_decay,
                )
                for name in moments[passes[0]]
            }
        except BaseException:  # the task stays open, as if end_task had not been called
            for layer in reversed(task.layers.values()):
                if layer.merged:
                    layer.unmerge()
            raise
        if not settings.master:
            warn_of_rounding(record.rounding)
        self.masters = {n: x.master for n, x in task.layers.items() if x.master is not None}
        self._close_task()
        self.history = history
        self.tasks += 1
        return record

    def abandon_task(self) -> None:
        """Drop the branches of the open task and restore the layers as they were before it.

        Parameters named by ``trainable`` keep what they learned.
        """
        self._close_task()

    def state_dict(self) -> dict[str, Tensor]:
        """Flat state: tasks completed, the history, and an open task with its branches.

        The model's own weights are not in it; save them as well.
        """
        state = {"tasks": torch.tensor(self.tasks)}
        state |= {f"history/{name}": past.total for name, past in self.history.items()}
        state |= {f"master/{name}": weight for name, weight in self.masters.items()}
        for name, layer in self.layers.items():
            task = self._require_open()
            state[f"new/{name}"] = task.new[name]
            for branch in layer.branches:
                state[f"down/{branch}/{name}"] = layer.branch(branch).down.detach()
                state[f"up/{branch}/{name}"] = layer.branch(branch).up.detach()
            for branch, ratio in task.heldout.get(name, {}).items():
                state[f"heldout/{branch}/{name}"] = torch.stack(list(ratio))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state made by :meth:`state_dict` under the same settings.

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
        self._check_state(state)
        tasks = int(state["tasks"])
        self.masters = {
            name: state[f"master/{name}"].to(weight_matrix(layer).device, copy=True)
            for name, layer in self.target_layers().items()
            if f"master/{name}" in state
        }
        if any(key.startswith("new/") for key in state):
            task = self._open_task()
            # The moment in the state replaces the pass over the task's images.
            for name, layer in task.layers.items():
                device = layer.frozen.device
                task.new[name] = state[f"new/{name}"].to(device, copy=True)
                for branch in self.settings.names(tasks == 0):
                    down, up = (state[f"{part}/{branch}/{name}"] for part in ("down", "up"))
                    self._add_branch(name, branch, down, up, train_down=tasks == 0)
                    ratio = state.get(f"heldout/{branch}/{name}")
                    if ratio is not None:
                        values = HeldoutRatio(*ratio.to(device, copy=True))
                        task.heldout.setdefault(name, {})[branch] = values
        # Only the totals are saved. The weights of a history depend only on the number of tasks,
        # so a dummy history of as many zero moments provides them.
        zeros, past = [torch.zeros(1, 1) for _ in self.settings.passes()], None
        for _ in range(tasks):
            past = remember(past, *zeros, decay=self.settings.history_decay)
        self.history = {}
        for name, module in self.target_layers().items():
            if past is not None:
                total = state[f"history/{name}"].to(weight_matrix(module).device, copy=True)
                self.history[name] = past._replace(total=total)
        self.tasks = tasks

    def _open_task(self) -> _OpenTask:
        """Put adapted layers in place and freeze every parameter that the task does not train."""
        model, settings = self.model, self.settings
        # Include every name of a shared parameter: a pattern may match any of them.
        named = list(model.named_parameters(remove_duplicate=False))
        found = self.target_layers()
        frozen = {parameter for layer in found.values() for parameter in layer.parameters()}
        trained: set[nn.Parameter] = set()
        for pattern in self.trainable:
            meant = [(name, p) for name, p in named if fnmatchcase(name, pattern)]
            # A target layer stays frozen even if a pattern matches it.
            free = {p for _, p in meant if p not in frozen and p.is_floating_point()}
            if not free:
                names = ", ".join(name for name, _ in meant or named)
                why = (
                    "matches none but frozen ones" if meant else "matches no parameter; parameters"
                )
                msg = f"trainable pattern {pattern!r} {why}: {names}"
                raise ValueError(msg)
            trained |= free
        requires_grad_before = {parameter: parameter.requires_grad for _, parameter in named}
        layers = adapt(model, list(found), untie=settings.untie, masters=self._masters(found))
        # Target layers that were given a weight of their own have new parameters.
        untied = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in named:
            new = untied.get(name)
            if new is not None and new is not parameter:
                requires_grad_before[new] = requires_grad_before[parameter]
        for parameter in requires_grad_before:
            # Also what was frozen before: a parameter that is named is trained.
            parameter.requires_grad_(parameter in trained)
        self._open = _OpenTask(layers, requires_grad_before)
        return self._open

    def _masters(self, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Weights in float32 of layers in half precision, if the settings ask for them."""
        masters: dict[str, Tensor] = {}
        for name, layer in layers.items() if self.settings.master else ():
            weight = weight_matrix(layer).detach()
            if weight.element_size() >= torch.float32.itemsize:
                continue
            master = self.masters.get(name)
            # A weight that was changed between tasks has left its master behind.
            if master is None or not torch.equal(master.to(weight), weight):
                master = weight.float()
            masters[name] = master.to(weight.device)
        return masters

    def _add_branch(
        self, name: str, branch: str, down: Tensor, up: Tensor | None = None, *, train_down: bool
    ) -> None:
        scale = self.settings.by_layer(self.layers)[name].weight(branch)
        self.layers[name].add_branch(branch, down, up=up, scale=scale, train_down=train_down)

    def _moments(self, batches: Iterable[Any]) -> dict[str, Tensor]:
        """Mean second moments of the inputs of the layers, as the model is now."""
        moments = collect_moments(
            self.model, batches, list(self.layers), forward=self.forward, reduce=self.reduce
        )
        return {name: m.mean for name, m in moments.items()}

    def _close_task(self) -> None:
        """Put the original layers back and restore every ``requires_grad`` flag."""
        task = self._require_open()
        restore(self.model, task.layers)
        for parameter, required in task.requires_grad_before.items():
            parameter.requires_grad_(required)
        self._open = None

    def _require_open(self) -> _OpenTask:
        if self._open is None:
            msg = "no task is open: call begin_task first"
            raise RuntimeError(msg)
        return self._open

    def _require_closed(self) -> None:
        if self._open is not None:
            msg = "a task is open already: call end_task (or abandon_task) first"
            raise RuntimeError(msg)

    def _check_bases(self, bases: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Refuse given bases that do not fit the branches of the coming task."""
        layers = self.target_layers()
        own = self.settings.by_layer(layers)
        if set(bases) != set(layers):
            msg = f"bases must name the layers {sorted(layers)}, got {sorted(bases)}"
            raise ValueError(msg)
        branches = self.settings.names(self.tasks == 0)
        for name, given in bases.items():
            shapes = {branch: tuple(basis.shape) for branch, basis in given.items()}
            width = weight_matrix(layers[name]).shape[1]
            expected = dict.fromkeys(branches, (width, own[name].rank))
            if shapes != expected:
                msg = f"bases of layer {name!r} must have shapes {expected}, got {shapes}"
                raise ValueError(msg)
            if not all(bool(basis.isfinite().all()) for basis in given.values()):
                msg = f"bases of layer {name!r} must be finite, got NaN or infinite values"
                raise ValueError(msg)

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a state whose entries or shapes are not those of these layers and settings."""
        # A missing task count is refused below, with the other missing entries.
        tasks = int(state["tasks"]) if "tasks" in state else -1
        is_open = any(key.startswith("new/") for key in state)
        expected: dict[str, tuple[int, ...]] = {"tasks": ()}
        layers = self.target_layers()
        own = self.settings.by_layer(layers)
        for name, layer in layers.items():
            outputs, size = weight_matrix(layer).shape
            if f"master/{name}" in state:  # only of layers in half precision
                expected[f"master/{name}"] = (outputs, size)
            if tasks > 0:
                expected[f"history/{name}"] = (size, size)
            if not is_open:
                continue
            expected[f"new/{name}"] = (size, size)
            for branch in self.settings.names(tasks == 0):
                expected[f"down/{branch}/{name}"] = (own[name].rank, size)
                expected[f"up/{branch}/{name}"] = (outputs, own[name].rank)
                ratio = f"heldout/{branch}/{name}"
                if ratio in state:  # only if the open task measured it
                    expected[ratio] = (len(HeldoutRatio._fields),)
        for key, value in state.items():
            # torch supports hardly any arithmetic on 8-bit floats.
            if key != "tasks" and not (value.is_floating_point() and value.element_size() > 1):
                msg = f"{key} of the state must be floats of 16 bits or more, got {value.dtype}"
                raise ValueError(msg)
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        if tasks < 0 or shapes != expected:
            unlike = sorted(set(shapes.items()) ^ set(expected.items()))
            msg = (
                f"the state does not fit this model and these settings; first entries (with "
                f"shapes) that only one of them has: {unlike[:6]}; tasks completed: "
                f"{tasks if 'tasks' in state else 'unknown'}"
            )
            raise ValueError(msg)
