"""Find, replace and restore the target layers of any ``nn.Module``."""

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from backends.torch.linear_maps import (
    InProjection,
    adapted_parts,
    in_projections,
    is_linear_map,
    is_pointwise,
    own_in_projection,
    read_in_projection,
    shared_weights,
    untie_weight,
    why_not_adaptable,
)
from backends.torch.lora import LoRALinear, base_layer, weight_matrix
from backends.torch.settings import ALL_LINEAR, TIMM_QKV, Target, as_patterns, matching


def find_layers(
    model: nn.Module, target: Target = TIMM_QKV, exclude: Target = ()
) -> dict[str, nn.Module]:
    """Linear layers (adapted or not) that a target names.

    Layers are ``nn.Linear``, the transposed ``Conv1D`` of transformers' GPT-2, convolutions with a
    kernel of one point, and the packed input projection of an ``nn.MultiheadAttention`` under the
    name ``in_proj`` below it, or by parts as ``in_proj.q``, ``in_proj.k`` and ``in_proj.v``. A
    pattern with wildcards that fits the whole projection does not mean its parts.

    Parameters
    ----------
    model : nn.Module
        Any module.
    target : str or sequence of str
        Names, patterns (:func:`matching`), names of presets, or ``"all-linear"``: all layers but
        convolutions and the output layer that the model names (``get_classifier`` in timm,
        ``get_output_embeddings`` in transformers). Each must match at least one layer.
    exclude : str or sequence of str
        Names and patterns of layers to leave out. Each must match at least one layer.

    Returns
    -------
    dict of str to module
        In the order of ``named_modules``. A layer that occurs in several places has its first
        name, and any of its names may be given.

    Raises
    ------
    ValueError
        If there is no pattern, or one matches no linear layer; the message lists those that
        exist. If a packed projection is named both as a whole and by parts.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> list(find_layers(model, "*")), list(find_layers(model, "all-linear", exclude="2"))
    (['0', '2'], ['0'])
    """
    patterns = as_patterns(target)
    if not patterns:
        msg = "no pattern was given; name at least one linear layer, such as '*.attn.qkv'"
        raise ValueError(msg)
    layers, names = _linear_layers(model)
    chosen: set[str] = set()
    for pattern in patterns:
        chosen |= _meant(model, pattern, layers, names)
    for pattern in as_patterns(exclude):
        chosen -= _meant(model, pattern, layers, names)
    if not chosen:
        msg = f"exclude must leave some layer of the target, got {exclude!r} with {target!r}"
        raise ValueError(msg)
    both = sorted(x for x in chosen if any(name.startswith(f"{x}.") for name in chosen))
    if both:
        msg = f"layers must be named as a whole or by parts, got both for {both}; leave one out"
        raise ValueError(msg)
    return {name: module for name, module in layers.items() if name in chosen}


def _linear_layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Linear layers by their first name, and the first name by every name."""
    layers: dict[str, nn.Module] = {}
    first: dict[tuple[nn.Module, str], str] = {}
    names: dict[str, str] = {}
    adapted: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if path == "" or path.startswith(adapted):
            continue
        found: dict[str, nn.Module] = {}
        if isinstance(module, LoRALinear):
            # Its frozen base is a linear layer too, but not one of the model's own.
            adapted = (*adapted, f"{path}.")
            found[""] = module
        elif isinstance(module, nn.MultiheadAttention):
            # Adapted projections are children of the attention and come by themselves.
            found = {} if adapted_parts(module) else dict(in_projections(module))
        elif is_linear_map(module):
            found[""] = module
        for below, layer in found.items():
            name = f"{path}.{below}" if below else path
            names[name] = first.setdefault((module, below), name)
            layers.setdefault(names[name], layer)
    return layers, names


def _meant(
    model: nn.Module, pattern: str, layers: Mapping[str, nn.Module], names: Mapping[str, str]
) -> set[str]:
    """First names of the layers that one pattern means."""
    if pattern == ALL_LINEAR:
        outputs = set(map(id, _output_layers(model)))
        meant = {
            name
            for name, layer in layers.items()
            if not is_pointwise(base_layer(layer)) and id(base_layer(layer)) not in outputs
        }
    else:
        meant = {names[name] for name in matching(pattern, names)}
    if not meant:
        known = ", ".join(layers) or "none"
        if is_linear_map(model) or isinstance(model, LoRALinear):
            known = "only the model itself; put it inside another module, such as nn.Sequential"
        msg = f"pattern {pattern!r} matches no linear layer; linear layers here: {known}"
        raise ValueError(msg)
    return {name for name in meant if not any(name.startswith(f"{whole}.") for whole in meant)}


def _output_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that a model of timm or transformers calls its output."""
    for method in ("get_classifier", "get_output_embeddings"):
        get = getattr(model, method, None)
        output = get() if callable(get) else None
        # Distilled models have two heads.
        for layer in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(layer, nn.Module):
                yield base_layer(layer)


