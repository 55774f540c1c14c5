"""What the low-rank baselines share: options, initialisation, and merging into the model."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from backends.torch.settings import TIMM_QKV, Target
from training.components import at_least
from training.methods.base import Context, Method, aligned_radius
from training.run_dir import nested

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from backends.torch import LoRALinear, TaskRecord

Parts = Literal["all", "q", "k", "v", "qk", "kv", "qv"]
_ORDER = "qkv"


class BranchMethod(Method, ABC):
    """A method that trains low-rank branches beside linear layers.

    Parameters
    ----------
    rank
        Rank of each branch.
    target
        One or more patterns for the names of the linear layers to adapt.
    parts
        Parts of a fused qkv layer to adapt; all adapts whole layers of any kind.
    gao
        Take gradient-aligned steps; false takes plain ones.
    radius
        Largest length of the look-ahead of a gradient-aligned step.

    Attributes
    ----------
    layers : dict of str to LoRALinear
        The adapted layers, by name.
    """

    saves_open_task = True
    sums_over_processes = True
    keeps = ("branches",)

    def __init__(
        self,
        *,
        rank: int = 16,
        target: Target = TIMM_QKV,
        parts: Parts = "all",
        gao: bool = False,
        radius: float = 0.3,
    ) -> None:
        at_least("rank", rank, 1)
        self.rank, self.target, self.parts = rank, target, parts
        self.radius = aligned_radius(gao, radius)
        self.layers: dict[str, LoRALinear] = {}

    def start(self, model: "nn.Module", context: Context) -> None:
        """Attach to a model whose target layers fit the rank and the parts.

        Raises
        ------
        ValueError
            If the pattern matches no layer, or a layer is too small or not a fused qkv.
        """
        from backends.torch import check_rank, find_layers, weight_matrix

        layers = find_layers(model, self.target)
        check_rank(layers, self.rank)
        for layer in layers.values():
            output_rows(weight_matrix(layer).shape[0], self.parts)
        super().start(model, context)

    @abstractmethod
    def add_branch(
        self, layer: "LoRALinear", branch: str, down: "Tensor", up: "Tensor | None" = None
    ) -> None:
        """Attach a branch: a new one, or one of a state if ``up`` is given."""

    def merge(self) -> "TaskRecord":
        """Merge the branches into the weights of the model; returns a record of them."""
        from backends.torch import TaskRecord, restore

        record = TaskRecord.of(self.layers)
        for layer in self.layers.values():
            layer.merge()
        restore(self.model, self.layers)
        return record

    def state_dict(self) -> "dict[str, Tensor]":
        """A and B of every branch, by branch and layer."""
        state: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            for branch in layer.branches:
                state[f"down/{branch}/{name}"] = layer.branch(branch).down.detach()
                state[f"up/{branch}/{name}"] = layer.branch(branch).up.detach()
        return state

    def load_branches(self, state: "Mapping[str, Tensor]") -> None:
        """Attach the branches of a state, in its order."""
        for key, down in nested(state, "down").items():
            branch, _, name = key.partition("/")
            self.add_branch(self.layers[name], branch, down, state[f"up/{key}"])


class MergedBranches(BranchMethod):
    """A method with new branches for every task, merged permanently at its end.

    Attributes
    ----------
    tasks : int
        Number of finished tasks.
    """

    scale = 1.0
    trains_down = False
    tasks = 0

    def add_branches(self, down: "Callable[[str, LoRALinear], Tensor]") -> None:
        """Attach a branch for every part; ``down`` gives the down-projection (r, D) of a layer."""
        self._adapt()
        for name, layer in self.layers.items():
            for part in output_rows(layer.out_features, self.parts):
                self.add_branch(layer, part, down(name, layer))

    def add_branch(
        self, layer: "LoRALinear", branch: str, down: "Tensor", up: "Tensor | None" = None
    ) -> None:
        """Attach a branch of the open task, named after its part of the layer."""
        rows = output_rows(layer.out_features, self.parts)[branch]
        layer.add_branch(
            branch, down, up=up, rows=rows, scale=self.scale, train_down=self.trains_down
        )

    def merge(self) -> "TaskRecord":
        """Merge the branches permanently; returns a record of them."""
        record = super().merge()
        self.layers = {}
        self.tasks += 1
        return record

    def parameters(self) -> "list[nn.Parameter]":
        """The trained tensors of the branches."""
        branches = [layer.branch(b) for layer in self.layers.values() for b in layer.branches]
        return [p for branch in branches for p in branch.parameters() if p.requires_grad]

    def state_dict(self) -> "dict[str, Tensor]":
        """The number of finished tasks, and the branches of an open one."""
        import torch

        return {"tasks": torch.tensor(self.tasks)} | super().state_dict()

    def load_state_dict(self, state: "Mapping[str, Tensor]") -> None:
        """Load a state, with the branches of an open task."""
        self.tasks = int(state["tasks"])
        if nested(state, "down"):
            self._adapt()
            self.load_branches(state)

    def carried(self, state: "Mapping[str, Tensor]", prefix: str) -> "dict[str, Tensor]":
        """Tensors of a state under ``prefix/``, copied to the device of the model."""
        device = next(self.model.parameters()).device
        return {k: value.to(device, copy=True) for k, value in nested(state, prefix).items()}

    def _adapt(self) -> None:
        from backends.torch import adapt

        self.layers = adapt(self.model, self.target)


class FoldedBranches(BranchMethod):
    """A method that keeps its branches from task to task.

    Between tasks they are folded into the weights of the model, so that it can be saved; a task
    starts from the exact unmerged state.

    Attributes
    ----------
    weights : dict of str to Tensor
        The weights without branches, by layer.
    is_open : bool
        Whether a task is open.
    """

    is_open = False

    def start(self, model: "nn.Module", context: Context) -> None:
        """Attach to a model."""
        from backends.torch import adapt, restore

        super().start(model, context)
        self.layers = adapt(model, self.target)
        self.weights = {name: layer.frozen.detach().clone() for name, layer in self.layers.items()}
        restore(model, self.layers)

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Subtract the branches from the weights again and attach them."""
        del batches
        self._open()

    def end_task(self, batches: Iterable[Any]) -> "TaskRecord":
        """Fold the branches into the weights until the next task."""
        del batches
        self.is_open = False
        return self.merge()

    def factors(self, branches: Iterable[str]) -> "list[nn.Parameter]":
        """A and B of the named branches, in every layer."""
        chosen = [layer.branch(name) for layer in self.layers.values() for name in branches]
        return [p for branch in chosen for p in (branch.down, branch.up)]

    def state_dict(self) -> "dict[str, Tensor]":
        """The branches and the weights without them, by layer, and whether a task is open."""
        import torch

        state = {f"weight/{name}": weight for name, weight in self.weights.items()}
        if self.is_open:
            state["open"] = torch.tensor(True)
        return state | super().state_dict()

    def load_state_dict(self, state: "Mapping[str, Tensor]") -> None:
        """Load weights and branches, and attach the branches if a task is open."""
        import torch

        with torch.no_grad():
            for name, layer in self.layers.items():
                if layer.merged:
                    layer.unmerge()
                self.weights[name].copy_(state[f"weight/{name}"])
                layer.frozen.copy_(self.weights[name])
                for branch in list(layer.branches):
                    layer.drop_branch(branch)
            self.load_branches(state)
            if "open" in state:
                self._open()
                return
            for layer in self.layers.values():
                if layer.branches:
                    layer.merge()

    def _open(self) -> None:
        from backends.torch import attach

        self.is_open = True
        attach(self.model, self.layers)
        for layer in self.layers.values():
            if layer.merged:
                layer.unmerge()


