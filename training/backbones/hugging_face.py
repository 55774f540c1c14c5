"""Backbones of Hugging Face's transformers: ``hf:ORGANISATION/NAME`` or ``hf:FOLDER``."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.backbones.build import Backbone, one_line
from training.backbones.weights import left_out
from training.run_dir import not_finite
from training.spelling import some

_STEP = 32  # most models without patches halve an image five times


class Pooled(nn.Module):
    """A vision model of transformers that returns one feature vector an image.

    The vector is the model's own pooling (``pooler_output``: the class token after the last norm,
    the mean of the tokens or an attention, as the model was trained); in models without one, the
    class token, or else the mean over all positions.

    Parameters
    ----------
    model
        A ViTModel or SwinModel, say: images (N, C, H, W) to tokens (N, T, D) or maps (N, D, h, w).
    has_class_token
        Whether the first token is the class token.
    patch_size
        Side of a patch, for models that draw which patches they mask: they get the same draw each
        time, with nothing masked.
    resizes
        Whether the model is to interpolate its position embeddings.
    """

    def __init__(
        self, model: nn.Module, *, has_class_token: bool, patch_size: int, resizes: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.has_class_token, self.patch_size, self.resizes = has_class_token, patch_size, resizes
        self.masks = "noise" in inspect.signature(model.forward).parameters

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, D) of images (N, C, H, W)."""
        given: dict[str, Any] = {"interpolate_pos_encoding": True} if self.resizes else {}
        if self.masks:
            places = (images.shape[-2] // self.patch_size) * (images.shape[-1] // self.patch_size)
            # Patches are kept in the order of their noise: this is the order that they have.
            noise = torch.arange(places, device=images.device, dtype=torch.float32)
            given["noise"] = noise.expand(len(images), -1)
        output = self.model(images, **given)
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        tokens: Tensor = output.last_hidden_state
        if tokens.ndim > 3:
            return tokens.mean(dim=tuple(range(2, tokens.ndim)))
        return tokens[:, 0] if self.has_class_token else tokens.mean(dim=1)


def build_hugging_face(name: str, *, pretrained: bool, image_size: int | None = None) -> Backbone:
    """Build a vision model of transformers by ``AutoModel``.

    Code that comes with a model is never run. Of a model of images and text, only the part for
    images is built. Masking, as in the pretraining of ViT-MAE, is turned off.

    Parameters
    ----------
    name
        ``hf:`` and the name of a model on the Hugging Face hub, or of a folder that
        ``save_pretrained`` wrote.
    pretrained
        Whether to load the pretrained weights; otherwise they are random.
    image_size
        Side of the images if it is not the model's: its position embeddings are interpolated.

    Raises
    ------
    ValueError
        If transformers is not installed, the model takes no images or none of this size, or weights
        are missing.
    ConnectionError
        If the model is not a folder and cannot be downloaded.
    """
    settings = read_settings(name)
    channels = getattr(settings, "num_channels", None)
    if channels is None:
        msg = f"backbone.name {name}: a {settings.model_type} model does not take only images"
        raise ValueError(msg)
    if hasattr(settings, "mask_ratio"):
        settings.mask_ratio = 0.0
    model, report = _build(name, settings, pretrained=pretrained)
    pooler = getattr(model, "pooler", None)
    if hasattr(pooler, "dense") and hasattr(pooler, "activation"):
        model.pooler = None  # a layer after the class token, which is the feature here
    own = set(model.state_dict())
    missing = sorted(key for key in report.get("missing_keys", ()) if key in own)
    if missing:
        msg = f"backbone.name {name}: its files lack the weights {some(missing)}"
        raise ValueError(msg)
    unused = sorted(report.get("unexpected_keys", ()))
    notes = (left_out(name, unused),) if unused else ()
    if pretrained and not_finite(model.state_dict()):
        msg = f"backbone.name {name}: its files hold NaN or infinite values"
        raise ValueError(msg)

    side, patch = (_number(getattr(settings, key, None)) for key in ("image_size", "patch_size"))
    interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    # A model without the argument takes any size, or says below that it does not.
    resizes = interpolates and image_size is not None and image_size != side
    classes = ("cls_token", "class_embedding", "class_token")
    module = Pooled(
        model,
        has_class_token=any(key.rpartition(".")[2] in classes for key in own),
        patch_size=patch or 1,
        resizes=resizes,
    )
    wanted = image_size or side or 224
    features = _features(module, channels, wanted)
    if isinstance(features, Exception):
        msg = (
            f"backbone.name {name}: it must take images of {wanted} by {wanted} pixels and return "
            f"features, got an error: {one_line(features)}"
        )
        raise ValueError(msg) from features  # noqa: TRY004 - an error that was caught
    # Not a smaller size, of one patch perhaps, whose one token would be broadcast.
    larger = wanted + (patch or _STEP)
    is_fixed = resizes or isinstance(_features(module, channels, larger), Exception)
    given = name.partition(":")[2]
    commit = getattr(settings, "_commit_hash", None) if pretrained else None
    return Backbone(
        module,
        features,
        name,
        {} if image_size is None else {"image_size": image_size},
        None,
        int(channels),
        wanted if is_fixed else None,
        tag=f"{given} at {commit}" if commit else None,
        size_option="backbone.image_size" if interpolates else "",
        notes=notes,
    )


def _build(name: str, settings: Any, *, pretrained: bool) -> tuple[Any, dict[str, Any]]:
    """The model in float32, and what transformers reports of its weights."""
    from transformers import AutoModel

    auto: Any = AutoModel
    try:
        # trust_remote_code is said in every call: without it the library asks on standard input.
        if not pretrained:
            # As the pretrained one below: the dtype of the settings may be half precision.
            whole = {"dtype": torch.float32, "trust_remote_code": False}
            return auto.from_config(settings, **whole), {}
        with silence():
            model, report = auto.from_pretrained(
                _place(name),
                config=settings,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except Exception as error:  # each model and each file format raises its own errors
        raise _unusable(name, error) from error
    return model, report


@contextmanager
def silence() -> Iterator[None]:
    """Keep transformers from printing bars and tables of what it loads and saves."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


def _features(module: nn.Module, channels: int, side: int) -> int | Exception:
    """Number of features for images of a size, or the error that the model raises."""
    try:
        with torch.no_grad():
            output: Tensor = module.eval()(torch.zeros(1, channels, side, side))
    except Exception as error:  # noqa: BLE001 - each model raises its own errors
        return error
    return output.shape[1]


def _number(size: Any) -> int | None:
    """A side that may be given twice, for both axes."""
    return None if size is None else int(size if isinstance(size, int) else size[0])


def read_settings(name: str) -> Any:
    """The ``config.json`` of a model as transformers reads it; no weights are read.

    Of a model of images and text, such as CLIP, only the settings of the part for images.

    Raises
    ------
    ValueError, ConnectionError
        As `build_hugging_face` does.
    """
    if find_spec("transformers") is None:
        msg = f"backbone.name {name} is built by transformers: pip install 'loda[hf]'"
        raise ValueError(msg)
    from transformers import AutoConfig

    try:
        # trust_remote_code is said in every call: without it the library asks on standard input.
        settings: Any = AutoConfig.from_pretrained(_place(name), trust_remote_code=False)
    except Exception as error:  # each model and each file format raises its own errors
        raise _unusable(name, error) from error
    return getattr(settings, "vision_config", settings)


def read_processor(name: str) -> dict[str, Any] | None:
    """The settings of the image processor of a model, defaults included; None if it has none."""
    from transformers import AutoImageProcessor
    from transformers.utils.hub import cached_file

    place = _place(name)
    names = ("preprocessor_config.json", "processor_config.json")
    lenient = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    if not any(cached_file(place, file, **lenient) for file in names):
        return None
    try:
        processors: Any = AutoImageProcessor
        processor = processors.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # a damaged or foreign file may raise anything
        raise _unusable(name, error) from error
    settings: dict[str, Any] = processor.to_dict()
    return settings


def _place(name: str) -> str:
    # Expand ~ here: the library takes the name of a folder literally.
    given = name.partition(":")[2]
    folder = Path(given).expanduser()
    return str(folder) if folder.is_dir() else given


def _unusable(name: str, error: Exception) -> Exception:
    if isinstance(error, OSError):
        msg = (
            f"backbone.name {name}: there is no such folder with a config.json and weights, and it "
            f"could not be downloaded: {one_line(error)}"
        )
        return ConnectionError(msg)
    return ValueError(f"backbone.name {name}: transformers cannot build it: {one_line(error)}")
