"""Backbones of Hugging Face's transformers: ``hf:ORGANISATION/NAME`` or ``hf:FOLDER``."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from training.backbones.build import Backbone, one_line


class ClassToken(nn.Module):
    """A vision model that returns its class token, the first of the last hidden state.

    Parameters
    ----------
    model
        A ViTModel, say: images (N, C, H, W) to an output with ``last_hidden_state`` (N, T, D).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, D) of images (N, C, H, W)."""
        tokens: Tensor = self.model(images).last_hidden_state
        return tokens[:, 0]


def build_hugging_face(name: str, *, pretrained: bool) -> Backbone:
    """Build a vision transformer of transformers by ``AutoModel``, without its pooler.

    Code that comes with a model is never run.

    Parameters
    ----------
    name
        ``hf:`` and the name of a model on the Hugging Face hub, or of a folder that
        ``save_pretrained`` wrote.
    pretrained
        Whether to load the pretrained weights; otherwise they are random.

    Raises
    ------
    ValueError
        If transformers is not installed, the model takes no images, or weights are missing.
    ConnectionError
        If the model is not a folder and cannot be downloaded.
    """
    settings = read_settings(name)
    from transformers import AutoModel

    place = _place(name)
    given = name.partition(":")[2]
    try:
        missing: list[str] = []
        if pretrained:
            model, report = AutoModel.from_pretrained(
                place, output_loading_info=True, trust_remote_code=False
            )
            missing = [name for name in report["missing_keys"] if not name.startswith("pooler.")]
        else:
            unloaded: Any = AutoModel
            model = unloaded.from_config(settings, trust_remote_code=False)
    except Exception as error:  # each model and each file format raises its own errors
        raise _unusable(name, error) from error
    if missing:
        msg = f"backbone.name {name}: its files lack the weights {', '.join(missing[:8])}"
        raise ValueError(msg)
    channels, features = (getattr(settings, key, None) for key in ("num_channels", "hidden_size"))
    if channels is None or features is None:
        msg = f"backbone.name {name}: a {settings.model_type} model does not take only images"
        raise ValueError(msg)
    if hasattr(model, "pooler"):
        model.pooler = None  # a layer after the class token, which is the feature here
    size = settings.image_size
    side = int(size if isinstance(size, int) else size[0])
    commit = getattr(settings, "_commit_hash", None) if pretrained else None
    tag = f"{given} at {commit}" if commit else None
    return Backbone(ClassToken(model), int(features), name, {}, None, int(channels), side, tag=tag)


def read_settings(name: str) -> Any:
    """The ``config.json`` of a model as transformers reads it; no weights are read.

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
        return AutoConfig.from_pretrained(_place(name), trust_remote_code=False)
    except Exception as error:  # each model and each file format raises its own errors
        raise _unusable(name, error) from error


def read_processor(name: str) -> dict[str, Any] | None:
    """The settings of the image processor of a model, defaults included; None if it has none."""
    from transformers import AutoImageProcessor
    from transformers.utils import cached_file

    place = _place(name)
    names = ("preprocessor_config.json", "processor_config.json")
    lenient = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    if not any(cached_file(place, file, **lenient) for file in names):
        return None
    try:
        processor: Any = AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
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
