"""Second moments of the inputs of linear layers, and of two halves of the images, in one pass."""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backends.torch.distributed import Reduce, default_reduce, sum_moments
from backends.torch.layers import find_layers
from backends.torch.linear_maps import PARTS, InProjection
from backends.torch.lora import base_layer, input_tokens, weight_matrix
from backends.torch.settings import TIMM_QKV, Target, by_pattern
from loda_math import Moments, combine, second_moment
from loda_math.moments import GRAM_TOKENS

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on one element of an iterable of batches."""

Mask = str | Callable[[Any], Tensor]
"""Which tokens of a batch count: a key of the batch, or a function of it.

The mask has the shape (B, T) for inputs (B, T, D), and is true, or a whole number other than zero,
where a token counts. Other inputs of B sequences: with T tokens on several axes, or all B·T of them
on one, they are in the order of the mask; with further axes behind (B, T), all of a token counts;
of inputs (B, D), one for each sequence, those count whose sequence has a token that does.
"""

Masks = Mask | Mapping[str, Mask]
"""One mask, or masks by name or pattern of layers; in layers that none fits all tokens count."""

MomentHalves = dict[str, tuple[Tensor, Tensor]]
"""Second moments (D, D) of two halves of the images, by layer."""


class MomentCollector:
    """Context manager that sums the second moments of the inputs of the target layers.

    Sums stay on the device of the inputs: one Gram matrix per batch in float32 (or wider), added in
    float64 in place where the device has it and with compensation elsewhere. Nothing is read back
    during the run, autocast does not reach the Gram matrix, and the hooks are always removed.

    Layers may be called as modules, or a model may read their weights and multiply by them itself
    (``F.linear``, ``F.multi_head_attention_forward``). Meanwhile compiled models run uncompiled,
    and the fused attention of ``nn.MultiheadAttention`` is not used.

    Parameters
    ----------
    model : nn.Module
        The model that will be run, adapted or not.
    target : str or sequence of str
        Patterns over module names.

    Attributes
    ----------
    moments : dict of str to Moments
        By layer name, over everything that went through so far.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> with MomentCollector(model, "0") as collector:
    ...     _ = model(torch.ones(5, 3))
    >>> collector.moments["0"].count
    5
    """

    def __init__(self, model: nn.Module, target: Target = TIMM_QKV) -> None:
        self.layers = find_layers(model, target)
        self._sums = _GramSums()
        self._masks: _LayerMasks | None = None
        self._stack = ExitStack()

    @property
    def moments(self) -> dict[str, Moments]:
        """Moments by layer name; what goes through later leaves them as they are."""
        return self._sums.moments()

    def __enter__(self) -> Self:
        reads = _WeightReads(self.layers, self._on_read)
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                before, after = partial(reads.enter_call, name), partial(reads.leave_call, name)
                handle = layer.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
                # Also called if the layer raises.
                handle = layer.register_forward_hook(after, always_call=True)
                stack.callback(handle.remove)
            # A compiled model does not notice hooks that are newer than it is. Where nothing was
            # compiled, asking for it would import the compiler, which takes seconds.
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(reads)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def share(self, reduce: Reduce) -> None:
        """Replace the sums by those over all processes."""
        self._sums = _GramSums(sum_moments(self.moments, self.layers, reduce))

    def _on_read(self, name: str, x: Tensor) -> None:
        tokens = input_tokens(self.layers[name], x).detach()
        mask = None if self._masks is None else self._masks.of(name, tokens)
        self._add(name, tokens, mask)

    def _add(self, name: str, tokens: Tensor, mask: "_BatchMask | None") -> None:
        self._sums.add(name, tokens if mask is None else mask.counted(tokens))


class HalvingCollector(MomentCollector):
    """Sums a second moment over every other image beside the one over all of them.

    The sums over all images are those of :class:`MomentCollector` bit for bit. The other half is
    the difference, which costs half a Gram matrix per batch rather than a whole one.

    Images are numbered across batches, and every other one, from the first, belongs to the first
    half. The layers' inputs have the images along their first axis, each once, or several times in
    a row (windows of an image).
    """

    def __init__(self, model: nn.Module, target: Target = TIMM_QKV) -> None:
        super().__init__(model, target)
        self._half_sums = _GramSums()
        self._model = model
        self._mixing: set[str] = set()  # layers whose inputs mix the images
        self._images_in_batch = self._images_before = 0

    def __enter__(self) -> Self:
        super().__enter__()
        handle = self._model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._stack.callback(handle.remove)
        return self

    def halves(self) -> MomentHalves:
        """Mean second moments of both halves, of the layers that have two.

        Left out are layers that saw only one image, or whose input does not separate the images.
        """
        halves: MomentHalves = {}
        first = self._half_sums.moments()
        for name, whole in self.moments.items():
            half = first.get(name)
            rest = whole.count - half.count if half is not None else 0
            if half is None or name in self._mixing or half.count == 0 or rest == 0:
                continue
            other = (whole.mean * whole.count - half.mean * half.count) / rest
            halves[name] = (half.mean, other)
        return halves

    def share(self, reduce: Reduce) -> None:
        """Replace the sums by those over all processes.

        The halves are the same as in one process if the images of every process are consecutive
        and start at an even position of all images.
        """
        super().share(reduce)
        # A layer that mixes the images in one process has no halves in any.
        device = weight_matrix(next(iter(self.layers.values()))).device
        mixing = torch.tensor([name in self._mixing for name in self.layers], device=device).int()
        reduce([mixing])
        pairs = zip(self.layers, mixing.tolist(), strict=True)
        self._mixing = {name for name, count in pairs if count}
        self._half_sums = _GramSums(sum_moments(self._half_sums.moments(), self.layers, reduce))

    def _count(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._images_before += self._images_in_batch
        given = [*args, *kwargs.values()]
        self._images_in_batch = next((len(x) for x in given if isinstance(x, Tensor) and x.ndim), 0)

    def _add(self, name: str, tokens: Tensor, mask: "_BatchMask | None") -> None:
        super()._add(name, tokens, mask)
        rows = tokens if tokens.ndim > 1 else tokens[None]
        # A caller may run only a part of the model; the batch is then read off the layer's input.
        images = self._images_in_batch or len(rows)
        if len(rows) % images:
            self._mixing.add(name)
            return
        by_image = rows.reshape(images, -1, rows.shape[-1])
        half = slice(self._images_before % 2, None, 2)
        counted = by_image[half] if mask is None else mask.counted(tokens, images, half)
        self._half_sums.add(name, counted)


class _WeightReads(TorchFunctionMode):
    """Sees calls of layers, and products with the weights of those that are not called.

    ``on_read(name, x)`` is called for every input that the weight of a layer is applied to, with
    the images along the first axis.
    """

    def __init__(
        self, layers: dict[str, nn.Module], on_read: Callable[[str, Tensor], None]
    ) -> None:
        super().__init__()
        self._on_read = on_read
        self._calls: list[str] = []  # layers whose call is running
        self._names = {id(layer): name for name, layer in layers.items()}
        # By the tensor that is read: a plain layer's own, an attention's for its projection.
        self._owners: dict[int, dict[str | None, str]] = {}
        for name, layer in layers.items():
            base = base_layer(layer)
            if isinstance(base, InProjection):
                self._owners.setdefault(id(base.packed), {})[base.part] = name
            else:
                self._owners[id(base.weight)] = {None: name}

    def enter_call(
        self, name: str, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> None:
        """A layer is called as a module; products inside the call are the call's own."""
        self._calls.append(name)
        # Some models pass the input of a layer by keyword.
        self._on_read(name, args[0] if args else next(iter(kwargs.values())))

    def leave_call(self, name: str, *_: object) -> None:
        """The call is over, or has failed."""
        self._calls.remove(name)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func is F.linear:
            # A built-in function, which has no signature to bind to.
            given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            for name in self._readers(given["weight"]).values():
                if name not in self._calls:
                    self._on_read(name, given["input"])
        elif func is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        return func(*args, **kwargs)

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An attention with its input and output projections in the open."""
        call = _ATTENTION.bind(*args, **kwargs)
        given = call.arguments
        query, key, value = given["query"], given["key"], given["value"]
        inputs = dict(zip(PARTS, (query, key, value), strict=True))
        for part, name in self._readers(given["in_proj_weight"]).items():
            if part is None and not (query is key is value):
                msg = (
                    f"the inputs of layer {name!r} must be one tensor, got a query, a key and a "
                    f"value that differ; name its parts {name}.q, {name}.k and {name}.v instead"
                )
                raise ValueError(msg)
            self._on_read(name, _images_first(inputs[part or "q"]))
        for part, x in inputs.items():
            for name in self._readers(given.get(f"{part}_proj_weight")).values():
                self._on_read(name, _images_first(x))
        out = given["out_proj_weight"]
        names = self._readers(out)
        if not names:
            return F.multi_head_attention_forward(*call.args, **call.kwargs)
        # The product with the identity is exact, and shows what goes into the real one.
        given["out_proj_weight"] = torch.eye(len(out), dtype=out.dtype, device=out.device)
        given["out_proj_bias"], bias = None, given["out_proj_bias"]
        attended, weights = F.multi_head_attention_forward(*call.args, **call.kwargs)
        for name in names.values():
            self._on_read(name, _images_first(attended))
        return F.linear(attended, out, bias), weights

    def _readers(self, weight: Tensor | None) -> dict[str | None, str]:
        """Names of the layers that a weight belongs to, by part of a packed projection."""
        if weight is None:
            return {}
        layers: dict[str | None, nn.Module] = getattr(weight, "linear_maps", {})
        if layers:  # computed with branches
            named = {part: self._names.get(id(layer)) for part, layer in layers.items()}
            return {part: name for part, name in named.items() if name is not None}
        return self._owners.get(id(weight), {})


_ATTENTION = inspect.signature(F.multi_head_attention_forward)


def _images_first(x: Tensor) -> Tensor:
    """Tokens of an attention, which are (tokens, images, D) there."""
    return x.transpose(0, 1) if x.ndim == 3 else x


class _GramSums:
    """Sums of Gram matrices by layer, added in place and made symmetric when they are read."""

    def __init__(self, moments: dict[str, Moments] | None = None) -> None:
        self._read = moments or {}  # callers may hold these tensors: they are never written to
        self._sums: dict[str, Moments] = {}
        self._grams: dict[tuple[torch.device, int], Tensor] = {}

    def moments(self) -> dict[str, Moments]:
        """The sums so far."""
        for name in list(self._sums):
            part = self._sums.pop(name)
            if part.error is None:
                # A product of a matrix and its transpose is symmetric only up to rounding.
                part = part._replace(total=(part.total + part.total.mT).mul_(0.5))
            self._read[name] = combine(self._read[name], part) if name in self._read else part
        self._grams.clear()
        return self._read

    def add(self, name: str, tokens: Tensor) -> None:
        """Add tokens of shape (..., D); nothing is read back."""
        rows = tokens.detach().reshape(-1, tokens.shape[-1])
        # A Gram matrix in half precision is indefinite, so autocast must not reach it. Tensors of
        # inference mode could not be written to outside of it.
        with (
            torch.inference_mode(mode=False),
            torch.no_grad(),
            torch.autocast(tokens.device.type, enabled=False),
        ):
            known = self._sums.get(name) or self._empty(rows)
            if known.error is not None:
                self._sums[name] = combine(known, second_moment(rows, check=False))
                return
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            for piece in torch.split(rows, GRAM_TOKENS):
                self._add_piece(known.total, piece)
            unit = max(known.unit, torch.finfo(rows.dtype).eps)
            self._sums[name] = known._replace(count=known.count + len(rows), unit=unit)

    def _add_piece(self, total: Tensor, rows: Tensor) -> None:
        if rows.dtype == total.dtype:
            total.addmm_(rows.mT, rows)
            return
        # One matrix for all layers of a width: memory that is used again is also faster.
        place = rows.device, rows.shape[1]
        if place not in self._grams:
            self._grams[place] = rows.new_empty(rows.shape[1], rows.shape[1])
        total.add_(torch.mm(rows.mT, rows, out=self._grams[place]))

    def _empty(self, rows: Tensor) -> Moments:
        """Moments of no tokens, in the types that loda_math sums these in."""
        start = second_moment(rows[:0, :1], check=False)
        total = start.total.new_zeros(rows.shape[1], rows.shape[1])
        return Moments(total, 0, None if start.error is None else total)


class _BatchMask:
    """Which tokens of one batch count, from what a :data:`Mask` gave for it."""

    def __init__(self, mask: Tensor) -> None:
        self.shape = tuple(mask.shape)
        self._counts = mask != 0
        self._places: dict[tuple[Any, ...], Tensor] = {}

    def fits(self, tokens: Tensor) -> bool:
        """Whether it says of every token whether it counts."""
        return self._spread(tuple(tokens.shape[:-1])) is not None

    def counted(self, tokens: Tensor, images: int = 1, part: slice = slice(None)) -> Tensor:
        """The tokens that count, of all images or of a part of them."""
        places = self._places_of(tokens, images, part)
        return tokens.reshape(-1, tokens.shape[-1]).index_select(0, places)

    def _places_of(self, tokens: Tensor, images: int, part: slice) -> Tensor:
        """Positions of the tokens that count.

        Read once a batch and not once a layer: an accelerator waits each time.
        """
        shape = tuple(tokens.shape[:-1])
        key = (shape, tokens.device, images, part.start, part.step)
        if key not in self._places:
            counts = self._spread(shape)
            assert counts is not None  # noqa: S101 - the caller has asked
            by_image = counts.reshape(images, -1)
            wanted = torch.zeros_like(by_image)
            wanted[part] = by_image[part]
            self._places[key] = wanted.flatten().nonzero()[:, 0].to(tokens.device)
        return self._places[key]

    def _spread(self, shape: tuple[int, ...]) -> Tensor | None:
        """The mask over tokens of a shape, if it fits them."""
        mask, own = self._counts, self.shape
        if shape[: len(own)] == own:
            return mask.reshape(*own, *[1] * (len(shape) - len(own))).expand(shape)
        if math.prod(shape) == math.prod(own) and (len(shape) == 1 or shape[:1] == own[:1]):
            return mask.reshape(shape)
        if len(shape) == 1 and shape == own[:1]:
            return mask.flatten(1).any(dim=1)
        return None


class _LayerMasks:
    """Masks of the layers for one batch after another."""

    def __init__(self, masks: Masks, layers: dict[str, nn.Module]) -> None:
        given = masks if isinstance(masks, Mapping) else {"*": masks}
        self._by_layer = by_pattern(layers, "mask", given, None)
        self._batch: dict[Mask, _BatchMask] = {}

    def read(self, batch: Any) -> None:
        """Take the masks of the next batch."""
        wanted = {mask for mask in self._by_layer.values() if mask is not None}
        self._batch = {mask: _BatchMask(_masked(batch, mask)) for mask in wanted}

    def of(self, name: str, tokens: Tensor) -> _BatchMask | None:
        """The mask of a layer, which must fit its tokens; ``None`` if all of them count."""
        given = self._by_layer[name]
        if given is None:
            return None
        mask = self._batch[given]
        if not mask.fits(tokens):
            msg = (
                f"the mask of layer {name!r} must have a shape that fits its inputs, got "
                f"{mask.shape} for inputs {tuple(tokens.shape)}; pass masks by layer, such as "
                f"mask={{'encoder.*': 'attention_mask'}}, or leave the layer out of the target"
            )
            raise ValueError(msg)
        return mask


def _masked(batch: Any, mask: Mask) -> Tensor:
    """What a mask says of a batch."""
    if isinstance(mask, str):
        keywords = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(keywords, Mapping) or mask not in keywords:
            keys = list(keywords) if isinstance(keywords, Mapping) else type(keywords).__name__
            msg = f"mask must be a key of every batch, or a function of it, got {mask!r}: {keys}"
            raise ValueError(msg)
        counts = keywords[mask]
    else:
        counts = mask(batch)
    if not isinstance(counts, Tensor) or counts.is_floating_point() or counts.is_complex():
        kind = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
        msg = (
            f"a mask must be a tensor of booleans or whole numbers, true where a token counts, got "
            f"{kind}; compare it, such as mask=lambda batch: batch['mask'] == 0"
        )
        raise TypeError(msg)
    if counts.ndim == 0:
        msg = "a mask must have the shape (B, T), or (B,), got a single number"
        raise ValueError(msg)
    return counts


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Run a model on a tensor, on the first element of a tuple, or on a mapping of keywords.

    Tensors are moved to the device of the model's first parameter. Batches of transformers
    (``BatchEncoding``, ``BatchFeature``) are mappings.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, (tuple, list)):
        batch = batch[0]
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    if not isinstance(batch, Tensor):
        msg = (
            f"a batch must be a tensor, a tuple that begins with one, or a mapping of keywords, "
            f"got {type(batch).__name__}; pass forward=, a function of the model and a batch"
        )
        raise TypeError(msg)
    return model(batch.to(device, non_blocking=True))


def collect_moments(
    model: nn.Module,
    batches: Iterable[Any],
    target: Target = TIMM_QKV,
    *,
    forward: Forward = default_forward,
    mask: Masks | None = None,
    reduce: Reduce | None = None,
) -> dict[str, Moments]:
    """Second moments of the target layers over all batches, in evaluation mode.

    Parameters
    ----------
    model : nn.Module
        Run without gradients; the training flag of every submodule is put back afterwards.
    batches : iterable
        What ``forward`` takes; a ``DataLoader`` of (images, labels) works as it is.
    target : str or sequence of str
        Patterns over module names.
    forward : callable, optional
        ``forward(model, batch)``.
    mask : str, callable or mapping, optional
        Tokens that count, such as ``"attention_mask"``, where others are padding: a key of a batch
        that is a mapping (or begins with one), or a function of the batch. It gives booleans or
        whole numbers of shape (B, T), zero where a token is left out, or (B,), which leaves out
        whole sequences. A layer with inputs (B, D), one for each sequence, counts the sequences
        that have a token. Masks that differ between layers go by name or pattern, such as
        ``{"text_model.*": "attention_mask"}``; in layers that none fits all tokens count.
    reduce : callable, optional
        Sums tensors over the processes that share the batches; by default over those of
        ``torch.distributed``, if it has several (:func:`sum_over_processes`; :func:`unshared` sums
        nothing). Each process has its own batches; one without any takes part as well.

    Returns
    -------
    dict of str to Moments

    Raises
    ------
    ValueError
        If there was no batch, a layer saw no tokens, its inputs were not finite, or do not have the
        shape of the mask.
    TypeError
        If a mask is no tensor of booleans or whole numbers.

    Examples
    --------
    >>> import torch
    >>> x, real = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> collect_moments(model, [(x, real)], "0", mask=lambda batch: batch[1])["0"].count
    4
    """
    collector = MomentCollector(model, target)
    _walk(collector, model, batches, forward, mask, reduce)
    return collector.moments


def collect_halves(
    model: nn.Module,
    batches: Iterable[Any],
    target: Target = TIMM_QKV,
    *,
    forward: Forward = default_forward,
    mask: Masks | None = None,
    reduce: Reduce | None = None,
) -> tuple[dict[str, Moments], MomentHalves]:
    """Second moments over all batches, as by :func:`collect_moments`, and those of two halves.

    These are of the layers that saw two images and more, along the first axis of their inputs.
    """
    collector = HalvingCollector(model, target)
    _walk(collector, model, batches, forward, mask, reduce)
    return collector.moments, collector.halves()


def _walk(
    collector: MomentCollector,
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    mask: Masks | None,
    reduce: Reduce | None,
) -> None:
    """Run all batches through a collector and check the result, as in :func:`collect_moments`."""
    masks = None if mask is None else _LayerMasks(mask, collector.layers)
    collector._masks = masks
    # Each submodule by itself: train(mode) on the model would give all of them one mode.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), collector:
            for batch in batches:
                if masks is not None:
                    masks.read(batch)
                forward(model, batch)
    finally:
        for module, mode in modes.items():
            module.training = mode
    reduce = default_reduce(reduce)
    if reduce is not None:
        collector.share(reduce)
    moments = collector.moments
    unseen = [n for n in collector.layers if n not in moments or moments[n].count == 0]
    if unseen:
        msg = (
            f"no tokens went through {unseen}: either there was no batch (an iterator that is "
            f"used up?), or the model neither calls these layers nor multiplies by their weight "
            f"with F.linear"
        )
        if masks is not None:
            msg = f"{msg}, or the mask counts no token (is it the other way round?)"
        raise ValueError(msg)
    # One read for all layers of a device.
    finite = [m.total.isfinite().all() for m in moments.values()]
    home = finite[0].device
    values = torch.stack([good.to(home) for good in finite]).tolist()
    broken = [name for name, good in zip(moments, values, strict=True) if not good]
    if broken:
        msg = (
            f"inputs of {broken} hold NaN or infinite values; look for the first layer of the "
            f"list, and at the images and weights before it"
        )
        raise ValueError(msg)
