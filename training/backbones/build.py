"""The pretrained network: a model without classifier, its weights, and the images it takes."""

import difflib
import json
import textwrap
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open
from torch import Tensor, nn

import training.backbones.conv_vit  # noqa: F401  timm learns its name
from training.backbones.backbone import Backbone
from training.backbones.hugging_face import build_hugging_face
from training.backbones.weight_files import load_weights, tensors_sha256
from training.config import HUGGING_FACE, PACKAGED_WEIGHTS, BackboneConfig

# Packages whose errors mean that the network failed; not all of them are OSErrors.
_TRANSPORTS = {"huggingface_hub", "httpx", "httpcore", "requests", "urllib3"}


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
    backbone = _build(config, initialise=initialise)
    if not initialise:
        return backbone
    return backbone._replace(tensors_sha256=tensors_sha256(backbone.module))


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


def _build(config: BackboneConfig, *, initialise: bool) -> Backbone:
    if config.name in PACKAGED_WEIGHTS:
        with as_file(files("training").joinpath("weights", PACKAGED_WEIGHTS[config.name])) as path:
            return _build_packaged(path, config, initialise=initialise)
    if config.name.startswith(HUGGING_FACE):
        return build_hugging_face(config, initialise=initialise)
    module = _create(config.name, config.options)
    digest = tag = None
    if initialise and config.weights is not None:
        path = Path(config.weights).expanduser()
        digest = load_weights(module, path)
    elif initialise and config.pretrained:
        module = _download(config)
        tag = _tag(module)
    return _describe(module, config.name, config.options, digest)._replace(tag=tag)


def _build_packaged(path: Path, config: BackboneConfig, *, initialise: bool) -> Backbone:
    if not path.is_file():
        msg = f"the package lacks its own weights, {path}: install it again."
        raise FileNotFoundError(msg)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    name, options = metadata["timm_model"], json.loads(metadata["timm_options"])
    options.pop("num_classes", None)  # no backbone here has a classifier
    module = _create(name, options)
    digest = load_weights(module, path) if initialise and config.pretrained else None
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
                "a network, fetch them elsewhere and give the file (.safetensors, .pth or .npz) as "
                "backbone.weights; backbone.pretrained false starts from random weights."
            )
            raise ConnectionError(msg) from error
        msg = (
            f"the pretrained weights of {config.name} do not fit the model with backbone.options "
            f"{config.options}, or their file is damaged: {reason} Change the options, give a file "
            "as backbone.weights, or start from random weights by backbone.pretrained false."
        )
        raise ValueError(msg) from error
    return module


def _tag(module: nn.Module) -> str | None:
    settings: Mapping[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    # A name without a tag means timm's default one, which may differ from version to version.
    name = ".".join(str(settings[key]) for key in ("architecture", "tag") if settings.get(key))
    places = (settings.get(key) for key in ("hf_hub_id", "url", "file"))
    return f"{name} from {next((str(place) for place in places if place), 'timm')}"


def _is_transport(error: Exception) -> bool:
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or not packages.isdisjoint(_TRANSPORTS)


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
