"""How a pretrained network wants its images: size, resize and crop, channels, mean and deviation.

A network sees what it was trained on only if the images are scaled and normalised in the same way.
timm, transformers and the weights files of the package each say how; what they say is read here,
without reading weights.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError, safe_open

from training.components import Component
from training.run_dir import readable

_PIXELS = re.compile(r"\(x/255 - ([\d.]+)\) / ([\d.]+)")
# Pillow's numbers of filters, which image processors record.
_FILTERS: dict[Any, str] = {kind.value: kind.name.lower() for kind in Image.Resampling}
_UNCROPPED = 384  # from this side on, ConvNeXt's processor resizes to a square and cuts nothing off


@dataclass(frozen=True)
class Preprocessing:
    """What is done to a decoded image before the network sees it, in evaluation.

    Attributes
    ----------
    image_size : int
        Side of the square input, in pixels.
    mean, std : tuple of float
        Subtracted from pixels in [0, 1], and dividing them afterwards, one number a channel.
    interpolation : str
        Filter of the resize: nearest, bilinear, bicubic, lanczos, box or hamming.
    crop_pct : float
        Side of the input over the side after the resize: 0.875 resizes to 256 for 224.
    crop_mode : str
        As in timm. center: resize the shorter side, cut out the middle. squash: resize to a
        square, whatever the shape. border: resize the longer side, pad.
    channels : int
        Number of channels.

    Examples
    --------
    >>> Preprocessing(224, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.875, "center", 3).resized
    256
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str
    channels: int

    @property
    def resized(self) -> int:
        """Side after the resize, in pixels, before the crop; timm rounds down."""
        return int(self.image_size / self.crop_pct)


def preprocessing_of(config: Component) -> Preprocessing | None:
    """How the network of a section ``backbone`` wants its images.

    Nothing is built and no weights are read. For a name on a hub, its small configuration files are
    downloaded if they are not in the cache.

    Parameters
    ----------
    config : Component
        The section ``backbone``.

    Returns
    -------
    Preprocessing or None
        None if nothing is known: the model has no configuration of its images, or it is a class of
        the user's without an attribute (or function) ``preprocessing``.

    Raises
    ------
    ValueError
        If the configuration cannot be used, for images that are not square, say.
    ConnectionError
        If it cannot be downloaded.

    Examples
    --------
    >>> from training.backbones import BackboneConfig
    >>> preprocessing_of(BackboneConfig("cifar_vit")).mean
    (0.5, 0.5, 0.5)
    """
    if not config.is_known:
        return None
    declared: Any = getattr(config.build(), "preprocessing", None)
    value = declared() if callable(declared) else declared
    if value is not None and not isinstance(value, Preprocessing):
        msg = (
            f"preprocessing of the backbone {config.name} must be a "
            f"{Preprocessing.__module__}.Preprocessing or None, got {value!r:.60}"
        )
        raise ValueError(msg)
    return value


def of_packaged(weights: str) -> Preprocessing | None:
    """What the metadata of a weights file of the package say."""
    return _of_metadata(Path(str(files("training").joinpath("weights", weights))), {})


def of_timm(
    name: str, options: Mapping[str, Any], weights: str | None = None
) -> Preprocessing | None:
    """What a weights file says of its pixels, or else timm's ``pretrained_cfg``.

    Parameters
    ----------
    name
        Name of the model, with or without tag, or ``hf-hub:NAME`` or ``local-dir:FOLDER``.
    options
        Arguments of ``timm.create_model``: ``img_size`` and ``in_chans`` go first.
    weights
        File with the weights. The recipes of this package write into it how pixels are scaled.

    Returns
    -------
    Preprocessing or None
        None for a model of which timm knows nothing.
    """
    from training.backbones.build import timm_settings

    if weights is not None:
        stated = _of_metadata(Path(weights).expanduser(), options)
        if stated is not None:
            return stated
    settings, saved = timm_settings(name)
    if not settings.get("input_size") or not settings.get("mean"):
        return None
    options = {**saved, **{key: value for key, value in options.items() if value is not None}}
    channels, height, width = settings["input_size"]
    channels = int(options.get("in_chans", channels))
    return Preprocessing(
        image_size=_side(options.get("img_size") or (height, width), name),
        mean=_per_channel(settings["mean"], channels),
        std=_per_channel(settings["std"], channels),
        interpolation=settings.get("interpolation") or "bicubic",
        crop_pct=float(settings.get("crop_pct") or 0.875),
        crop_mode=settings.get("crop_mode") or "center",
        channels=channels,
    )


