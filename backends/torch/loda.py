"""LoDA for a PyTorch model: adapt it to one task after another without keeping old data."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Self
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from backends.torch.distributed import (
    Reduce,
    copy_from_first,
    gather,
    several_processes,
    sum_over_processes,
    unshared,
)
from backends.torch.gao import (
    AlignedStep,
    Groups,
    Halves,
    RowsLoss,
    Window,
    check_radius,
    draw_permutation,
    gradient_aligned_step,
    held_parameters,
)
from backends.torch.layers import (
    adapt,
    check_rank,
    check_same_layers,
    check_weights,
    find_layers,
    restore,
    untie,
)
from backends.torch.lora import LoRALinear, warn_of_rounding, warn_of_size, weight_matrix
from backends.torch.moments import Forward, Masks, collect_halves, collect_moments, default_forward
from backends.torch.record import TaskRecord
from backends.torch.running_statistics import RunningStatistics
from backends.torch.settings import LoDASettings
from backends.torch.solve import (
    HeldoutRatios,
    solve_bases,
    solve_effects,
    solve_heldout,
    solve_recalibration,
)
from backends.torch.state import (
    check_entries,
    check_settings,
    holds_open_task,
    read_history,
    write_open_task,
    write_settings,
)
from loda_math import HeldoutRatio, History, Moments, UpdateEffect, remember, rounding_unit


@dataclass
class _OpenTask:
    """State between the beginning and the end of a task."""

    layers: dict[str, LoRALinear]
    requires_grad_before: dict[nn.Parameter, bool]  # of all parameters of the model
    begun: dict[nn.Parameter, Tensor]  # what ``trainable`` names, as it was at the beginning
    statistics: RunningStatistics  # of the model's batch norms
    # Second moments (D, D) that the directions were chosen from, while something needs them.
    new: dict[str, Tensor] = field(default_factory=dict)
    heldout: HeldoutRatios = field(default_factory=dict)  # empty where it was not measured
    halves: "ReferenceType[Halves] | None" = None  # the newest step in phases
    copied: set[int] = field(default_factory=set)  # ids of tensors copied from the first process
    closed: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a file of the model has no part in a step, and weak references cannot be saved.
        return {**self.__dict__, "halves": None}

    def gram_eps(self) -> float:
        """Rounding unit of the Gram matrices: directions with less energy than that are noise.

        The solvers of loda_math call it ``accumulation_eps``.
        """
        return rounding_unit(*(layer.frozen for layer in self.layers.values()))

    def step_in_progress(self) -> Halves | None:
        """The step in phases whose branches are moved at the moment."""
        halves = None if self.halves is None else self.halves()
        return halves if halves is not None and halves.in_progress else None

    def close(self, model: nn.Module) -> None:
        """Put the original layers back and restore every ``requires_grad`` flag."""
        halves = self.step_in_progress()
        if halves is not None:
            halves.abandon()
        restore(model, self.layers)
        for parameter, required in self.requires_grad_before.items():
            parameter.requires_grad_(required)
        self.statistics.release()
        self.closed = True
        model.__dict__.pop(_MARK, None)
        _ADAPTED.discard(model)
        # Weights that were merged may have been cast before.
        torch.clear_autocast_cache()


# The open task of a model is an attribute of it, so that it is found where its LoDA is lost, and
# copied with it. The set finds models of which another one is a part.
_MARK = "_loda_task"
_ADAPTED: WeakSet[nn.Module] = WeakSet()


class LoDA:
    """Low-rank decomposition and adaptation of a model to a stream of tasks.

    Between tasks the model has its original modules, parameter names and size. During a task its
    target layers carry the branches, and every other parameter is frozen.

    Parameters
    ----------
    model : nn.Module
        Any module with linear layers; adapted in place. Of ``DistributedDataParallel`` the module
        inside is meant.
    settings : LoDASettings, optional
        Rank, branches, recalibration and the layers to adapt.
    trainable : sequence of str
        Patterns over names of the model's own parameters that are trained during a task (the
        classifier, if it is part of the model), also if they were frozen before. Target layers stay
        frozen.
    forward : callable, optional
        ``forward(model, batch)`` for the passes that collect moments; by default the model is
        called on the batch, or on the first element of a tuple.
    mask : str, callable or mapping, optional
        Tokens that count in the second moments, such as ``"attention_mask"`` where others are
        padding, as in :func:`collect_moments`.
    moment_device : device, optional
        Where second moments and the history are between the passes and solves, such as ``"cpu"``
        to save memory of the device; by default where the layer is. Sums are formed and solves run
        on the device of the layer.
    record_moments : bool
        Keep the second moments of a task in its record, for analysis. They are then in memory as
        long as the record, and at the end of a task there are up to five matrices (D, D) a layer
        at once; without them at most three.
    reduce : callable, optional
        Sums the second moments over the processes that train the model together. By default, if
        ``torch.distributed`` has several processes, moments, look-ahead and gradients are summed
        over them, and weights and new branches are those of the first one; every process passes
        batches of its own to ``begin_task``, ``end_task`` and ``step``. :func:`unshared` shares
        nothing.
    **options
        Fields of :class:`LoDASettings`, such as ``rank=16``, in place of those of ``settings``.

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
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    >>> x, y = torch.randn(32, 8), torch.randint(4, (32,))
    >>> loda = LoDA(model, target="0", rank=2, radius=0.1, trainable=["2.*"])
    >>> loss = lambda rows: nn.functional.cross_entropy(model(x[rows]), y[rows])
    >>> for number in range(2):
    ...     with loda.task([x]) as task:
    ...         optimizer = torch.optim.SGD(task.parameters(lr=0.1, head_lr=0.01))
    ...         step = task.step(loss, y, optimizer)
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
        mask: Masks | None = None,
        moment_device: torch.device | str | None = None,
        record_moments: bool = False,
        reduce: Reduce | None = None,
        **options: Any,
    ) -> None:
        self.model: nn.Module = _inside(model)
        self.settings = replace(settings or LoDASettings(), **options)
        _require_free(self.model)
        self.trainable = tuple(trainable)
        self.forward = forward
        self.mask = mask
        self.moment_device = None if moment_device is None else torch.device(moment_device)
        self.record_moments = record_moments
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
        return self._require_open().layers if self.is_open else {}

    @property
    def is_open(self) -> bool:
        """Whether a task is open."""
        return self._open is not None and not self._open.closed

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
        return list(self._named_trained().values())

    def _named_trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def parameters(
        self,
        lr: float | None = None,
        head_lr: float | None = None,
        *,
        head: Iterable[nn.Parameter] = (),
    ) -> list[dict[str, Any]]:
        """Groups for an optimiser: the branches of the open task, and the head.

        Parameters
        ----------
        lr : float, optional
            Learning rate; that of the optimiser by default.
        head_lr : float, optional
            Learning rate of the head, if it is another one.
        head : iterable of Parameter
            Trained tensors outside the model. The head is made of these and of what ``trainable``
            names.

        Returns
        -------
        list of dict
            The branches first.

        Raises
        ------
        RuntimeError
            If no task is open.
        ValueError
            If there is a learning rate for a head, but no head.
        """
        branches = self.lora_parameters()
        trained = {id(p): p for p in (*branches, *self.trainable_parameters(), *head)}
        rest = list(trained.values())[len(branches) :]
        groups: list[dict[str, Any]] = [{"params": branches}]
        if rest:
            groups.append({"params": rest})
        elif head_lr is not None:
            msg = (
                f"head_lr must be left out where there is no head, got {head_lr}; name the head "
                f"with trainable, or pass head="
            )
            raise ValueError(msg)
        rates = (lr, lr if head_lr is None else head_lr)
        for group, rate in zip(groups, rates, strict=False):
            if rate is not None:
                group["lr"] = rate
        return groups

    def task(
        self,
        batches: Iterable[Any],
        *,
        bases: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> "Task":
        """A task as a context: begun when it is entered, ended when it is left.

        An error inside abandons the task: the model is then as it was before, but for what
        ``trainable`` names.

        Parameters
        ----------
        batches : iterable
            The task's training inputs, walked at the beginning and at the end; not an iterator
            that is used up after one pass.
        bases : mapping, optional
            As in :meth:`begin_task`.

        Returns
        -------
        Task

        Raises
        ------
        ValueError
            If ``batches`` is an iterator; when it is entered and left, as :meth:`begin_task` and
            :meth:`end_task`. If the end fails, nothing that was learned is lost: the task stays
            open, and ``end_task`` can be called again.

        Examples
        --------
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        >>> loda = LoDA(model, target="0", rank=2)
        >>> with loda.task([torch.randn(32, 8)]) as task:
        ...     optimizer = torch.optim.SGD(task.parameters(lr=0.1))
        >>> list(task.record.downs["0"])
        ['general']
        """
        if isinstance(batches, Iterator):
            msg = (
                f"a task walks its batches several times, but a {type(batches).__name__} is used "
                f"up after one pass; pass a DataLoader or a list"
            )
            raise ValueError(msg)  # noqa: TRY004 - as end_task does
        return Task(self, batches, bases)

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
            If a task is open already, also one of another LoDA on this model.
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
        self._copy_model()
        if self.history:
            totals = {name: past.total for name, past in self.history.items()}
            check_same_layers(self.target_layers(), totals)
        if bases is not None:
            self._check_bases(bases)
        task = self._open_task()
        try:
            # The model may have moved to another device since the last task.
            self.history = {
                name: past._replace(total=self._placed(task.layers[name], past.total))
                for name, past in self.history.items()
            }
            devices = {name: layer.frozen.device for name, layer in task.layers.items()}
            gram_eps = task.gram_eps()
            # Branches are not there yet, so this is a pass through the previous merged model.
            if settings.heldout and bases is None and not first_task:
                moments, halves = self._collect(batches, collect_halves)
                task.heldout = solve_heldout(settings, halves, self.history, gram_eps, devices)
                del halves
            else:
                moments = self._collect(batches)
            counts = {name: m.count for name, m in moments.items()}
            task.new = self._means(moments)
            if bases is None:
                self._warn_of_few_tokens(counts)
                # Before the first task there is no history: None instead of an empty dict.
                bases = solve_bases(settings, task.new, self.history or None, gram_eps, devices)
            if not self._needs_new(self.tasks):
                task.new = {}
            for name in task.layers:
                for branch in settings.names(first_task):
                    down = bases[name][branch].mT * settings.down_scale
                    self._add_branch(name, branch, down, train_down=first_task)
            if self._shares():
                branches = (x.branch(b) for x in task.layers.values() for b in x.branches)
                copy_from_first([branch.down for branch in branches])
        except BaseException:  # also for Ctrl-C during the pass
            self._close_task()
            raise

    def step(
        self,
        loss: RowsLoss,
        labels: Groups,
        optimizer: Optimizer,
        *,
        radius: float | None = None,
        permutation: Tensor | None = None,
        draw: float | None = None,
        generator: torch.Generator | None = None,
        backward: Callable[[Tensor], None] | None = None,
        skip_nonfinite: bool = False,
    ) -> AlignedStep:
        """One mini-batch of gradient-aligned optimisation over the branches.

        Draws a permutation of the classes and a fraction of the radius, then takes the step of
        :func:`gradient_aligned_step`. If several processes train the model, the halves are drawn
        over the mini-batches of all of them.

        Parameters
        ----------
        loss : callable
            ``loss(rows)``: mean loss over those rows of the mini-batch of this process. ``rows``
            is an int64 tensor on the device of ``labels``, with at least one element.
        labels : Tensor of shape (N,), or int
            Classes of the mini-batch, or any other integers that group its rows; keep them on the
            CPU to save a synchronisation. A number of rows stands for halves drawn at random.
        optimizer, backward, skip_nonfinite
            As in :func:`gradient_aligned_step`.
        radius : float, optional
            Largest radius ρ; that of the settings by default.
        permutation : Tensor, optional
            Classes in random order; drawn if not given.
        draw : float, optional
            u from 0 to 1, the fraction of the radius for this mini-batch; if not given, drawn
            uniformly from [0, 1).
        generator : torch.Generator, optional
            CPU generator for the two draws, the permutation first. With several processes the
            draws are those of the first.

        Returns
        -------
        AlignedStep

        Raises
        ------
        RuntimeError
            If no task is open, or as :func:`gradient_aligned_step`: also if something that
            ``trainable`` names gets a gradient, but is not in the optimiser.
        ValueError
            As :func:`gradient_aligned_step`.

        See Also
        --------
        halves : the same step in phases, for loops that accumulate, clip or scale gradients.
        """
        moved = self._prepare_step(optimizer)
        shares = self._shares()
        window = Window([labels], shared=shares)  # on the CPU; this reads the device once
        length, order = self._draw(window.labels, radius, permutation, draw, generator)
        device = labels.device if isinstance(labels, Tensor) else torch.device("cpu")
        return gradient_aligned_step(
            _own_part(loss, window, device, moved[0]),
            window.labels,
            optimizer,
            moved,
            radius=length,
            permutation=order,
            backward=backward,
            skip_nonfinite=skip_nonfinite,
            reduce=sum_over_processes if shares else unshared,
            others=self._named_trained(),
        )

    def halves(
        self,
        groups: Groups | Sequence[Groups],
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        radius: float | None = None,
        permutation: Tensor | None = None,
        draw: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Halves:
        """The gradient-aligned step in phases: for accumulation, clipping and loss scaling.

        Parameters
        ----------
        groups : Tensor of shape (N,), int, or a sequence of these
            Labels of the mini-batch of this process, or any other integers that group its rows; a
            number of rows for halves drawn at random. A sequence for the mini-batches of a window
            whose gradients are accumulated. Halves are drawn over the window and all processes.
        optimizer : Optimizer or sequence of Optimizer
            All that step.
        radius, permutation, draw, generator
            As in :meth:`step`.

        Returns
        -------
        Halves
            To be iterated once.

        Raises
        ------
        RuntimeError
            If no task is open, or as :class:`Halves`.
        ValueError, TypeError
            As :class:`Halves`.

        Examples
        --------
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        >>> loda = LoDA(model, target="0", rank=2)
        >>> batches = [(torch.randn(6, 8), torch.arange(6) % 4) for _ in range(3)]
        >>> def backward(part):
        ...     x, y = batches[part.batch]
        ...     logits = model(x[part.rows])
        ...     (part.weight * torch.nn.functional.cross_entropy(logits, y[part.rows])).backward()
        >>> with loda.task([x for x, _ in batches]) as task:
        ...     optimizer = torch.optim.SGD(task.parameters(lr=0.1))
        ...     for half in task.halves([y for _, y in batches], optimizer):
        ...         for part in half.source:
        ...             backward(part)
        ...         half.look_ahead()
        ...         for part in half.target:
        ...             backward(part)
        ...         half.share()
        ...         _ = torch.nn.utils.clip_grad_norm_(task.trainable_parameters(), 1.0)
        ...         optimizer.step()
        ...         half.restore()
        """
        optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        moved = self._prepare_step(*optimizers)
        window = Window(groups, shared=self._shares())
        length, order = self._draw(window.labels, radius, permutation, draw, generator)
        halves = Halves(
            window,
            optimizers,
            moved,
            radius=length,
            permutation=order,
            reduce=sum_over_processes if self._shares() else unshared,
            others=self._named_trained(),
        )
        self._require_open().halves = ref(halves)
        return halves

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
            If no task is open, or several processes have trained different branches.
        ValueError, FloatingPointError
            If there is no batch, or moments or merged weights are not finite. The task then stays
            open and the weights are as before the call.

        Warns
        -----
        UserWarning
            If something that trains had a gradient but is what it was at the beginning, or a
            weight in half precision took up only a part of its update.
        LargeUpdateWarning
            If the update is larger than the weights of the layers, ‖ΔW‖ > ‖W‖.
        """
        task, settings, first_task = self._require_open(), self.settings, self.tasks == 0
        self._require_restored()
        _require_no_inference_mode()
        form = settings.form(first_task)  # of Λ; None if nothing is recalibrated
        # The pass through the trained model serves Λ, the history or both; the one through the
        # merged model serves the history only.
        passes = settings.passes()
        needs_trained = self._needs_trained(self.tasks)
        # Checked before the first pass, which may take an hour.
        if needs_trained and "merged" in passes and isinstance(batches, Iterator):
            msg = (
                f"end_task needs two passes over the batches, but a {type(batches).__name__} is "
                f"used up after one; pass a DataLoader or a list (the task stays open)"
            )
            raise ValueError(msg)
        if self._shares():
            self._require_same_branches()
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
                coefficients = solve_recalibration(
                    settings, form, task.layers, new, self.history, task.gram_eps()
                )
            effects = solve_effects(task.layers, coefficients, new, self.history)
            del new
        # These matrices are most of the memory of a task, so they go as soon as they are used.
        if "trained" not in passes and not self.record_moments:
            moments["trained"] = {}
        try:
            for name, layer in task.layers.items():
                if name not in coefficients:  # nothing is recalibrated: Λ = I
                    layer.stage()
                elif settings.joint:  # one Λ (R, R) for all branches side by side
                    layer.stage(coefficients[name])
                else:  # Λ (r, r) of the general branch; the isolated one is merged as trained
                    layer.stage({"general": coefficients[name]})
            if "merged" in passes:
                moments["merged"] = self._moments(batches)
            recorded = {"new": task.new, **moments} if self.record_moments else {}
            record = TaskRecord.of(
                task.layers,
                **{kind: dict(of_layers) for kind, of_layers in recorded.items()},
                coefficients=coefficients,
                heldout=task.heldout,
                effects=effects,
                rounding={n: x.rounding for n, x in task.layers.items() if x.rounding is not None},
            )
            # Every pass that the settings name adds its moment to the history of a layer.
            history = {
                name: self._remember(name, *(moments[kind].pop(name) for kind in passes))
                for name in task.layers
            }
        except BaseException:  # the task stays open, as if end_task had not been called
            for layer in task.layers.values():
                layer.unstage()
            raise
        interrupt = _commit(task.layers.values())
        self.masters = {n: x.master for n, x in task.layers.items() if x.master is not None}
        unchanged = self._unchanged(task)
        self._close_task()
        self.history = history
        self.tasks += 1
        self._copy_model()
        if interrupt is not None:
            raise interrupt
        if not settings.master:
            warn_of_rounding(record.rounding)
        warn_of_size(task.layers.values())
        if unchanged:
            more = f" and {len(unchanged) - 4} more" if len(unchanged) > 4 else ""
            msg = (
                f"{', '.join(unchanged[:4])}{more} had gradients but did not change in this task: "
                f"make the optimiser inside it from task.parameters(), with a rate above 0"
            )
            warnings.warn(msg, stacklevel=3)  # behind the frame of torch.no_grad
        return record

    def _unchanged(self, task: _OpenTask) -> list[str]:
        """Names of what should have been trained and has a gradient, but never moved."""
        return [
            name
            for name, p in self._named_trained().items()
            # Up-projections begin at zero. A part that the loss does not use has no gradient.
            if p.grad is not None
            and torch.equal(p, task.begun.get(p, torch.zeros_like(p)))
            and bool(p.grad.any())
        ]

    def abandon_task(self) -> None:
        """Drop the branches of the open task and restore the layers as they were before it.

        Parameters named by ``trainable`` keep what they learned. Running statistics that were let
        move are those from before the task again.
        """
        statistics = self._require_open().statistics
        self._close_task()
        statistics.put_back()

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Abandon the open task of a model whose LoDA object is lost, as in a notebook.

        Parameters
        ----------
        model : nn.Module
            Is as it was before the task afterwards, but for what ``trainable`` named. Nothing
            happens if no task is open on it.

        Examples
        --------
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> LoDA(model, target="0", rank=2).begin_task([torch.randn(32, 8)])
        >>> LoDA.detach(model)
        >>> model
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )
        """
        for owner in _adapted_models(_inside(model)):
            task: _OpenTask = owner.__dict__[_MARK]
            task.close(owner)
            task.statistics.put_back()

    def state_dict(self) -> dict[str, Tensor]:
        """Flat state: settings, tasks completed, the history, and an open task with its branches.

        The model's own weights are not in it; save them as well.
        """
        self._require_restored()
        state = {
            "settings": write_settings(self.settings, self.trainable),
            "tasks": torch.tensor(self.tasks),
        }
        state |= {f"history/{name}": past.total for name, past in self.history.items()}
        state |= {f"master/{name}": weight for name, weight in self.masters.items()}
        if self.is_open:
            task = self._require_open()
            state |= write_open_task(task.layers, task.new, task.heldout)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """Load a state made by :meth:`state_dict` under the same settings.

        Parameters
        ----------
        state : mapping of str to Tensor
            Copied to the device of the model.
        strict : bool, default True
            Refuse a state that was made under other settings. Without it later tasks may have
            other settings than the past ones, but for those that shape the history; an open task
            may not.

        Raises
        ------
        RuntimeError
            If a task is open, also one of another LoDA on this model.
        ValueError
            If the state belongs to other layers or settings.
        """
        self._require_closed()
        check_settings(state, self.settings, self.trainable, strict=strict)
        tasks, layers = int(state.get("tasks", -1)), self.target_layers()
        check_entries(state, self.settings, layers, needs_new=self._needs_new(tasks))
        self.masters = {
            name: state[f"master/{name}"].to(weight_matrix(layer).device, copy=True)
            for name, layer in layers.items()
            if f"master/{name}" in state
        }
        if holds_open_task(state):
            task = self._open_task()
            # The moment in the state replaces the pass over the task's images.
            for name, layer in task.layers.items():
                device = layer.frozen.device
                # Whatever weights the model has now: its own are loaded later.
                layer.master = self.masters.get(name)
                if self._needs_new(tasks):
                    task.new[name] = self._placed(layer, state[f"new/{name}"].clone())
                for branch in self.settings.names(tasks == 0):
                    down, up = (state[f"{part}/{branch}/{name}"] for part in ("down", "up"))
                    self._add_branch(name, branch, down, up, train_down=tasks == 0)
                    ratio = state.get(f"heldout/{branch}/{name}")
                    if ratio is not None:
                        values = HeldoutRatio(*ratio.to(device, copy=True))
                        task.heldout.setdefault(name, {})[branch] = values
        self.history = {}
        for name, module in layers.items() if tasks else ():
            total = self._placed(module, state[f"history/{name}"].clone())
            self.history[name] = read_history(total, tasks, module, self.settings)
        self.tasks = tasks

    def _open_task(self) -> _OpenTask:
        """Put adapted layers in place and freeze every parameter that the task does not train."""
        model, settings = self.model, self.settings
        found = self.target_layers()
        if settings.untie:
            untie(model, found)
        # Include every name of a shared parameter: a pattern may match any of them.
        named = list(model.named_parameters(remove_duplicate=False))
        frozen = {parameter for layer in found.values() for parameter in layer.parameters()}
        trained: set[nn.Parameter] = set()
        for pattern in self.trainable:
            meant = [(name, p) for name, p in named if fnmatchcase(name, pattern)]
            # A target layer stays frozen even if a pattern matches it.
            free = {p for _, p in meant if p not in frozen and p.is_floating_point()}
            if not free:
                names = ", ".join(name for name, _ in meant or named)
                why = "only those of target layers" if meant else "no parameter; parameters here"
                cure = "exclude these layers from the target" if meant else "correct the pattern"
                msg = f"trainable pattern {pattern!r} matches {why}: {names}; {cure}"
                raise ValueError(msg)
            trained |= free
        requires_grad_before = {parameter: parameter.requires_grad for _, parameter in named}
        begun = {parameter: parameter.detach().clone() for parameter in trained}
        layers = adapt(model, list(found), masters=self._masters(found))
        for parameter in requires_grad_before:
            # Also what was frozen before: a parameter that is named is trained.
            parameter.requires_grad_(parameter in trained)
        statistics = RunningStatistics(model, freeze=settings.freeze_statistics)
        self._open = _OpenTask(layers, requires_grad_before, begun, statistics)
        model.__dict__[_MARK] = self._open
        _ADAPTED.add(model)
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
        return self._means(self._collect(batches))

    def _collect(
        self, batches: Iterable[Any], collect: Callable[..., Any] = collect_moments
    ) -> Any:
        return collect(
            self.model,
            batches,
            list(self.layers),
            forward=self.forward,
            mask=self.mask,
            reduce=self.reduce,
        )

    def _means(self, moments: dict[str, Moments]) -> dict[str, Tensor]:
        """Means as they are stored; the moments are used up, one layer after another."""
        layers = self.layers
        return {name: self._placed(layers[name], moments.pop(name).mean) for name in list(moments)}

    def _placed(self, layer: nn.Module, moment: Tensor) -> Tensor:
        """A second moment of a layer on the device and in the type that it is stored in."""
        device = self.moment_device or weight_matrix(layer).device
        # Not for float64, which some devices do not have.
        single = self.settings.moment_dtype == "float32"
        return moment.to(device, torch.float32 if single else moment.dtype)

    def _remember(self, name: str, *means: Tensor) -> History:
        """The history of a layer with the moments of one more task."""
        unit = rounding_unit(self.layers[name].frozen)
        moments = [Moments(mean, 1, None, unit) for mean in means]
        decay = self.settings.history_decay
        history = remember(self.history.get(name), *moments, decay=decay)
        return history._replace(total=self._placed(self.layers[name], history.total))

    def _needs_trained(self, tasks: int) -> bool:
        """Whether a task ends with a pass through the trained model."""
        settings = self.settings
        return settings.form(tasks == 0) is not None or "trained" in settings.passes()

    def _needs_new(self, tasks: int) -> bool:
        """Whether the end of a task needs the moments that its directions were chosen from."""
        return self.record_moments or (tasks > 0 and not self._needs_trained(tasks))

    def _warn_of_few_tokens(self, counts: Mapping[str, int | Tensor]) -> None:
        """Warn of layers with fewer tokens than directions: some of these mean nothing."""
        ranks = {name: own.rank for name, own in self.settings.by_layer(self.layers).items()}
        few = {name: int(count) for name, count in counts.items() if int(count) < ranks[name]}
        if few:
            worst = min(few, key=few.__getitem__)
            msg = (
                f"rank should be at most the number of tokens, got rank {ranks[worst]} and "
                f"{few[worst]} tokens in layer {worst!r} (too few in {len(few)} of {len(counts)} "
                f"layers): the other directions carry nothing; give more data or lower the rank"
            )
            warnings.warn(msg, stacklevel=3)

    def _close_task(self) -> None:
        """Put the original layers back and restore every ``requires_grad`` flag."""
        self._require_open().close(self.model)
        self._open = None

    def _shares(self) -> bool:
        """Whether the processes of ``torch.distributed`` train the model together."""
        return self.reduce in (None, sum_over_processes) and several_processes()

    def _require_same_branches(self) -> None:
        """Refuse branches that every process has trained for itself."""
        norms = [float(p.detach().float().norm()) for p in self.lora_parameters()]
        first, *others = gather(norms)
        if not all(
            math.isclose(*pair, rel_tol=1e-4)
            for own in others
            for pair in zip(first, own, strict=True)
        ):
            msg = (
                "the processes must have trained the same branches, but theirs differ: share the "
                "gradients with step or halves, or wrap the model in DistributedDataParallel after "
                "the task has begun, for it knows no later parameters (reduce=unshared lets every "
                "process keep its own)"
            )
            raise RuntimeError(msg)

    def _copy_model(self) -> None:
        """Give all processes the model of the first: the solves may have rounded differently."""
        if self._shares():
            masters = self.masters.values()
            copy_from_first([*self.model.parameters(), *self.model.buffers(), *masters])

    def _prepare_step(self, *optimizers: Optimizer) -> list[Tensor]:
        """The tensors to be moved; before the first step, heads are those of the first process."""
        task = self._require_open()
        moved: list[Tensor] = list(self.lora_parameters())
        if not moved:
            msg = (
                "some branch must be trained, but requires_grad of all of them is False; freeze "
                "the model before a task begins, not inside it (begin_task freezes what is not "
                "trained)"
            )
            raise RuntimeError(msg)
        loose = [name for name, layer in task.layers.items() if layer.frozen.requires_grad]
        if loose:
            msg = (
                f"weights of target layers must stay frozen during a task, but requires_grad of "
                f"{', '.join(loose)} is True; name with trainable what is trained beside the "
                f"branches"
            )
            raise RuntimeError(msg)
        if self.reduce not in (None, sum_over_processes, unshared):
            msg = (
                "step and halves share labels and gradients over torch.distributed, which a reduce "
                "of your own does not; call gradient_aligned_step(reduce=...) with the labels of "
                "the whole mini-batch"
            )
            raise RuntimeError(msg)
        halves = task.step_in_progress()
        if halves is not None:  # left by an error that the caller has caught
            halves.abandon()
        if self._shares():
            trained = held_parameters(optimizers)
            copy_from_first([p for p in trained if id(p) not in task.copied])
            task.copied.update(map(id, trained))
        return moved

    def _draw(
        self,
        labels: Tensor,
        radius: float | None,
        permutation: Tensor | None,
        draw: float | None,
        generator: torch.Generator | None,
    ) -> tuple[float, Tensor]:
        """Length of the look-ahead, and the order of the classes."""
        radius = self.settings.radius if radius is None else radius
        check_radius(radius)
        if draw is not None and not 0 <= draw <= 1:
            msg = f"draw must be from 0 to 1, got {draw}"
            raise ValueError(msg)
        if permutation is None:
            permutation = draw_permutation(labels, generator)
        # After the permutation: another order of the draws would change the results of a seed.
        if draw is None:
            draw = float(torch.rand((), generator=generator))
        if self._shares():
            draw, permutation = gather((draw, permutation.cpu()))[0]
        return radius * draw, permutation

    def _require_open(self) -> _OpenTask:
        if self._open is None or self._open.closed:
            msg = "no task is open: call begin_task first"
            raise RuntimeError(msg)
        return self._open

    def _require_closed(self) -> None:
        _require_no_inference_mode()
        if self.is_open:
            msg = "a task is open already: call end_task (or abandon_task) first"
            raise RuntimeError(msg)
        _require_free(self.model)

    def _require_restored(self) -> None:
        """Refuse to go on while the branches are moved."""
        if self.is_open and self._require_open().step_in_progress() is not None:
            msg = "a step in phases is in progress: call half.restore() first"
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


class Task:
    """A task as a context, made by :meth:`LoDA.task`.

    Its methods are those of the `LoDA` that it belongs to.

    Attributes
    ----------
    loda : LoDA
        That it belongs to.
    record : TaskRecord
        What the task did; there once the context was left without an error.
    """

    record: TaskRecord

    def __init__(
        self,
        loda: LoDA,
        batches: Iterable[Any],
        bases: Mapping[str, Mapping[str, Tensor]] | None,
    ) -> None:
        self.loda = loda
        self._batches, self._bases = batches, bases
        self._open: _OpenTask | None = None
        self.step, self.halves, self.parameters = loda.step, loda.halves, loda.parameters
        self.lora_parameters = loda.lora_parameters
        self.trainable_parameters = loda.trainable_parameters

    def __enter__(self) -> Self:
        self.loda.begin_task(self._batches, bases=self._bases)
        self._open = self.loda._require_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open is None or self._open.closed:  # ended or abandoned by the caller
            return
        if kind is not None:
            self.loda.abandon_task()
            return
        self.record = self.loda.end_task(self._batches)


def _inside(model: nn.Module) -> nn.Module:
    """The module that DistributedDataParallel wraps, whose names are the model's own."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _adapted_models(model: nn.Module) -> list[nn.Module]:
    """Models with an open task that have parameters of this one."""
    inside = [module for module in model.modules() if _MARK in module.__dict__]
    own = {id(parameter) for parameter in model.parameters()}
    around = [
        other
        for other in _ADAPTED
        if other not in inside and any(id(p) in own for p in other.parameters())
    ]
    return inside + around


def _require_free(model: nn.Module) -> None:
    """Refuse a model that carries branches already."""
    if _adapted_models(model):
        msg = (
            "another LoDA has an open task on this model: end or abandon that task, or call "
            "LoDA.detach(model) if the object is lost"
        )
        raise RuntimeError(msg)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    if adapted:
        msg = f"layers {adapted} are adapted already; restore the model first"
        raise ValueError(msg)


def _commit(layers: Iterable[LoRALinear]) -> KeyboardInterrupt | None:
    """Write the merged weights of all layers, and give a Ctrl-C back that came meanwhile.

    Nothing can fail here but by it, and a model that is merged in some layers would be no model.
    """
    interrupt = None
    for layer in layers:
        while layer.staged:
            try:
                layer.commit()
            except KeyboardInterrupt as error:
                interrupt = error
    return interrupt


def _require_no_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        msg = (
            "a task must begin and end outside torch.inference_mode, whose tensors cannot be "
            "trained or changed later; leave that block (LoDA switches gradients off by itself)"
        )
        raise RuntimeError(msg)


def _own_part(loss: RowsLoss, window: Window, device: torch.device, trained: Tensor) -> RowsLoss:
    """Part of this process in the mean loss over rows of all processes."""
    first, last = window.first, window.first + window.rows

    def part(rows: Tensor) -> Tensor:
        if window.rows == window.labels.numel():  # no other process
            return loss(rows.to(device, non_blocking=True))
        own = rows[(rows >= first) & (rows < last)] - first
        if own.numel() == 0:  # a zero with a graph, so that backward() works here too
            return 0 * trained.sum()
        return loss(own.to(device, non_blocking=True)) * (own.numel() / rows.numel())

    return part
