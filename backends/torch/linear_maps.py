"""Modules that map their input linearly: what counts as one, its weight as a matrix, its owners."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

PARTS: Final = ("q", "k", "v")
"""Parts of the packed input projection of an ``nn.MultiheadAttention``, by its rows."""


PLAIN: Final = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
"""Layers whose forward is known to be one new tensor from ``F.linear``."""


class InProjection(nn.Module):
    """The packed input projection of an ``nn.MultiheadAttention``, or its queries, keys or values.

    The attention holds the weight itself and has no module for it. This one stands for it: it has
    no parameters of its own and reads those of the attention.

    Parameters
    ----------
    owner : nn.MultiheadAttention
        The attention; its query, key and value have one width.
    part : {"q", "k", "v"}, optional
        The third of the rows that is meant; by default all rows.

    Examples
    --------
    >>> projection = InProjection(nn.MultiheadAttention(4, 2), "k")
    >>> projection.weight.shape, projection.bias.shape
    (torch.Size([4, 4]), torch.Size([4]))
    """

    def __init__(self, owner: nn.MultiheadAttention, part: str | None = None) -> None:
        super().__init__()
        # In a tuple, or it would be registered as a child of its own child.
        self._owner = (owner,)
        self.part = part

    @property
    def owner(self) -> nn.MultiheadAttention:
        """The attention."""
        return self._owner[0]

    @property
    def packed(self) -> nn.Parameter:
        """The weight of all rows, as the attention holds it."""
        # Not the attribute, which has the branches in it while the layer is adapted.
        weight: nn.Parameter = self.owner._parameters["in_proj_weight"]  # type: ignore[assignment]
        return weight

    @property
    def weight(self) -> Tensor:
        """Frozen weight of the rows that are meant; a view that can be written to."""
        return self._rows(self.packed)

    @property
    def bias(self) -> Tensor | None:
        """Bias of the rows that are meant."""
        bias = self.owner.in_proj_bias
        return None if bias is None else self._rows(bias)

    def requires_grad_(self, requires_grad: bool = True) -> "InProjection":
        """Freeze (or train) the weight and the bias of the attention."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The weight and the bias of the attention, which the model lists as the attention's."""
        del recurse
        yield self.packed
        if self.owner.in_proj_bias is not None:
            yield self.owner.in_proj_bias

    def forward(self, x: Tensor) -> Tensor:
        """Output of the frozen rows."""
        return F.linear(x, self.weight, self.bias)

    def _rows(self, packed: Tensor) -> Tensor:
        if self.part is None:
            return packed
        size = len(packed) // len(PARTS)
        first = PARTS.index(self.part) * size
        return packed[first : first + size]


def in_projections(owner: nn.MultiheadAttention) -> dict[str, InProjection]:
    """The packed input projection of an attention and its parts, by their names below it.

    Empty for an attention that has three weights instead (``kdim`` or ``vdim`` were given).
    """
    # A subclass may have a child of that name.
    if owner._parameters.get("in_proj_weight") is None or "in_proj" in owner._modules:
        return {}
    parts = {f"in_proj.{part}": InProjection(owner, part) for part in PARTS}
    return {"in_proj": InProjection(owner), **parts}


def is_linear_map(module: nn.Module) -> bool:
    """Whether a module maps its input linearly, and is a kind of module that can be adapted.

    That is ``nn.Linear``, the transposed ``Conv1D`` of transformers' GPT-2, a convolution with a
    kernel of one point, or an :class:`InProjection`.
    """
    return (
        isinstance(module, (nn.Linear, InProjection))
        or is_transposed(module)
        or is_pointwise(module)
    )


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: a linear layer with an (in, out) weight."""
    # By its name: transformers is not imported for it.
    named = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
    return named and hasattr(module, "nf")


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution that maps every point by itself."""
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and set(module.kernel_size) == {1}
        and module.groups == 1
        and (isinstance(module.padding, str) or set(module.padding) == {0})
    )


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear map as a matrix (out_features, in_features); a view of it."""
    weight = _weight(module)
    if isinstance(module, nn.Linear):  # first, for every forward pass asks
        return weight
    if is_transposed(module):
        return weight.mT
    # Not flatten(), which would copy a weight in another memory format.
    for _ in range(weight.ndim - 2):
        weight = weight[..., 0]
    return weight


def like_weight(module: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix (out_features, in_features) in the shape of the weight of a linear map."""
    return matrix.mT if is_transposed(module) else matrix.reshape(_weight(module).shape)


