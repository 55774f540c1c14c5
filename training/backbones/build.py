"""The pretrained network: a model without classifier, its weights, and the images it takes."""

import difflib
import inspect
import json
import textwrap
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import timm
from safetensors import safe_open
from torch import Tensor, nn

import training.backbones.conv_vit  # noqa: F401  timm learns its name
from training.backbones.config import HUGGING_FACE, PACKAGED_WEIGHTS, BackboneConfig
from training.backbones.weights import load_weights, tensors_sha256
from training.components import import_class, is_import_path

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
        What rebuilds the module: ``timm.create_model(timm_name, num_classes=0, **timm_options)``;
        for a name that starts with hf: the library transformers, for an import path its class.
    weights_sha256
        Hash of the weights file; None for random weights and for those that timm downloaded.
    channels
        Channels of the images.
    image_size
        Side of the images; None if the model takes any.
    tag
        The published weights that were downloaded, with their exact tag; None for others.
    tensors_sha256
        Hash of the loaded weights themselves, from wherever they came (see `tensors_sha256`); None
        where a trained model is loaded afterwards.
    """

    module: nn.Module
    features: int
    timm_name: str
    timm_options: dict[str, Any]
    weights_sha256: str | None
    channels: int
    image_size: int | None
    tag: str | None = None
    tensors_sha256: str | None = None


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
        If there is no such model or it refuses the options, or the weights do not fit.
    ConnectionError
        If the weights cannot be downloaded.
    """
    name, options, weights = config.name, dict(config.options), config.weights
    if name in PACKAGED_WEIGHTS:
        path = _packaged(name)
        name, options = _recorded_model(path)
        weights = str(path) if config.pretrained else None
    # A file replaces whatever weights the model could fetch.
    fetch = initialise and config.pretrained and weights is None
    tag = None
    if name.startswith(HUGGING_FACE):
        from training.backbones.hugging_face import load_hugging_face

        module, tag = load_hugging_face(name, pretrained=fetch)
    elif is_import_path(name):
        module = _own(name, options, pretrained=fetch)
    else:
        module = _create(name, options)
        if fetch:
            module = _download(name, options)
            tag = _tag(module)
    digest = None
    if initialise and weights is not None:
        digest = load_weights(module, Path(weights).expanduser())
    return Backbone(
        module,
        _features(module, name),
        name,
        options,
        digest,
        _channels(module, name),
        _image_size(module),
        tag,
        tensors_sha256(module) if initialise else None,
    )


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


def _packaged(name: str) -> Path:
    path = Path(str(files("training").joinpath("weights", PACKAGED_WEIGHTS[name])))
    if not path.is_file():
        msg = f"the package lacks its own weights, {path}: install it again."
        raise FileNotFoundError(msg)
    return path


def _recorded_model(path: Path) -> tuple[str, dict[str, Any]]:
    """timm's name and options of the model that a packaged file of weights is of."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    options = json.loads(metadata["timm_options"])
    options.pop("num_classes", None)  # no backbone here has a classifier
    return metadata["timm_model"], options


def _own(path: str, options: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    """Build a model given by an import path; it is told of ``pretrained`` if it takes that."""
    # Only a module is called: the name may come from the configuration of a stranger's run.
    kind = import_class(path, nn.Module, "backbone.name")
    arguments = dict(options)
    if "pretrained" in inspect.signature(kind).parameters:
        arguments["pretrained"] = pretrained
    try:
        module: nn.Module = kind(**arguments)
    except TypeError as error:
        msg = f"{path} cannot be built with backbone.options {dict(options)}: {error}"
        raise ValueError(msg) from error
    return module


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


def _download(name: str, options: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model_pretrained(name):
        msg = (
            f"timm has no pretrained weights for {name}: give a file as backbone.weights, or start "
            "from random weights by backbone.pretrained false."
        )
        raise ValueError(msg)
    # The model was already built without weights: what fails now is the download or the loading.
    try:
        module: nn.Module = timm.create_model(name, pretrained=True, num_classes=0, **options)
    except Exception as error:  # each transport and each model has errors of its own
        reason = textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" ...")
        if _is_transport(error):
            msg = (
                f"the pretrained weights of {name} could not be fetched ({reason}). Without a "
                "network, fetch them elsewhere and give the file (.safetensors, .pth or .npz) as "
                "backbone.weights; backbone.pretrained false starts from random weights."
            )
            raise ConnectionError(msg) from error
        msg = (
            f"the pretrained weights of {name} do not fit the model with backbone.options "
            f"{options}, or their file is damaged: {reason} Change the options, give a file as "
            "backbone.weights, or start from random weights by backbone.pretrained false."
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


def _features(module: nn.Module, name: str) -> int:
    # timm's models with a layer between the class token and the classifier name its width apart.
    features: Any = getattr(module, "head_hidden_size", None) or getattr(
        module, "num_features", None
    )
    if features is None:
        msg = f"backbone.name {name}: give the module num_features, the length of its features"
        raise ValueError(msg)
    return int(features)


def _channels(module: nn.Module, name: str) -> int:
    """``module.in_chans`` if it says so, else what its first convolution takes."""
    channels: Any = getattr(module, "in_chans", None)
    if channels is not None:
        return int(channels)
    weight = next((p for p in module.parameters() if p.ndim == 4), None)
    if weight is None:
        msg = f"backbone.name {name}: give the module in_chans, the number of channels of images"
        raise ValueError(msg)
    groups = next((m.groups for m in module.modules() if isinstance(m, nn.Conv2d)), 1)
    return weight.shape[1] * groups


def _image_size(module: nn.Module) -> int | None:
    """``module.image_size`` if it says so, else the size that a patch embedding insists on."""
    size: Any = getattr(module, "image_size", None)
    if size is not None:
        return int(size)
    patches = getattr(module, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    strict = getattr(patches, "strict_img_size", True)
    return int(size[0]) if isinstance(size, tuple | list) and strict else None
