"""The pretrained network: a model without classifier, its weights, and the images it takes."""

import difflib
import json
import textwrap
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import nn

import training.backbones.conv_vit  # noqa: F401  registers its name in timm
from training.backbones.weights import LoadedWeights, load_weights, tensors_sha256
from training.components import Component

# Packages whose errors mean that a download failed; not all of these are OSErrors.
_TRANSPORTS = {"huggingface_hub", "httpx", "httpcore", "requests", "urllib3"}

SAVED_BY_TIMM = ("hf-hub:", "local-dir:")
"""Prefixes of backbone names that timm reads with its configuration, from a hub or a folder."""

_WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".bin")

_OTHER_WEIGHTS = (
    "give a file (.safetensors, .pth, .bin or .npz) as backbone.weights, or start from random "
    "weights by backbone.pretrained false"
)


class Backbone(NamedTuple):
    """A network that maps each image to one feature vector.

    Parameters
    ----------
    module
        Maps images (N, C, H, W) to features (N, D): for a ViT, the class token after the last norm.
    features
        Number of features D.
    timm_name
        Name to rebuild the module with: ``timm.create_model(timm_name, num_classes=0,
        **timm_options)``; the library transformers for a name that starts with hf:, the class for
        an import path.
    timm_options
        Options to rebuild it with.
    weights_sha256
        Hash of the weights file; None for random and for downloaded weights.
    channels
        Number of channels of the images.
    image_size
        Side of the images; None if the model takes any size.
    tag
        Exact tag of published weights that were downloaded; None for others.
    tensors_sha256
        Hash of the loaded weights, independent of their file (see `tensors_sha256`); None if a
        trained model is loaded afterwards.
    name
        What the settings call it, ``backbone.name``.
    size_option, channels_option
        The settings that fit it to images of another size or with other channels; empty if none
        does.
    notes
        What the user should know of it, one sentence each: that its weights are random, what was
        left out of a file.
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
    name: str = ""
    size_option: str = ""
    channels_option: str = ""
    notes: tuple[str, ...] = ()


def build_backbone(config: Component, *, initialise: bool = True) -> Backbone:
    """Build the network and load its weights.

    Parameters
    ----------
    config
        The section ``backbone``: which model and which weights.
    initialise
        False leaves the weights random, for a caller that loads a trained model afterwards: no
        weights file is needed then, and nothing is downloaded.

    Raises
    ------
    FileNotFoundError
        If the weights file is missing.
    ValueError
        If there is no such model or it refuses the options, or the weights do not fit.
    ConnectionError
        If the weights cannot be downloaded.
    """
    built = config.build().build(initialise=initialise)
    # A third-party class returns only the module: the other facts are read from it.
    is_whole = isinstance(built, Backbone)
    if not is_whole and not isinstance(built, nn.Module):
        msg = (
            f"build of the backbone {config.name} must return a torch.nn.Module, got "
            f"{built!r:.40}; return the network that it builds"
        )
        raise ValueError(msg)
    backbone: Backbone = built if is_whole else described(built, config.name, config.options)
    backbone = backbone._replace(name=config.name)
    if not initialise:
        return backbone
    if config.options.get("pretrained") is False:
        random = "its weights are random (backbone.pretrained false): nothing was learned before"
        backbone = backbone._replace(notes=(*backbone.notes, random))
    return backbone._replace(tensors_sha256=tensors_sha256(backbone.module))


def build_packaged(weights: str, *, pretrained: bool) -> Backbone:
    """Build a network of the package as the metadata of its weights file describe it."""
    path = Path(str(files("training").joinpath("weights", weights)))
    if not path.is_file():
        msg = f"the package lacks its weights, {path}: reinstall it."
        raise FileNotFoundError(msg)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    model, options = metadata["timm_model"], json.loads(metadata["timm_options"])
    options.pop("num_classes", None)  # no backbone here has a classifier
    module = _create(model, options)
    digest = load_weights(module, path).sha256 if pretrained else None
    return described(module, model, options, digest=digest)


def build_timm(
    name: str,
    options: Mapping[str, Any],
    weights: str | None = None,
    *,
    pretrained: bool = False,
) -> Backbone:
    """Build a timm model with weights from a file or, if ``pretrained``, from timm or a hub.

    Parameters
    ----------
    name
        Name of the model, or ``hf-hub:NAME`` or ``local-dir:FOLDER``: what ``save_for_hf`` or
        ``push_to_hf_hub`` of timm wrote, a ``config.json`` and weights.
    options
        Further arguments of ``timm.create_model``.
    weights
        File to load the weights from.
    pretrained
        Whether to load the published weights if there is no such file.
    """
    if name.startswith(SAVED_BY_TIMM):
        timm_settings(name)  # says clearly what its config.json lacks
    module = _create(name, options)
    tag, path = None, None if weights is None else Path(weights).expanduser()
    if path is None and pretrained:
        if name.startswith(SAVED_BY_TIMM):
            path, tag = _saved_weights(name)
        else:
            module = _download(name, options)
            tag = _tag(module)
    loaded = LoadedWeights(None) if path is None else load_weights(module, path)
    timm_model = described(module, name, options, digest=loaded.sha256, tag=tag)
    return timm_model._replace(
        size_option="backbone.options.img_size",
        channels_option="backbone.options.in_chans",
        notes=loaded.notes,
    )


def described(
    module: nn.Module,
    name: str,
    options: Mapping[str, Any],
    *,
    digest: str | None = None,
    tag: str | None = None,
) -> Backbone:
    """A module with the facts that the package needs.

    They are read from its attributes ``num_features`` (length of its features), ``in_chans`` (by
    default the channels of its first convolution) and ``image_size`` (by default the size that a
    patch embedding requires).

    Raises
    ------
    ValueError
        If the number of features or channels cannot be determined.
    """
    # timm models with a layer before the classifier have a separate name for its width.
    sizes = (getattr(module, key, None) for key in ("head_hidden_size", "num_features"))
    features: Any = next((size for size in sizes if size), None)
    channels: Any = getattr(module, "in_chans", None)
    first = next((p for p in module.parameters() if p.ndim == 4), None)
    if channels is None and first is not None:
        groups = next((m.groups for m in module.modules() if isinstance(m, nn.Conv2d)), 1)
        channels = first.shape[1] * groups
    for attribute, value in (("num_features", features), ("in_chans", channels)):
        if value is None:
            msg = f"the module of backbone {name} must have a number {attribute}; it has none"
            raise ValueError(msg)
    side: Any = getattr(module, "image_size", None)
    patches = getattr(module, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if side is None and isinstance(size, tuple | list):
        side = size[0] if getattr(patches, "strict_img_size", True) else None
    return Backbone(
        module,
        int(features),
        name,
        dict(options),
        digest,
        int(channels),
        None if side is None else int(side),
        tag,
    )


def timm_settings(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What timm knows of a model without building it: its ``pretrained_cfg``, and saved options.

    Both are empty for a model that timm builds but has no configuration of.

    Parameters
    ----------
    name
        Name of the model, or ``hf-hub:NAME`` or ``local-dir:FOLDER``, whose ``config.json`` is
        read and may hold options that the model was saved with.

    Raises
    ------
    ValueError
        If timm has no such model, or its configuration cannot be used.
    ConnectionError
        If it cannot be read or downloaded.
    """
    _check_name(name)
    if not name.startswith(SAVED_BY_TIMM) and timm.get_pretrained_cfg(name) is None:
        return {}, {}
    try:
        given: dict[str, Any] = timm.models.resolve_model_input_args(_expanded(name))
    except Exception as error:  # each transport raises its own errors, and files may be damaged
        reason = one_line(error)
        if _is_transport(error):
            msg = (
                f"backbone.name {name}: there is no such folder with a config.json of timm, and it "
                f"could not be downloaded: {reason}"
            )
            raise ConnectionError(msg) from error
        msg = f"backbone.name {name}: its config.json is not one of timm's: {reason}"
        raise ValueError(msg) from error
    settings: dict[str, Any] = given.pop("pretrained_cfg")
    saved = {k: v for k, v in given.items() if k not in ("model_name", "pretrained_model_args")}
    return settings, saved