def tokens(module: nn.Module, x: Tensor) -> Tensor:
    """Input of a linear map with the features last, shape (..., in_features)."""
    if not is_pointwise(module):
        return x
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))  # noqa: S101 - for mypy
    # A stride leaves points out, which are no tokens then.
    for axis, step in enumerate(module.stride, start=x.ndim - len(module.stride)):
        x = x if step == 1 else x[(slice(None),) * axis + (slice(None, None, step),)]
    return x.movedim(-1 - len(module.stride), -1)


def from_tokens(module: nn.Module, y: Tensor) -> Tensor:
    """Output of a linear map from one with the features last."""
    if not is_pointwise(module):
        return y
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))  # noqa: S101 - for mypy
    return y.movedim(-1, -1 - len(module.stride))


def why_not_adaptable(module: nn.Module) -> str | None:
    """What keeps the weight of a linear map from being adapted, with the cure; ``None`` if nothing.

    A merge adds to the weight, so that must be a dense tensor of floats that the module owns.
    """
    weight = module.packed if isinstance(module, InProjection) else _weight(module)
    kind = f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed (parametrised); remove the parametrisation first"
    if isinstance(weight, UninitializedParameter):
        return "its weight has no shape yet (a lazy module); run the model on one batch first"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return (
            f"its weight is quantised ({kind} with {weight.dtype}), and an update added to it "
            f"would be lost; load the model without quantisation, or exclude this layer"
        )
    if type(weight) not in (nn.Parameter, Tensor) or type(weight.data) is not Tensor:
        return (
            f"its weight is a {type(weight.data).__name__} ({kind}), not a plain tensor; load the "
            f"model without quantisation or sharding, or exclude this layer"
        )
    if weight.is_meta:
        return "its weight has no values (meta device); load the weights first, without offloading"
    if not _is_affine(module):
        return (
            f"its output ({kind}) is not x Wᵀ + b, and a merge would not have the effect of the "
            f"branches; exclude this layer"
        )
    return None