def of_hugging_face(name: str, image_size: int | None = None) -> Preprocessing | None:
    """What the image processor of a model of transformers says; None if it has none.

    Parameters
    ----------
    name
        ``hf:`` and a name on the hub or a folder, whose ``preprocessor_config.json`` is read.
    image_size
        Side of the images if it is not the model's.
    """
    from training.backbones.hugging_face import read_processor, read_settings

    settings = read_settings(name)
    given = read_processor(name)
    if given is None:
        return None
    channels = int(getattr(settings, "num_channels", None) or 3)
    # Pixels x in [0, 1] become scale x - offset, and are normalised after that. The scale of the
    # usual factor is 1 exactly, so that the usual numbers come out as they are written.
    factor = (given.get("rescale_factor") or 1 / 255) if given.get("do_rescale", True) else 1.0
    scale = 1.0 if factor == 1 / 255 else 255 * float(factor)
    offset = 1.0 if given.get("rescale_offset") else 0.0
    normalised = given.get("do_normalize", True)
    mean = _per_channel(given["image_mean"] if normalised else [0.0], channels)
    std = _per_channel(given["image_std"] if normalised else [1.0], channels)
    if given.get("include_top"):  # EfficientNet divides a second time
        twice = _per_channel(given["image_std"], channels)
        std = tuple(first * second for first, second in zip(std, twice, strict=True))
    side, crop_pct, crop_mode = _resize_and_crop(given, getattr(settings, "image_size", None), name)
    return Preprocessing(
        image_size=image_size or side,
        mean=tuple((offset + value) / scale for value in mean),
        std=tuple(value / scale for value in std),
        interpolation=_FILTERS.get(given.get("resample"), "bicubic"),
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        channels=channels,
    )


def _resize_and_crop(
    given: Mapping[str, Any], model_size: Any, name: str
) -> tuple[int, float, str]:
    """Side of the input, its share of the side after the resize, and how it is resized."""
    size = {k: v for k, v in (given.get("size") or {}).items() if v is not None}
    cut = {k: v for k, v in (given.get("crop_size") or {}).items() if v is not None}
    crop_pct = given.get("crop_pct")
    shorter = size.get("shortest_edge")
    if "height" in size:
        resized, mode = _side((size["height"], size["width"]), name), "squash"
    elif shorter is not None:
        resized, mode = int(shorter), "center"
    elif "longest_edge" in size:
        resized, mode = int(size["longest_edge"]), "border"
    else:
        resized, mode = _side(model_size or 224, name), "squash"
    if given.get("do_center_crop") and cut:
        side = _side((cut["height"], cut["width"]), name)
    else:
        side = resized
        if crop_pct and resized >= _UNCROPPED:  # the rule of ConvNeXt
            crop_pct, mode = None, "squash"
    if not given.get("do_resize", True):
        return side, 1.0, "center"
    return side, min(1.0, side / resized * (crop_pct or 1.0)), mode


def _of_metadata(path: Path, options: Mapping[str, Any]) -> Preprocessing | None:
    """What the recipes of this package write into a file: ``[0,1]`` or ``(x/255 - MEAN) / STD``.

    Given options of the model go before those that the file records.
    """
    metadata = _metadata(path)
    pixels = metadata.get("pixels", "")
    scaled = _PIXELS.fullmatch(pixels)
    if scaled is None and pixels != "[0,1]":
        return None
    with readable(path):
        options = {**json.loads(metadata.get("timm_options", "{}")), **options}
    if not options.get("img_size"):
        return None
    mean, std = (float(scaled[1]), float(scaled[2])) if scaled else (0.0, 1.0)
    channels = int(options.get("in_chans", 3))
    size = _side(options["img_size"], str(path))
    means, stds = (mean,) * channels, (std,) * channels
    return Preprocessing(size, means, stds, "bicubic", 1.0, "center", channels)


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file; empty for other, missing and damaged files."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):  # what is wrong is said when the file is loaded
        return {}


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One number a channel, as timm makes weights for other channels of those for three.

    For one channel the weights are added up, as if a grey image were repeated: the mean of the
    numbers fits. For others they are repeated in turn.
    """
    numbers = tuple(float(value) for value in values)
    if channels == len(numbers):
        return numbers
    if channels == 1:
        return (sum(numbers) / len(numbers),)
    return tuple(numbers[i % len(numbers)] for i in range(channels))


def _side(size: Any, name: str) -> int:
    sides = {int(x) for x in (size if isinstance(size, Sequence) else [size])}
    if len(sides) != 1:
        msg = (
            f"backbone {name} must take square images, got {' by '.join(map(str, size))} pixels; "
            "set backbone.options.img_size to one number, or choose another backbone.name"
        )
        raise ValueError(msg)
    return sides.pop()