def _expanded(name: str) -> str:
    """The name with ~ written out in a folder, which timm takes literally."""
    kind, colon, place = name.partition(":")
    return f"{kind}{colon}{Path(place).expanduser()}" if kind == "local-dir" else name


def _saved_weights(name: str) -> tuple[Path, str | None]:
    """The weights file of a model that timm saved, and the exact revision of one from a hub."""
    kind, _, place = name.partition(":")
    if kind == "local-dir":
        folder = Path(_expanded(name).partition(":")[2])
        paths = [folder / file for file in _WEIGHTS_FILES if (folder / file).is_file()]
        paths = paths or sorted(p for p in folder.iterdir() if p.suffix in _WEIGHTS_SUFFIXES)[:1]
        if not paths:
            msg = f"backbone.name {name}: the folder has no weights, {' or '.join(_WEIGHTS_FILES)}"
            raise FileNotFoundError(msg)
        return paths[0], None
    repository, _, revision = place.partition("@")
    try:
        try:
            path = Path(hf_hub_download(repository, _WEIGHTS_FILES[0], revision=revision or None))
        except EntryNotFoundError:
            path = Path(hf_hub_download(repository, _WEIGHTS_FILES[1], revision=revision or None))
    except Exception as error:  # each transport raises its own errors
        msg = (
            f"the pretrained weights of {name} could not be downloaded ({one_line(error)}). "
            f"Download them elsewhere, and {_OTHER_WEIGHTS}."
        )
        raise ConnectionError(msg) from error
    # A snapshot of a repository is kept in a folder with the name of its commit.
    return path, f"{repository} at {path.parent.name}"


