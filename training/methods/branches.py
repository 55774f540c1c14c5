"""What the baselines with low-rank branches share: sites, starts, and folding into the model."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from backends.torch import LoRALinear, adapt, attach, check_rank, find_layers, restore

Parts = Literal["all", "q", "k", "v", "qk", "kv", "qv"]
_ORDER = "qkv"


def output_rows(out_features: int, parts: Parts) -> dict[str, tuple[int, int] | None]:
    """Output rows of a fused qkv layer that the branches of a method write to.

    Neighbouring parts share a branch, and with it the down-projection.

    Parameters
    ----------
    out_features : int
        Outputs of the layer: queries, keys and values of equal number, in this order.
    parts : str
        ``all`` for every output of a layer of any kind, or the letters of the parts.

    Raises
    ------
    ValueError
        If parts are asked of a layer whose outputs cannot be three equal parts.

    Examples
    --------
    >>> output_rows(12, "kv")
    {'kv': (4, 12)}
    >>> output_rows(12, "qv")
    {'q': (0, 4), 'v': (8, 12)}
    """
    if parts not in get_args(Parts):
        msg = f"method.options parts is {parts!r}; allowed: {', '.join(get_args(Parts))}"
        raise ValueError(msg)
    if parts == "all":
        return {"all": None}
    if out_features % 3:
        msg = (
            f"method.options parts is {parts!r}, but a layer with {out_features} outputs is no "
            "fused qkv; use parts: all, and name the layers by method.target"
        )
        raise ValueError(msg)
    third = out_features // 3
    pieces = [parts] if parts in _ORDER else list(parts)
    found: dict[str, tuple[int, int] | None] = {}
    for piece in pieces:
        first = _ORDER.index(piece[0]) * third
        found[piece] = (first, first + len(piece) * third)
    return found


def kaiming(rank: int, layer: LoRALinear, generator: torch.Generator) -> Tensor:
    """A down-projection (r, D) as LoRA starts it, drawn on the CPU."""
    down = torch.empty(rank, layer.in_features)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    return down


def freeze(model: nn.Module, target: str, rank: int, parts: Parts = "all") -> None:
    """Freeze a model, after a look at whether its target layers suit the rank and the parts.

    Raises
    ------
    ValueError
        If the pattern matches no layer, or a layer suits not.
    """
    layers = find_layers(model, target)
    check_rank(layers, rank)
    for layer in layers.values():
        output_rows(layer.out_features, parts)
    model.requires_grad_(False)


AddBranch = Callable[[LoRALinear, str, Tensor, Tensor], object]
"""``add(layer, branch, down, up)`` puts a branch in place."""


def branch_state(layers: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
    """A and B of every branch, by branch and layer."""
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for branch in layer.branches:
            state[f"down/{branch}/{name}"] = layer.branch(branch).down.detach()
            state[f"up/{branch}/{name}"] = layer.branch(branch).up.detach()
    return state


def load_branches(
    layers: Mapping[str, LoRALinear], state: Mapping[str, Tensor], add: AddBranch
) -> None:
    """Add the branches of a state to layers, in the order of the state."""
    for key, down in state.items():
        kind, _, rest = key.partition("/")
        branch, _, name = rest.partition("/")
        if kind == "down":
            add(layers[name], branch, down, state[f"up/{branch}/{name}"])


class FoldedLayers:
    """Adapted layers whose branches live on from task to task.

    Between tasks the branches are folded into the weights of the model, so that it can be saved;
    a task starts from the exact unmerged state.
    """

    def __init__(self, model: nn.Module, target: str) -> None:
        self.model = model
        self.layers: dict[str, LoRALinear] = adapt(model, target)
        self.weights = {
            name: layer.base.weight.detach().clone() for name, layer in self.layers.items()
        }
        restore(model, self.layers)
        self.is_open = False

    def open(self) -> None:
        """Take the branches out of the weights again and put them in place."""
        self.is_open = True
        attach(self.model, self.layers)
        for layer in self.layers.values():
            if layer.merged:
                layer.unmerge()

    def fold(self) -> None:
        """Fold the branches into the weights of the model."""
        for layer in self.layers.values():
            layer.merge()
        restore(self.model, self.layers)
        self.is_open = False

    def parameters(self, branches: Iterable[str]) -> list[nn.Parameter]:
        """A and B of the named branches, in every layer."""
        found = [layer.branch(b) for layer in self.layers.values() for b in branches]
        return [p for branch in found for p in (branch.down, branch.up)]

    def state_dict(self) -> dict[str, Tensor]:
        """The branches and the weights without them, by layer, and whether a task is open."""
        state = {f"weight/{name}": weight for name, weight in self.weights.items()}
        if self.is_open:
            state["open"] = torch.tensor(True)
        return state | branch_state(self.layers)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], add: AddBranch) -> None:
        """Take over weights and branches, and attach them if a task is open."""
        for name, layer in self.layers.items():
            if layer.merged:
                layer.unmerge()
            self.weights[name].copy_(state[f"weight/{name}"])
            layer.base.weight.copy_(self.weights[name])
            for branch in list(layer.branches):
                layer.drop_branch(branch)
        load_branches(self.layers, state, add)
        if "open" in state:
            self.open()
            return
        for layer in self.layers.values():
            if layer.branches:
                layer.merge()
