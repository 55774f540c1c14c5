"""What is wrong with a backbone for these images and settings, found before training."""

import torch
from torch import Tensor, nn

from backends.torch import PRESETS, MomentCollector, find_layers
from training.backbones.build import Backbone
from training.components import Component
from training.spelling import some

_SAME = 1e-3  # largest difference of two answers, relative to their size, that is rounding


def check_fits(backbone: Backbone, image: Tensor) -> None:
    """Check that the backbone takes images like this one, of shape (C, H, W).

    Raises
    ------
    ValueError
        If the number of channels or the size differs; the message names the settings to change.
    """
    channels, height, width = image.shape
    if channels != backbone.channels:
        option = backbone.channels_option
        cure = f"set {option} to {channels}, which adapts the first layer, or " if option else ""
        msg = (
            f"the images have {channels} channels, but {backbone.name} takes "
            f"{backbone.channels}: {cure}choose another backbone.name or data.name"
        )
        raise ValueError(msg)
    size = backbone.image_size
    if size is not None and (height, width) != (size, size):
        option = backbone.size_option
        cure = f", or {option} to {height}, which resizes position embeddings" if option else ""
        msg = (
            f"the images are {height} by {width} pixels, but {backbone.name} takes {size} by "
            f"{size}: set data.image_size (and what leads to it: data.resize, data.train_crop, "
            f"data.test_resize, data.test_crop) to {size}{cure}"
        )
        raise ValueError(msg)


def check_features(backbone: Backbone, image: Tensor) -> None:
    """Run the backbone twice on one image, and check what comes out.

    Training, read-outs and predictions need one feature vector for an image. A model that masks
    patches at random, as in pretraining, gives another one every time.

    Parameters
    ----------
    backbone : Backbone
        On any device. It runs in evaluation mode; random numbers of torch stay as they were.
    image : Tensor, shape (C, H, W)
        One image as the backbone takes it.

    Raises
    ------
    ValueError
        If it cannot be run, its output is not one finite vector of ``backbone.features`` numbers,
        or two runs on the same image differ.
    """
    name, size = backbone.name, tuple(image.shape)
    try:
        first, second = (_run(backbone.module, image, seed) for seed in range(2))
    except Exception as error:  # each model raises its own errors
        reason = " ".join(str(error).split()) or type(error).__name__
        msg = (
            f"backbone {name} must take images of shape {size}, got an error: {reason:.400}; set "
            f"data.image_size to what it takes, or choose another backbone.name"
        )
        raise ValueError(msg) from error
    if not isinstance(first, Tensor) or first.shape != (1, backbone.features):
        got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        msg = (
            f"backbone {name} must return features of shape (N, {backbone.features}), got {got} "
            f"for one image; choose a model with a pooling, or set "
            f"backbone.options.global_pool if it has that option"
        )
        raise ValueError(msg)
    if not bool(first.isfinite().all()):
        msg = (
            f"backbone {name} must return finite features, got NaN or infinite ones for the first "
            f"image; look at its weights, data.mean and data.std"
        )
        raise ValueError(msg)
    if float((first - second).norm()) > _SAME * float(first.norm()):
        msg = (
            f"backbone {name} must give one answer to one image, got two in evaluation mode: it "
            f"draws random numbers, as models do that mask patches in pretraining; load its "
            f"encoder without the masking, or choose another backbone.name"
        )
        raise ValueError(msg)


def check_target(backbone: Backbone, image: Tensor, method: Component) -> None:
    """Check that the layers that a method adapts take part in a forward pass.

    A layer that the model never calls, and whose weight it does not multiply by with ``F.linear``,
    has no inputs to learn from.

    Parameters
    ----------
    backbone : Backbone
        On any device.
    image : Tensor, shape (C, H, W)
        One image as the backbone takes it.
    method : Component
        The section ``method``. Its options ``target`` and ``exclude`` are names and patterns of
        layers, see `backends.torch.find_layers`; without a target there is nothing to check, and
        methods of other packages may mean something else by it.

    Raises
    ------
    ValueError
        If a pattern matches no layer, or a layer takes no part; the message names layers that do.
    """
    target = method.options.get("target")
    if target is None or not method.registry.is_packaged(method.name):
        return
    model = backbone.module
    try:
        layers = find_layers(model, target, method.options.get("exclude", ()))
    except ValueError as error:
        # Several presets may be names of one pattern.
        first = {pattern: name for name, pattern in reversed(list(PRESETS.items()))}
        fitting = [name for pattern, name in first.items() if _fits(model, pattern)]
        cure = f" ({' or '.join(fitting)} would fit)" if fitting else ""
        msg = f"method.target must name layers of {backbone.name}, got {target}{cure}: {error}"
        raise ValueError(msg) from error
    seen = _with_inputs(model, image, list(layers))
    unseen = [name for name in layers if name not in seen]
    if not unseen:
        return
    others = _with_inputs(model, image, ["*"])
    would_do = f"layers that do: {some(others)}" if others else "no linear layer does"
    msg = (
        f"method.target must name layers that the model {backbone.name} calls, got {some(unseen)}: "
        f"it does not call them or multiply by their weights with F.linear; {would_do}"
    )
    raise ValueError(msg)


def _fits(model: nn.Module, pattern: str) -> bool:
    try:
        return bool(find_layers(model, pattern))
    except ValueError:
        return False


def _with_inputs(model: nn.Module, image: Tensor, target: list[str]) -> list[str]:
    """Layers of a target that see an input in a forward pass."""
    with MomentCollector(model, target) as collector:
        _run(model, image)
    return [name for name in collector.layers if name in collector.moments]


def _run(model: nn.Module, image: Tensor, seed: int = 0) -> Tensor:
    """Output for one image in evaluation mode; the model and random generators stay as they are."""
    weight = next(model.parameters(), image)
    mode = [(module, module.training) for module in model.modules()]
    devices = [weight.device] if weight.device.type == "cuda" else []
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            output: Tensor = model(image[None].to(weight))
            return output
    finally:
        for module, training in mode:
            module.training = training