def _check_name(name: str) -> None:
    """An error with similar names, if timm has no model of this name."""
    if not name.startswith(SAVED_BY_TIMM) and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        if "/" in name:
            hint = f" Did you mean hf-hub:{name} or hf:{name} of a hub, or local-dir:{name}?"
        first, dot, _ = name.partition(".")
        path = f", and there is no module {first} for an import path" if dot else ""
        msg = f"backbone.name: timm {timm.__version__} has no model {name!r}{path}.{hint}"
        raise ValueError(msg)


def _create(name: str, options: Mapping[str, Any]) -> nn.Module:
    _check_name(name)
    try:
        module: nn.Module = timm.create_model(
            _expanded(name), pretrained=False, num_classes=0, **options
        )
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
        msg = f"timm cannot build {name} with backbone.options {dict(options)}: {error}"
        raise ValueError(msg) from error
    return module


def _download(name: str, options: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model_pretrained(name):
        msg = f"timm has no pretrained weights for {name}: {_OTHER_WEIGHTS}."
        raise ValueError(msg)
    # The model was already built without weights, so only downloading or loading can fail now.
    try:
        module: nn.Module = timm.create_model(name, pretrained=True, num_classes=0, **options)
    except Exception as error:  # each transport and each model raises its own errors
        reason = one_line(error)
        if _is_transport(error):
            msg = (
                f"the pretrained weights of {name} could not be downloaded ({reason}). Download "
                f"them elsewhere, and {_OTHER_WEIGHTS}."
            )
            raise ConnectionError(msg) from error
        msg = (
            f"the pretrained weights of {name} do not fit the model with backbone.options "
            f"{options}, or their file is damaged: {reason} Change the options, or "
            f"{_OTHER_WEIGHTS}."
        )
        raise ValueError(msg) from error
    return module


def one_line(error: Exception) -> str:
    """The message of an error, shortened; its class if there is no message."""
    return textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" ...")


def _tag(module: nn.Module) -> str | None:
    settings: Mapping[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    # A name without a tag means timm's default tag, which may differ between versions.
    name = ".".join(str(settings[key]) for key in ("architecture", "tag") if settings.get(key))
    places = (settings.get(key) for key in ("hf_hub_id", "url", "file"))
    return f"{name} from {next((str(place) for place in places if place), 'timm')}"


def _is_transport(error: Exception) -> bool:
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or not packages.isdisjoint(_TRANSPORTS)