def output_rows(out_features: int, parts: Parts) -> dict[str, tuple[int, int] | None]:
    """Output rows of a fused qkv layer that the branches of a method write to.

    Adjacent parts share a branch, and so its down-projection.

    Parameters
    ----------
    out_features : int
        Outputs of the layer: equally many queries, keys and values, in this order.
    parts : str
        ``all`` for every output of a layer of any kind, or the letters of the parts: ``kv``.

    Raises
    ------
    ValueError
        If parts are given for a layer whose outputs cannot be split into three equal parts.

    Examples
    --------
    >>> output_rows(12, "kv")
    {'kv': (4, 12)}
    >>> output_rows(12, "qv")
    {'q': (0, 4), 'v': (8, 12)}
    """
    if parts == "all":
        return {"all": None}
    if out_features % 3:
        msg = (
            f"parts must be all for a layer that is not a fused qkv, got {parts} for one with "
            f"{out_features} outputs; set parts to all and choose the layers with method.target"
        )
        raise ValueError(msg)
    third = out_features // 3
    pieces = [parts] if parts in _ORDER else list(parts)
    rows: dict[str, tuple[int, int] | None] = {}
    for piece in pieces:
        first = _ORDER.index(piece[0]) * third
        rows[piece] = (first, first + len(piece) * third)
    return rows


def kaiming(rank: int, layer: "LoRALinear", generator: "torch.Generator") -> "Tensor":
    """A down-projection (r, D) with the initialisation of LoRA, drawn on the CPU."""
    import torch
    from torch import nn

    down = torch.empty(rank, layer.in_features)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    return down
