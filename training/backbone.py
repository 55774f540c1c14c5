"""The pretrained network: a timm model without classifier, its weights, and the images it takes."""

import difflib
import hashlib
import json
import textwrap
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from training.config import BackboneConfig

GLYPHS = "glyphs_vit.safetensors"

# Packages whose errors mean that the network failed; not all of them are OSErrors.
_TRANSPORTS = {"huggingface_hub", "httpx", "httpcore", "requests", "urllib3"}


class Backbone(NamedTuple):
    """A network that gives one feature a picture.

    Parameters
    ----------
    module
        Maps images (N, C, H, W) to features (N, D): for a ViT, the class token after the last norm.
    features
        Number of features D.
    timm_name, timm_options
        What rebuilds the module: ``timm.create_model(timm_name, num_classes=0, **timm_options)``.
    weights_sha256
        Hash of the weights file; None for random weights and for those that timm downloaded.
    channels
        Channels of the images.
    image_size
        Side of the images; None if the model takes any.
    """

    module: nn.Module
    features: int
    timm_name: str
    timm_options: dict[str, Any]
    weights_sha256: str | None
    channels: int
    image_size: int | None


def build_backbone(config: BackboneConfig, *, initialise: bool = True) -> Backbone:
    """Build the network and load its weights.

    Parameters
    ----------
    config
        Which model and which weights.
    initialise
        False leaves the weights random, for a caller that loads a trained model afterwards: no
        weights file is then needed and nothing is downloaded.

    Raises
    ------
    FileNotFoundError
        If the weights file is not there.
    ValueError
        If timm has no such model or refuses the options, or the weights do not fit.
    ConnectionError
        If the weights cannot be downloaded.
    """
    if config.name == "glyphs":
        with as_file(files("training").joinpath("weights", GLYPHS)) as path:
            return _build_glyphs(path, config, initialise=initialise)
    module = _create(config.name, config.options)
    digest = None
    if initialise and config.weights is not None:
        path = Path(config.weights).expanduser()
        digest = _load(module, path)
    elif initialise and config.pretrained:
        module = _download(config)
    return _describe(module, config.name, config.options, digest)


def check_fits(backbone: Backbone, image: Tensor) -> None:
    """Check that the backbone takes images like this one, of shape (C, H, W).

    Raises
    ------
    ValueError
        If the number of channels or the size differs; the message names the settings to change.
    """
    channels, height, width = image.shape
    if channels != backbone.channels:
        msg = (
            f"the images have {channels} channels, but {backbone.timm_name} takes "
            f"{backbone.channels}: set backbone.options.in_chans to {channels}, with weights "
            "trained that way, or choose another backbone.name or data.name."
        )
        raise ValueError(msg)
    size = backbone.image_size
    if size is not None and (height, width) != (size, size):
        msg = (
            f"the images are {height} by {width} pixels, but {backbone.timm_name} takes {size} by "
            f"{size}: set data.image_size (and what leads to it: data.resize, data.train_crop, "
            f"data.test_resize, data.test_crop) to {size}, or backbone.options.img_size to "
            f"{height} if the weights allow it."
        )
        raise ValueError(msg)


def file_sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build_glyphs(path: Path, config: BackboneConfig, *, initialise: bool) -> Backbone:
    if not path.is_file():
        msg = f"the package lacks its own weights, {path}: install it again."
        raise FileNotFoundError(msg)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    name, options = metadata["timm_model"], json.loads(metadata["timm_options"])
    options.pop("num_classes", None)  # no backbone here has a classifier
    module = _create(name, options)
    digest = _load(module, path) if initialise and config.pretrained else None
    return _describe(module, name, options, digest)


