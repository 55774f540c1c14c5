"""Adapters of Hugging Face PEFT: a task's update written as one, and LoRA started from our bases.

PEFT itself is not needed to write adapters, and not imported here.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

from backends.torch.layers import find_layers
from backends.torch.linear_maps import PARTS, InProjection, is_pointwise, is_transposed
from backends.torch.lora import base_layer, weight_matrix
from backends.torch.record import TaskRecord

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Where PEFT keeps the output projection of an attention that it has adapted.
_OUTPUT = ".base_layer.out_proj"


def save_adapter(
    folder: str | os.PathLike[str],
    model: nn.Module,
    record: TaskRecord,
    *,
    modules_to_save: Sequence[str] = (),
    base_model: str | None = None,
    overwrite: bool = False,
) -> None:
    r"""Write the update of a task as an adapter that PEFT loads.

    The branches of a layer become one LoRA: their down-projections A stacked, and their
    up-projections with weights and recalibration, :math:`[w_G B_G \Lambda, w_I B_I]`. The adapter
    belongs to the model as it was **before** the task. Adapters of all tasks belong to the model
    from before the first one if PEFT adds them up (``add_weighted_adapter`` with weights of 1 and
    ``combination_type="cat"``).

    Parameters
    ----------
    folder : path
        Folder for the two files of the adapter, ``adapter_config.json`` and
        ``adapter_model.safetensors``; made if it is not there. It appears when both are complete.
    model : nn.Module
        The model that the task was learned with. Only the kinds of its layers are looked at, and
        what ``modules_to_save`` names.
    record : TaskRecord
        What :meth:`LoDA.end_task` returned; ``TaskRecord.of(loda.layers)`` for an open task, whose
        update is not recalibrated yet.
    modules_to_save : sequence of str
        Modules of the model that are written whole, as they are now, such as its classifier. PEFT
        cannot add up adapters that hold the same module.
    base_model : str, optional
        Name or path of the pretrained model, for ``AutoPeftModel`` and the hub.
    overwrite : bool, default False
        Whether an adapter that is in the folder is replaced.

    Raises
    ------
    FileExistsError
        If the folder holds an adapter and ``overwrite`` is not set, or if it holds other files.
    ValueError
        If a module is not there or cannot be named to PEFT, or the record has no layers of the
        model.
    TypeError
        If PEFT has no adapter for a kind of layer.
    OSError
        If the files cannot be written; the folder is then as it was before.

    See Also
    --------
    lora_options : the settings that are written.
    initialise_lora : start PEFT's LoRA from the directions of a task.

    Examples
    --------
    >>> import tempfile
    >>> from backends.torch import LoDA
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    >>> loda = LoDA(model, target="0", rank=2)
    >>> with loda.task([torch.randn(32, 8)]) as task:
    ...     optimizer = torch.optim.SGD(task.parameters(lr=0.1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapter(Path(folder) / "task1", model, task.record)
    ...     sorted(path.name for path in (Path(folder) / "task1").iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, (down, up) in _loras(model, record).items():
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    for name in modules_to_save:
        module = _module_to_save(model, name, record)
        tensors |= {f"{name}.{key}": x for key, x in module.state_dict().items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "modules_to_save": list(modules_to_save) or None,
        **lora_options(model, record),
    }
    # Copies, for a safetensors file cannot hold tensors that share memory.
    stored = {
        f"base_model.model.{name}": x.detach().to("cpu", copy=True).contiguous()
        for name, x in tensors.items()
    }
    place = Path(folder)
    _require_place(place, overwrite=overwrite)
    with new_folder(place) as adapter:
        save_file(stored, adapter / WEIGHTS, metadata={"format": "pt"})
        (adapter / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """An empty folder that is put in its place when the block ends, and never half written.

    After an error, what was at the place is there as it was before.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that it can be moved there in one step.
    temporary = Path(mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        folder = temporary / "new"
        folder.mkdir()
        yield folder
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if place.exists():
            place.rename(temporary / "before")
        folder.rename(place)
    except BaseException:
        if (temporary / "before").exists() and not place.exists():
            (temporary / "before").rename(place)
        raise
    finally:
        shutil.rmtree(temporary)


def lora_options(model: nn.Module, record: TaskRecord) -> dict[str, Any]:
    """Arguments of PEFT's ``LoraConfig`` for the layers and ranks of a task.

    Parameters
    ----------
    model : nn.Module
        The model, adapted or not.
    record : TaskRecord
        Of the task.

    Returns
    -------
    dict of str to Any
        Plain data. The rank of a layer is that of all its branches together, and the scale is 1.

    Raises
    ------
    ValueError, TypeError
        As :func:`save_adapter`.

    Examples
    --------
    >>> from backends.torch import LoDA, TaskRecord
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    >>> loda = LoDA(model, target="0", rank=2)
    >>> loda.begin_task([torch.randn(32, 8)])
    >>> options = lora_options(model, TaskRecord.of(loda.layers))
    >>> options["r"], options["lora_alpha"], options["target_modules"]
    (2, 2, '0')
    """
    layers = _adapted_layers(model, record)
    # The output projection of an attention comes with the attention itself.
    loras = _loras(model, record).items()
    ranks = {name: len(down) for name, (down, _) in loras if not name.endswith(_OUTPUT)}
    rank = max(ranks.values())
    # PEFT takes names for regular expressions, and what they match at the end of a name as well.
    others = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "target_modules": "|".join(map(re.escape, ranks)),
        "fan_in_fan_out": any(is_transposed(layer) for layer in layers.values()),
        "bias": "none",
    }


@torch.no_grad()
def update_record(before: nn.Module, after: nn.Module) -> TaskRecord:
    """What training added to the linear layers of a model, as branches of the smallest rank.

    The difference of the weights of a layer is factored by a singular value decomposition. Singular
    values within the rounding of the weights are left out: merging a task rounds an entry by up to
    eps/2 of its size. This works for every method, whatever it keeps of its tasks.

    Parameters
    ----------
    before, after : nn.Module
        The same model, before the first task and after the last.

    Returns
    -------
    TaskRecord
        For :func:`save_adapter`; the adapter belongs to ``before``.

    Raises
    ------
    ValueError
        If no linear layer has changed by more than rounding changes it, or the models have
        different layers.

    Examples
    --------
    >>> before = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    >>> after = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    >>> _ = after.load_state_dict(before.state_dict())
    >>> after[0].weight.data += torch.outer(torch.ones(8), torch.arange(8.0))
    >>> {name: down["update"].shape for name, down in update_record(before, after).downs.items()}
    {'0': torch.Size([1, 8])}
    """
    old, new = find_layers(before, "*"), find_layers(after, "*")
    if old.keys() != new.keys():
        msg = f"the models must have the same layers, got {sorted(old)} and {sorted(new)}"
        raise ValueError(msg)
    downs: dict[str, dict[str, Tensor]] = {}
    ups: dict[str, dict[str, Tensor]] = {}
    for name, layer in old.items():
        weight = weight_matrix(layer)
        start, end = weight.double(), weight_matrix(new[name]).double()
        u, s, v = torch.linalg.svd(end - start, full_matrices=False)
        sides = sum(side**0.5 for side in start.shape)
        size = (start.square() + end.square()).mean().sqrt()
        noise = torch.finfo(weight.dtype).eps * size * sides
        rank = int((s > noise).sum())
        if rank:
            root = s[:rank].sqrt()
            downs[name] = {"update": (root[:, None] * v[:rank]).to(weight.dtype)}
            ups[name] = {"update": (u[:, :rank] * root).to(weight.dtype)}
    if not downs:
        msg = (
            "a linear layer must have changed by more than rounding does, got none; there is no "
            "update to write"
        )
        raise ValueError(msg)
    return TaskRecord.of({}, downs=downs, ups=ups, weights={n: {"update": 1.0} for n in downs})


@torch.no_grad()
def initialise_lora(
    model: nn.Module,
    record: TaskRecord,
    *,
    adapter_name: str = "default",
    train_down: bool = False,
) -> None:
    r"""Start PEFT's LoRA from the directions that a task has chosen, instead of random ones.

    As PEFT's own EVA does with the principal directions of the inputs. The down-projection of a
    layer becomes those of its branches stacked, times the weights of the branches; the
    up-projection becomes zero. Steps on the up-projection then change the layer as steps on those
    of the branches do.

    Parameters
    ----------
    model : nn.Module
        A model with LoRA by PEFT (``get_peft_model(model, LoraConfig(**lora_options(...)))``).
    record : TaskRecord
        ``TaskRecord.of(loda.layers)`` of an open task, or the record of one that has ended.
    adapter_name : str
        Name of PEFT's adapter.
    train_down : bool, default False
        Whether the down-projections are trained too.

    Raises
    ------
    ValueError
        If PEFT's adapter is not on the same layers, or has other ranks; nothing has been changed
        then.
    """
    loras: dict[str, Any] = {
        name: module
        for name, module in _base_model(model).named_modules()
        if adapter_name in getattr(module, "lora_A", ())
    }
    cure = "make the adapter with LoraConfig(**lora_options(model, record))"
    layers = {place: _layers_at(place, record) for place in loras}
    bare = [place for place in loras if not layers[place] and not place.endswith(_OUTPUT)]
    if bare or {name for names in layers.values() for name in names} != set(record.downs):
        msg = (
            f"adapter {adapter_name!r} must be on the layers {sorted(record.downs)}, got "
            f"{sorted(loras)}; {cure}"
        )
        raise ValueError(msg)
    starts: list[tuple[Any, list[Tensor]]] = []
    for place, lora in loras.items():
        downs = [
            record.weights[name][branch] * down / lora.scaling[adapter_name]
            for name in layers[place]
            for branch, down in record.downs[name].items()
        ]
        directions, rank = sum(map(len, downs)), len(lora.lora_A[adapter_name].weight)
        if downs and rank != directions:
            msg = (
                f"r must be {directions} in layer {place!r}, the directions of all branches, got "
                f"{rank}; {cure}"
            )
            raise ValueError(msg)
        starts.append((lora, downs))
    for lora, downs in starts:
        own = lora.lora_A[adapter_name].weight
        own.zero_()
        if downs:
            rows = torch.cat(downs)
            own[: len(rows)].copy_(rows.reshape(-1, *own.shape[1:]))
        own.requires_grad_(train_down)
        lora.lora_B[adapter_name].weight.zero_()


def _adapted_layers(model: nn.Module, record: TaskRecord) -> dict[str, nn.Module]:
    """The layers of a record, without their branches, as the model has them."""
    if not record.downs:
        msg = "the record must have branches, got none; keep the record of a task that was trained"
        raise ValueError(msg)
    found = find_layers(model, list(record.downs))
    layers = {name: base_layer(layer) for name, layer in found.items()}
    for name, layer in layers.items():
        if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            msg = (
                f"layer {name!r} cannot be in an adapter: PEFT adds the update of an attention's "
                f"output projection twice; save the merged model instead, or exclude the layer"
            )
            raise TypeError(msg)
        if isinstance(layer, InProjection):
            around = model.get_submodule(_attention(name).rpartition(".")[0])
            if isinstance(around, nn.TransformerEncoderLayer):
                msg = (
                    f"layer {name!r} cannot be in an adapter: an nn.TransformerEncoderLayer reads "
                    f"the weight past PEFT; save the merged model instead, or exclude the layer"
                )
                raise TypeError(msg)
    return layers


def _attention(name: str) -> str:
    """The attention that holds the weight of a packed input projection, by their names."""
    return name.rpartition(".in_proj")[0]


def _loras(model: nn.Module, record: TaskRecord) -> dict[str, tuple[Tensor, Tensor]]:
    """Down- and up-projection of every layer of PEFT, by its name within PEFT's model."""
    loras: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in _adapted_layers(model, record).items():
        down, up = _factors(record, name)
        if is_pointwise(layer):
            assert isinstance(layer.weight, Tensor)  # noqa: S101 - for mypy
            points = (1,) * (layer.weight.ndim - 2)
            down, up = (x.reshape(*x.shape, *points) for x in (down, up))
        if not isinstance(layer, InProjection):
            loras[name] = down, up
            continue
        if layer.part is not None:
            up = torch.cat([up if part == layer.part else torch.zeros_like(up) for part in PARTS])
        place = _attention(name)
        if place in loras:  # another part of the same projection
            down, up = torch.cat([loras[place][0], down]), torch.cat([loras[place][1], up], dim=1)
        loras[place] = down, up
        # PEFT adapts both projections of an attention. This leaves the other as it is.
        loras[f"{place}{_OUTPUT}"] = torch.zeros_like(down), torch.zeros_like(up[: down.shape[1]])
    return loras


def _layers_at(place: str, record: TaskRecord) -> list[str]:
    """The layers of a record whose directions a layer of PEFT has."""
    if place in record.downs:
        return [place]
    packed = re.compile(rf"{re.escape(place)}\.in_proj(\.[{''.join(PARTS)}])?")
    return [name for name in record.downs if packed.fullmatch(name)]


def _factors(record: TaskRecord, name: str) -> tuple[Tensor, Tensor]:
    """Down-projections (R, D) of a layer, and up-projections (O, R) with weights and Λ."""
    downs, ups = record.downs[name], record.ups[name]
    scaled = {branch: record.weights[name][branch] * up for branch, up in ups.items()}
    factor = record.coefficients.get(name)
    down, up = torch.cat(list(downs.values())), torch.cat(list(scaled.values()), dim=1)
    if factor is None:
        return down, up
    if len(factor) != len(down):  # Λ of the general branch alone
        scaled["general"] = scaled["general"] @ factor.to(up)
        return down, torch.cat(list(scaled.values()), dim=1)
    return down, up @ factor.to(up)


def _module_to_save(model: nn.Module, name: str, record: TaskRecord) -> nn.Module:
    """A module that PEFT replaces by its stored copy."""
    names = [path for path, _ in model.named_modules(remove_duplicate=False)]
    meant = [path for path in names if path.endswith(name)]  # PEFT's rule
    if meant != [name]:
        msg = (
            f"modules_to_save must name one module each, for PEFT takes all that end with it, got "
            f"{name!r}, which means {meant or 'none'}"
        )
        raise ValueError(msg)
    inside = [layer for layer in record.downs if f"{layer}.".startswith(f"{name}.")]
    if inside:
        msg = f"modules_to_save must have no adapted layers in them, got {name!r} with {inside}"
        raise ValueError(msg)
    return model.get_submodule(name)


def _base_model(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel."""
    inside = getattr(model, "get_base_model", None)
    base: nn.Module = inside() if callable(inside) else model
    return base


def _require_place(place: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds what must not be replaced."""
    names = {path.name for path in place.iterdir()} if place.exists() else set()
    if names & {CONFIG, WEIGHTS} and not overwrite:
        msg = f"{place} holds an adapter already; set overwrite, or choose another folder"
        raise FileExistsError(msg)
    others = sorted(names - {CONFIG, WEIGHTS})
    if others:
        msg = f"{place} must hold nothing but an adapter, got {others[:6]}; choose another folder"
        raise FileExistsError(msg)