def shared_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Names of the parameters and buffers that would change with the weights of some linear maps.

    Only of layers that have some. A module that occurs in two places is one owner.
    """
    owners = [
        (f"{prefix}.{name}".lstrip("."), module, name, tensor)
        for prefix, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and not isinstance(tensor, UninitializedParameter)
    ]
    by_storage: dict[int, list[tuple[str, nn.Module, str, Tensor]]] = {}
    for owner in owners:
        for place in _storages(owner[-1]):
            by_storage.setdefault(place, []).append(owner)
    shared: dict[str, list[str]] = {}
    for layer, module in layers.items():
        holder, own = _holder(module)
        weight = _weight(module)
        names = [
            name
            for place in _storages(weight)
            for name, other, attribute, tensor in by_storage.get(place, [])
            if (other is not holder or attribute != own) and _overlap(weight, tensor)
        ]
        if names:
            shared[layer] = names
    return shared


def with_weight(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """Output of a linear map with another weight of the same shape; gradients are not needed."""
    if isinstance(module, InProjection):
        return F.linear(x, weight, module.bias)
    own = _weight(module)
    values = own.data
    own.data = weight
    try:
        output: Tensor = module.forward(x)
        return output
    finally:
        own.data = values


def untie_weight(module: nn.Module) -> None:
    """Give a linear map a copy of its weight, which it shares with other modules."""
    holder, name = _holder(module)
    weight = holder._parameters[name]
    assert weight is not None  # noqa: S101 - it was found there
    copy = weight.detach().clone()
    holder._parameters[name] = nn.Parameter(copy, requires_grad=weight.requires_grad)


def read_in_projection(
    owner: nn.MultiheadAttention, layers: Mapping[str | None, nn.Module]
) -> None:
    """Let an attention read its packed weight through adapted layers.

    It becomes an instance of a subclass that only reads its weight otherwise. ``layers`` are by
    part, or one under ``None`` for all rows.
    """
    child = (
        layers[None] if None in layers else nn.ModuleDict({str(p): x for p, x in layers.items()})
    )
    owner._modules["in_proj"] = child
    if not hasattr(type(owner), "reads_in_projection"):
        owner.__class__ = _reading(type(owner))  # type: ignore[arg-type]


def own_in_projection(owner: nn.MultiheadAttention) -> None:
    """Let an attention read its packed weight directly again."""
    if hasattr(type(owner), "reads_in_projection"):
        del owner._modules["in_proj"]
        owner.__class__ = type(owner).__mro__[1]


def mark(weight: Tensor, layers: Mapping[str | None, nn.Module]) -> Tensor:
    """Note on a computed weight which layers it is computed from, for whoever sees it in use.

    Nobody else may hold the tensor yet. ``layers`` are as in :func:`read_in_projection`.
    """
    if not torch.compiler.is_compiling():
        weight.linear_maps = dict(layers)  # type: ignore[attr-defined]
    return weight


def adapted_parts(owner: nn.MultiheadAttention) -> dict[str | None, nn.Module]:
    """The layers that an attention reads its packed weight through, by part."""
    if not hasattr(type(owner), "reads_in_projection"):
        return {}
    child = owner.get_submodule("in_proj")
    return dict(child.items()) if isinstance(child, nn.ModuleDict) else {None: child}


@cache
def _reading(kind: type[nn.MultiheadAttention]) -> type[nn.MultiheadAttention]:
    """A subclass whose ``in_proj_weight`` is computed from its child ``in_proj``."""

    def in_proj_weight(self: nn.MultiheadAttention) -> Tensor:
        layers: dict[str | None, Any] = adapted_parts(self)
        if None in layers:
            weight: Tensor = layers[None].weight
            return weight
        pieces = (layers[part] if part in layers else InProjection(self, part) for part in PARTS)
        return mark(torch.cat([piece.weight for piece in pieces]), layers)

    # A property of the class comes before the parameter of that name, which stays where it is.
    body = {
        "in_proj_weight": property(in_proj_weight),
        "reads_in_projection": True,
        # The class has no name of its own under which a pickled model could find it.
        "__reduce_ex__": lambda self, _: (_empty, (kind,), self.__dict__),
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), body)


def _empty(kind: type[nn.MultiheadAttention]) -> nn.MultiheadAttention:
    """An attention that reads its weight through layers, yet without a state."""
    reading: Any = _reading(kind)  # type: ignore[arg-type]
    made: nn.MultiheadAttention = reading.__new__(reading)
    return made


def _is_affine(module: nn.Module) -> bool:
    """Whether a layer with a forward of its own is what its weight and bias say, on one input."""
    if not isinstance(module, nn.Linear) or type(module) in PLAIN:
        return True
    weight, training = module.weight, module.training
    # Not random, or the random numbers of the caller would be others afterwards.
    x = torch.linspace(-1, 1, module.in_features, dtype=weight.dtype, device=weight.device)[None]
    try:
        module.training = False
        with torch.no_grad():
            wanted, output = F.linear(x, weight, module.bias), module.forward(x)
    finally:
        module.training = training
    # Far from rounding, also that of arithmetic in 8 bits.
    return not bool((output - wanted).norm() > 0.1 * wanted.norm())


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - for mypy
    return weight


def _holder(module: nn.Module) -> tuple[nn.Module, str]:
    """The module that owns the weight of a linear map, and its name there."""
    if isinstance(module, InProjection):
        return module.owner, "in_proj_weight"
    return module, "weight"


def _storages(tensor: Tensor) -> Iterator[int]:
    """The address of a tensor's memory, if it has any."""
    try:
        address = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a subclass without memory of its own
        return
    if address and tensor.numel():
        yield address


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors over one memory have an element in common."""
    (first, last), (begin, end) = _span(a), _span(b)
    if last <= begin or end <= first:
        return False
    dense = a.is_contiguous() and b.is_contiguous()
    if dense or a.element_size() != b.element_size():
        return True
    # Slices may interleave without meeting, as two halves of the columns do.
    return bool(torch.isin(_places(a), _places(b)).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor and the byte after its last one."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    return first, first + (reach + 1) * tensor.element_size()


def _places(tensor: Tensor) -> Tensor:
    """Positions of the elements of a tensor in its memory, counted in elements."""
    places = torch.tensor([tensor.storage_offset()])
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + torch.arange(size) * step).flatten()
    return places