def _create(name: str, options: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        msg = f"backbone.name: timm {timm.__version__} has no model {name!r}.{hint}"
        raise ValueError(msg)
    try:
        module: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
        msg = f"timm cannot build {name} with backbone.options {dict(options)}: {error}"
        raise ValueError(msg) from error
    return module


def _download(config: BackboneConfig) -> nn.Module:
    if not timm.is_model_pretrained(config.name):
        msg = (
            f"timm has no pretrained weights for {config.name}: give a file as backbone.weights, "
            "or start from random weights by backbone.pretrained false."
        )
        raise ValueError(msg)
    # The model was already built without weights: what fails now is the download or the loading.
    try:
        module: nn.Module = timm.create_model(
            config.name, pretrained=True, num_classes=0, **config.options
        )
    except Exception as error:  # each transport and each model has errors of its own
        reason = textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" ...")
        if _is_transport(error):
            msg = (
                f"the pretrained weights of {config.name} could not be fetched ({reason}). Without "
                "a network, fetch them elsewhere and give the file as backbone.weights "
                "(.safetensors or .pth); backbone.pretrained false starts from random weights."
            )
            raise ConnectionError(msg) from error
        msg = (
            f"the pretrained weights of {config.name} do not fit the model with backbone.options "
            f"{config.options}, or their file is damaged: {reason} Change the options, give a file "
            "as backbone.weights, or start from random weights by backbone.pretrained false."
        )
        raise ValueError(msg) from error
    return module


def _is_transport(error: Exception) -> bool:
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or not packages.isdisjoint(_TRANSPORTS)


def _load(module: nn.Module, path: Path) -> str:
    weights = _read(path)
    own = module.state_dict()
    weights = {key: value for key, value in weights.items() if not _is_classifier(module, key, own)}
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    shapes = [
        f"{key} is {_shape(weights[key])}, the model has {_shape(value)}"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(found.values()):
        lists = " ".join(f"{kind}: {_some(names)}." for kind, names in found.items() if names)
        msg = (
            f"the weights in {path} do not fit the model. {lists} Check backbone.name and "
            "backbone.options (img_size, patch_size, embed_dim, depth, in_chans) against what the "
            "file was trained with."
        )
        raise ValueError(msg)
    infinite = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if infinite:
        msg = f"the weights in {path} hold NaN or infinite values: {_some(infinite)}."
        raise ValueError(msg)
    module.load_state_dict(weights)
    return file_sha256(path)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        msg = f"backbone.weights: no file {path}."
        raise FileNotFoundError(msg)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file provokes in the readers
        reason = (str(error).splitlines() or [""])[0]
        # torch's own words would advise to run whatever code the file holds.
        if path.suffix != ".safetensors" and not isinstance(error, OSError):
            reason = (
                "it holds more than tensors, or is damaged. Save the model's state_dict() alone, "
                "best as .safetensors."
            )
        raise _unusable(path, reason) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise _unusable(path, "it holds no named tensors.")
    odd = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise _unusable(path, f"entries that are no tensors: {_some(odd)}.")
    # Models saved from a data-parallel wrapper carry its name in front of every parameter.
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _is_classifier(module: nn.Module, key: str, own: Mapping[str, Tensor]) -> bool:
    if key in own:
        return False
    settings: Mapping[str, Any] = getattr(module, "default_cfg", None) or {}
    named = settings.get("classifier") or ()
    prefixes = {"head", "head_dist", "fc", *([named] if isinstance(named, str) else named)}
    return any(key.startswith(f"{prefix}.") for prefix in prefixes)


def _describe(
    module: nn.Module, name: str, options: Mapping[str, Any], digest: str | None
) -> Backbone:
    weight = next(p for p in module.parameters() if p.ndim == 4)  # the first convolution
    features: Any = getattr(module, "head_hidden_size", None) or module.num_features
    groups = next((m.groups for m in module.modules() if isinstance(m, nn.Conv2d)), 1)
    channels = weight.shape[1] * groups
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    strict = getattr(getattr(module, "patch_embed", None), "strict_img_size", True)
    side = int(size[0]) if isinstance(size, tuple | list) and strict else None
    return Backbone(module, int(features), name, dict(options), digest, channels, side)


def _unusable(path: Path, reason: str) -> ValueError:
    return ValueError(f"backbone.weights: cannot read {path} as .safetensors or .pth: {reason}")


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a scalar"


def _some(names: list[str]) -> str:
    rest = len(names) - 8
    return ", ".join(names[:8]) + (f" and {rest} more" if rest > 0 else "")