def check_rank(layers: Mapping[str, nn.Module], rank: int | Mapping[str, int]) -> None:
    """Refuse layers that cannot carry branches of a rank.

    Parameters
    ----------
    layers : mapping of str to module
        As :func:`find_layers` returns them.
    rank : int or mapping of str to int
        Directions a branch, in all layers or by layer.

    Raises
    ------
    ValueError
        If some layers have fewer input features; names them and their numbers.
    TypeError
        If the weight of a layer cannot be added to (quantised, computed, sharded); names it and
        the cure.
    """
    _check_weights(layers)
    ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(layers, rank)
    sizes = {name: weight_matrix(layer).shape[1] for name, layer in layers.items()}
    narrow = {name: size for name, size in sizes.items() if size < ranks[name]}
    if narrow:
        above = ", ".join(sorted({str(ranks[name]) for name in narrow}))
        msg = f"rank {above} is above the input size of some layers: {narrow}; lower the rank"
        raise ValueError(msg)


def check_weights(
    model: nn.Module, layers: Mapping[str, nn.Module], *, untie: bool = False
) -> None:
    """Refuse layers whose weight cannot be changed, or not without changing other modules.

    With ``untie``, shared weights are no obstacle: :func:`untie` follows.
    """
    _check_weights(layers)
    fixed = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    if fixed:
        msg = (
            f"parameters must not be made under torch.inference_mode, whose tensors cannot be "
            f"trained or changed, got {', '.join(fixed[:4])} ({len(fixed)} in all); build and load "
            f"the model outside of it"
        )
        raise TypeError(msg)
    bases = {name: base_layer(layer) for name, layer in layers.items()}
    shared = {} if untie else shared_weights(model, bases)
    if shared:
        owners = "; ".join(f"{name} with {', '.join(others)}" for name, others in shared.items())
        msg = (
            f"layers must not share their weight with other modules, which a merge would change "
            f"too, got {owners}; exclude them, or set untie to give each a copy of its own"
        )
        raise ValueError(msg)


