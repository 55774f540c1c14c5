"""What LoDA is handed from outside, held against the layers and the settings."""

from collections.abc import Mapping

from torch import Tensor, nn

from backends.torch.lora import LoRALinear
from backends.torch.settings import LoDASettings
from loda_math import HeldoutRatio

Layers = Mapping[str, nn.Linear | LoRALinear]


def check_bases(
    settings: LoDASettings,
    layers: Layers,
    tasks: int,
    bases: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Refuse injected bases that are not those of the branches of the coming task."""
    if set(bases) != set(layers):
        msg = f"bases must name the layers {sorted(layers)}, got {sorted(bases)}"
        raise ValueError(msg)
    for name, given in bases.items():
        shapes = {branch: tuple(basis.shape) for branch, basis in given.items()}
        wanted = dict.fromkeys(
            settings.names(tasks == 0), (layers[name].in_features, settings.rank)
        )
        if shapes != wanted:
            msg = f"bases of layer {name!r} must have shapes {wanted}, got {shapes}"
            raise ValueError(msg)
        if not all(bool(basis.isfinite().all()) for basis in given.values()):
            msg = f"bases of layer {name!r} hold NaN or infinite values"
            raise ValueError(msg)


def check_state(
    settings: LoDASettings, layers: Layers, state: Mapping[str, Tensor]
) -> tuple[int, bool]:
    """Tasks done and whether a task is open in a state, if it fits the layers and settings."""
    tasks = int(state["tasks"]) if "tasks" in state else -1
    is_open = any(key.startswith("new/") for key in state)
    wanted: dict[str, tuple[int, ...]] = {"tasks": ()}
    for name, layer in layers.items():
        size = layer.in_features
        if tasks > 0:
            wanted[f"history/{name}"] = (size, size)
        if is_open:
            wanted[f"new/{name}"] = (size, size)
            for branch in settings.names(tasks == 0):
                wanted[f"down/{branch}/{name}"] = (settings.rank, size)
                wanted[f"up/{branch}/{name}"] = (layer.out_features, settings.rank)
    # Held-out ratios are there only if the open task measured them.
    optional = {
        f"heldout/{branch}/{name}": (len(HeldoutRatio._fields),)
        for name in layers
        for branch in settings.names(tasks == 0)
        if is_open
    }
    shapes = {
        key: tuple(value.shape)
        for key, value in state.items()
        if optional.get(key) != tuple(value.shape)
    }
    odd = [key for key, x in state.items() if not x.is_floating_point() and key != "tasks"]
    if odd:
        msg = f"the state holds {odd[0]} as {state[odd[0]].dtype}; expected real numbers"
        raise ValueError(msg)
    if tasks < 0 or shapes != wanted:
        unlike = sorted(set(shapes.items()) ^ set(wanted.items()))
        msg = (
            f"the state does not belong to this model and these settings; the first entries "
            f"(with shapes) in only one of them: {unlike[:6]}, tasks done: {tasks}"
        )
        raise ValueError(msg)
    return tasks, is_open
