"""Find, replace and restore the target layers of any ``nn.Module``."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn import Parameter

from backends.torch.lora import LoRALinear
from backends.torch.settings import TIMM_QKV, Target


def find_layers(model: nn.Module, target: Target = TIMM_QKV) -> dict[str, nn.Linear | LoRALinear]:
    """Linear layers (adapted or not) whose dotted names match a pattern.

    Parameters
    ----------
    model : nn.Module
        Any module.
    target : str or sequence of str
        Patterns; every one must match at least one layer.

    Returns
    -------
    dict of str to module
        In the order of ``named_modules``.

    Raises
    ------
    ValueError
        If there is no pattern, or one matches no linear layer; the message lists those that
        exist.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> list(find_layers(model, "*"))
    ['0', '2']
    """
    patterns = [target] if isinstance(target, str) else list(target)
    if not patterns:
        msg = "no pattern was given; name at least one linear layer, such as '*.attn.qkv'"
        raise ValueError(msg)
    linears: dict[str, nn.Linear | LoRALinear] = {}
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name == "" or name.startswith(adapted):
            continue
        if isinstance(module, LoRALinear):
            # Its frozen base is a linear layer too, but not one of the model's own.
            adapted = (*adapted, f"{name}.")
        if isinstance(module, (nn.Linear, LoRALinear)):
            linears[name] = module
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            names = ", ".join(linears) or "none"
            if isinstance(model, (nn.Linear, LoRALinear)):
                names = "only the model itself; put it inside another module, such as nn.Sequential"
            msg = f"pattern {pattern!r} matches no linear layer; linear layers here: {names}"
            raise ValueError(msg)
    return {
        name: module
        for name, module in linears.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def check_rank(layers: Mapping[str, nn.Linear | LoRALinear], rank: int) -> None:
    """Refuse a rank that some layer has too few input features for.

    Parameters
    ----------
    layers : mapping of str to module
        As :func:`find_layers` returns them.
    rank : int
        Directions a branch.

    Raises
    ------
    ValueError
        Names the layers and their numbers of input features.
    """
    narrow = {n: x.in_features for n, x in layers.items() if x.in_features < rank}
    if narrow:
        msg = f"rank {rank} is above the input size of some layers: {narrow}"
        raise ValueError(msg)


def adapt(model: nn.Module, target: Target = TIMM_QKV) -> dict[str, LoRALinear]:
    """Replace the matching linear layers by :class:`LoRALinear` around them, in place.

    Parameters
    ----------
    model : nn.Module
        Any module but a bare ``nn.Linear``.
    target : str or sequence of str
        Patterns over module names.

    Returns
    -------
    dict of str to LoRALinear
        The adapted layers, without branches yet, by the names of the layers they replace.

    Raises
    ------
    ValueError
        If a pattern matches nothing, or a layer is adapted already.
    TypeError
        If a layer's weight is no parameter of its own; nothing has been changed then.

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
    matches = find_layers(model, target)
    adapted = [name for name, module in matches.items() if isinstance(module, LoRALinear)]
    if adapted:
        msg = f"layers {adapted} are adapted already; restore the model first"
        raise ValueError(msg)
    computed = [
        name for name, module in matches.items() if not isinstance(module.weight, Parameter)
    ]
    if computed:
        msg = f"weights of {computed} are computed (parametrised); remove the parametrisation first"
        raise TypeError(msg)
    # All are made before one is put in place: nothing is half adapted if one cannot be.
    layers = {
        name: LoRALinear(module)
        for name, module in matches.items()
        if isinstance(module, nn.Linear)
    }
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
    _replace(model, {layer.base: layer for layer in layers.values()})


def restore(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Put the original linear layers back, with the weights that they have now.

    Parameters
    ----------
    model : nn.Module
        The module that :func:`adapt` changed.
    layers : mapping of str to LoRALinear
        What :func:`adapt` returned.
    """
    _replace(model, {layer: layer.base for layer in layers.values()})


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