def untie(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Give layers whose weight other modules hold too a copy of their own, for good.

    Parameters
    ----------
    model : nn.Module
        The model, between tasks.
    layers : mapping of str to module
        As :func:`find_layers` returns them.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    >>> model[1].weight = model[0].weight
    >>> untie(model, find_layers(model, "1"))
    >>> model[1].weight is model[0].weight
    False
    """
    bases = {name: base_layer(layer) for name, layer in layers.items()}
    for name in shared_weights(model, bases):
        untie_weight(bases[name])


def check_same_layers(layers: Mapping[str, nn.Module], past: Mapping[str, Tensor]) -> None:
    """Refuse layers that are not those of the past tasks, given by their moments (D, D)."""
    gone, new = sorted(set(past) - set(layers)), sorted(set(layers) - set(past))
    sizes = {name: weight_matrix(layer).shape[1] for name, layer in layers.items()}
    other = {n: (len(past[n]), sizes[n]) for n in layers if n in past and len(past[n]) != sizes[n]}
    problems = [
        *([f"missing: {gone}"] if gone else []),
        *([f"without a past: {new}"] if new else []),
        *([f"of another input size (then, now): {other}"] if other else []),
    ]
    if problems:
        msg = (
            f"the target layers must be those of the past tasks, got layers {'; '.join(problems)}; "
            f"put the layers back, or start a new LoDA for the changed model"
        )
        raise ValueError(msg)


def _check_weights(layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        reason = why_not_adaptable(base_layer(layer))
        if reason is not None:
            msg = f"layer {name!r} cannot be adapted: {reason}"
            raise TypeError(msg)


def adapt(
    model: nn.Module,
    target: Target = TIMM_QKV,
    *,
    masters: Mapping[str, Tensor] | None = None,
) -> dict[str, LoRALinear]:
    """Replace the matching linear layers by :class:`LoRALinear` around them, in place.

    Parameters
    ----------
    model : nn.Module
        Any module but a bare ``nn.Linear``.
    target : str or sequence of str
        Names and patterns, as in :func:`find_layers`.
    masters : mapping of str to Tensor, shape (out_features, in_features), optional
        float32 weights by layer, for layers in half precision (:class:`LoRALinear`).

    Returns
    -------
    dict of str to LoRALinear
        The adapted layers, without branches yet, by the names of the layers they replace.

    Raises
    ------
    ValueError
        If a pattern matches nothing, a layer is adapted already, or other modules hold its weight
        too (:func:`untie`); nothing has been changed then.
    TypeError
        If the weight of a layer cannot be added to (quantised, computed, sharded); nothing has
        been changed then.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> layers = adapt(model, "0")
    >>> restore(model, layers)
    >>> model
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True)
      (1): ReLU()
    )
    """
    found = find_layers(model, target)
    adapted = [name for name, module in found.items() if isinstance(module, LoRALinear)]
    if adapted:
        msg = f"layers {adapted} are adapted already; restore the model first"
        raise ValueError(msg)
    check_weights(model, found)
    masters = masters or {}
    layers = {name: LoRALinear(module, master=masters.get(name)) for name, module in found.items()}
    attach(model, layers)
    return layers


def attach(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Put adapted layers back in the place of the linear layers that they wrap.

    Parameters
    ----------
    model : nn.Module
        The module that :func:`restore` put the original layers into.
    layers : mapping of str to LoRALinear
        What :func:`adapt` returned.
    """
    modules, attentions = _by_place(layers.values())
    _replace(model, {layer.base: layer for layer in modules})
    for attention, parts in attentions.items():
        read_in_projection(attention, parts)


def restore(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Put the original linear layers back, with the weights that they have now.

    Parameters
    ----------
    model : nn.Module
        The module that :func:`adapt` changed.
    layers : mapping of str to LoRALinear
        What :func:`adapt` returned.
    """
    modules, attentions = _by_place(layers.values())
    _replace(model, {layer: layer.base for layer in modules})
    for attention in attentions:
        own_in_projection(attention)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model under the names that it has without branches, which are left out.

    Parameters
    ----------
    model : nn.Module
        Adapted or not; between tasks this is its ``state_dict()``.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> _ = adapt(model, "0")
    >>> list(model.state_dict()), list(plain_state(model))
    (['0.base.weight', '0.base.bias'], ['0.weight', '0.bias'])
    """
    named = model.named_modules(remove_duplicate=False)
    adapted = [f"{name}." for name, module in named if isinstance(module, LoRALinear)]
    plain: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        owner = next((prefix for prefix in adapted if key.startswith(prefix)), None)
        if owner is None:
            plain[key] = tensor
        elif key.startswith(f"{owner}base."):
            plain[owner + key.removeprefix(f"{owner}base.")] = tensor
    return plain


def _by_place(
    layers: Collection[LoRALinear],
) -> tuple[list[LoRALinear], dict[nn.MultiheadAttention, dict[str | None, nn.Module]]]:
    """Layers that replace a module, and those that an attention reads its weight through."""
    modules: list[LoRALinear] = []
    attentions: dict[nn.MultiheadAttention, dict[str | None, nn.Module]] = {}
    for layer in layers:
        if isinstance(layer.base, InProjection):
            attentions.setdefault(layer.base.owner, {})[layer.base.part] = layer
        else:
            modules.append(layer)
    return modules, attentions


def _replace(model: nn.Module, swap: Mapping[nn.Module, nn.Module]) -> None:
    """Swap modules everywhere they occur; a layer shared by two parents stays shared."""
    for parent in list(model.modules()):
        # An adapted layer holds the original as a child, which must not be swapped for itself.
        if parent in swap or any(parent is new for new in swap.values()):
            continue
        # named_children() would leave out the second name of a child that occurs twice.
        for name, child in list(parent._modules.items()):
            if child is not None and child in swap:
                setattr(parent, name, swap[child])
