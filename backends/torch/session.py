"""An open task: adapted layers in a model, everything else frozen, and what it started from."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from backends.torch.adapt import adapt, restore
from backends.torch.halves import collect_halves
from backends.torch.lora import LoRALinear
from backends.torch.moments import Forward, collect_moments
from backends.torch.processes import Reduce
from backends.torch.settings import LoDASettings
from backends.torch.solve import HeldoutRatios, solve_bases, solve_heldout
from loda_math import HeldoutRatio


class OpenTask:
    """Adapted layers in place, until the task is closed.

    Parameters
    ----------
    model : nn.Module
        Adapted in place.
    settings : LoDASettings
        Which layers, and the weights of the branches.
    trainable : sequence of str
        Patterns over names of parameters that stay trainable beside the branches.
    forward : callable
        ``forward(model, batch)``.
    first : bool
        Whether it is the first task, whose down-projections are trained too.
    reduce : callable, optional
        Sums moments over processes.

    Attributes
    ----------
    layers : dict of str to LoRALinear
        The adapted layers.
    new : dict of str to Tensor, shape (D, D)
        Moment that the directions were chosen from, by layer.
    heldout : dict of str to dict of str to HeldoutRatio
        By layer and branch; empty where it was not measured.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: LoDASettings,
        trainable: Sequence[str],
        forward: Forward,
        *,
        first: bool,
        reduce: Reduce | None = None,
    ) -> None:
        named = list(model.named_parameters(remove_duplicate=False))
        for pattern in trainable:
            if not any(fnmatchcase(name, pattern) for name, _ in named):
                there = ", ".join(name for name, _ in named)
                msg = f"trainable pattern {pattern!r} matches no parameter; parameters: {there}"
                raise ValueError(msg)
        kept = {p for n, p in named if any(fnmatchcase(n, pattern) for pattern in trainable)}
        self.settings = settings
        self.first = first
        self.new: dict[str, Tensor] = {}
        self.heldout: HeldoutRatios = {}
        self._model = model
        self._forward = forward
        self._reduce = reduce
        self._required_grad = {parameter: parameter.requires_grad for _, parameter in named}
        self.layers: dict[str, LoRALinear] = adapt(model, settings.target)
        kept -= {p for layer in self.layers.values() for p in layer.base.parameters()}
        for parameter, wanted in self._required_grad.items():
            parameter.requires_grad_(wanted and parameter in kept)

    def collect(self, batches: Iterable[Any]) -> dict[str, Tensor]:
        """Mean second moments of the inputs of the layers, as the model is now."""
        found = collect_moments(
            self._model,
            batches,
            self.settings.target,
            forward=self._forward,
            reduce=self._reduce,
        )
        return {name: m.mean for name, m in found.items()}

    def start(
        self,
        batches: Iterable[Any],
        history: Mapping[str, Tensor],
        bases: Mapping[str, Mapping[str, Tensor]] | None,
    ) -> None:
        """Choose directions from one pass over the task, unless given, and add the branches."""
        settings, eps = self.settings, self._gram_eps()
        # Branches are not there yet, so this is a pass through the previous merged model.
        if settings.heldout and bases is None and not self.first:
            moments, halves = collect_halves(
                self._model,
                batches,
                settings.target,
                forward=self._forward,
                reduce=self._reduce,
            )
            self.new = {name: m.mean for name, m in moments.items()}
            self.heldout = solve_heldout(settings, halves, history, eps)
        else:
            self.new = self.collect(batches)
        if bases is None:
            bases = solve_bases(settings, self.new, history or None, eps)
        for name in self.layers:
            for branch in settings.names(self.first):
                self._add(name, branch, bases[name][branch].mT * settings.down_scale)

    def merge(self, coefficients: Mapping[str, Tensor]) -> None:
        """Fold the branches into the weights, with Λ where there is one."""
        for name, layer in self.layers.items():
            middle = coefficients.get(name)
            layer.merge(middle if middle is None or self.settings.joint else {"general": middle})

    def unmerge(self) -> None:
        """Put back the weights of all layers that are merged."""
        for layer in self.layers.values():
            if layer.merged:
                layer.unmerge()

    def close(self) -> None:
        """Put the original layers back, and let all be trained that was before."""
        restore(self._model, self.layers)
        for parameter, required in self._required_grad.items():
            parameter.requires_grad_(required)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments, branches and held-out ratios under flat names."""
        state: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            state[f"new/{name}"] = self.new[name]
            for branch in layer.branches:
                state[f"down/{branch}/{name}"] = layer.branch(branch).down.detach()
                state[f"up/{branch}/{name}"] = layer.branch(branch).up.detach()
            for branch, ratio in self.heldout.get(name, {}).items():
                state[f"heldout/{branch}/{name}"] = torch.stack(list(ratio))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state that :func:`check_state` let pass."""
        for name, layer in self.layers.items():
            device = layer.base.weight.device
            self.new[name] = state[f"new/{name}"].to(device, copy=True)
            for branch in self.settings.names(self.first):
                self._add(
                    name, branch, state[f"down/{branch}/{name}"], state[f"up/{branch}/{name}"]
                )
                key = f"heldout/{branch}/{name}"
                if key in state:
                    ratio = state[key].to(device, copy=True)
                    self.heldout.setdefault(name, {})[branch] = HeldoutRatio(*ratio)

    def _add(self, name: str, branch: str, down: Tensor, up: Tensor | None = None) -> None:
        self.layers[name].add_branch(
            branch, down, up=up, scale=self.settings.weight(branch), train_down=self.first
        )

    def _gram_eps(self) -> float:
        """Rounding unit of the collected Gram matrices: float32, or wider in a wider model."""
        dtypes = [layer.base.weight.dtype for layer in self.layers.values()]
        return max(torch.finfo(torch.promote_types(d, torch.float32)).eps for d in dtypes)
