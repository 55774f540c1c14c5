"""The state of a LoDA as flat tensors: written, and compared with a model and its settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from backends.torch.lora import LoRALinear, weight_matrix
from backends.torch.settings import LoDASettings
from backends.torch.solve import HeldoutRatios
from loda_math import HeldoutRatio, History, Moments, remember, rounding_unit

State = Mapping[str, Tensor]
"""Tensors under flat names: ``tasks``, ``settings``, and by layer ``history/NAME``,
``master/NAME``, and of an open task ``new/NAME``, ``down/BRANCH/NAME``, ``up/BRANCH/NAME`` and
``heldout/BRANCH/NAME``.
"""


def write_settings(settings: LoDASettings, trainable: Sequence[str]) -> Tensor:
    """Settings as bytes of JSON, so that all of a state is tensors."""
    text = json.dumps({**asdict(settings), "trainable": trainable}, sort_keys=True)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def write_open_task(
    layers: Mapping[str, LoRALinear], new: Mapping[str, Tensor], heldout: HeldoutRatios
) -> dict[str, Tensor]:
    """The branches of an open task, with its moments and ratios where there are some."""
    state = {f"new/{name}": moment for name, moment in new.items()}
    for name, layer in layers.items():
        for branch in layer.branches:
            state[f"down/{branch}/{name}"] = layer.branch(branch).down.detach()
            state[f"up/{branch}/{name}"] = layer.branch(branch).up.detach()
    for name, ratios in heldout.items():
        for branch, ratio in ratios.items():
            state[f"heldout/{branch}/{name}"] = torch.stack(list(ratio))
    return state


def holds_open_task(state: State) -> bool:
    """Whether a state was written in the middle of a task."""
    return any(key.startswith("down/") for key in state)


def read_history(total: Tensor, tasks: int, layer: nn.Module, settings: LoDASettings) -> History:
    """The history of a layer, whose total alone is in a state.

    The rest of a history depends only on the number of tasks and the dtypes, so a dummy history of
    as many zero moments provides it.
    """
    zero = Moments(total.new_zeros(1, 1), 1, None, rounding_unit(weight_matrix(layer)))
    zeros = [zero for _ in settings.passes()]
    past = remember(None, *zeros, decay=settings.history_decay)
    for _ in range(tasks - 1):
        past = remember(past, *zeros, decay=settings.history_decay)
    return past._replace(total=total)


def check_settings(
    state: State, settings: LoDASettings, trainable: Sequence[str], *, strict: bool
) -> None:
    """Refuse a state that was made under other settings than those here.

    Without ``strict`` and an open task, only settings that shape the history are compared.
    """
    if "settings" not in state:
        return  # refused with the other missing entries
    try:
        saved, here = (
            dict(json.loads(bytes(written.tolist())).items())
            for written in (state["settings"], write_settings(settings, trainable))
        )
    except (ValueError, TypeError, AttributeError) as error:
        msg = f"the settings of the state cannot be read: {error}"
        raise ValueError(msg) from error
    other = {
        name: (saved.get(name), here.get(name))
        for name in sorted({*saved, *here})
        if saved.get(name) != here.get(name)
    }
    other.pop("radius", None)  # may differ from step to step
    is_open = holds_open_task(state)
    if not strict and not is_open:
        other = {name: pair for name, pair in other.items() if name.startswith("history")}
        other.pop("history_weight", None)
    if other:
        cure = "" if is_open or not strict else "; strict=False goes on under the new ones"
        msg = (
            f"the state was made under other settings (saved, here): {other}; make the LoDA "
            f"with those{cure}"
        )
        raise ValueError(msg)


def check_entries(
    state: State, settings: LoDASettings, layers: Mapping[str, nn.Module], *, needs_new: bool
) -> None:
    """Refuse a state whose entries or shapes are not those of these layers and settings.

    ``needs_new`` says whether the end of an open task needs the moments that it began with.
    """
    # A missing task count is refused below, with the other missing entries.
    tasks = int(state["tasks"]) if "tasks" in state else -1
    is_open = holds_open_task(state)
    written = tuple(state["settings"].shape) if "settings" in state else (1,)
    expected: dict[str, tuple[int, ...]] = {"tasks": (), "settings": written}
    own = settings.by_layer(layers)
    for name, layer in layers.items():
        outputs, size = weight_matrix(layer).shape
        if f"master/{name}" in state:  # only of layers in half precision
            expected[f"master/{name}"] = (outputs, size)
        if tasks > 0:
            expected[f"history/{name}"] = (size, size)
        if not is_open:
            continue
        if needs_new or f"new/{name}" in state:
            expected[f"new/{name}"] = (size, size)
        for branch in settings.names(tasks == 0):
            expected[f"down/{branch}/{name}"] = (own[name].rank, size)
            expected[f"up/{branch}/{name}"] = (outputs, own[name].rank)
            ratio = f"heldout/{branch}/{name}"
            if ratio in state:  # only if the open task measured it
                expected[ratio] = (len(HeldoutRatio._fields),)
    for key, value in state.items():
        # torch supports hardly any arithmetic on 8-bit floats.
        if key not in ("tasks", "settings") and not (
            value.is_floating_point() and value.element_size() > 1
        ):
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
