"""Weights from local files, read without running code from them: .safetensors, .pth, .npz."""

import argparse
import hashlib
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from loda_math.verify.archive import require_plausible_archive
from training.run_dir import file_sha256, not_finite
from training.spelling import some

# Keys under which checkpoints hold the network, averaged weights and teachers first.
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "teacher",
    "target_encoder",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "encoder",
    "backbone",
)
_NESTED = 3
# Parts that pretraining adds to a network and that play no role for its features.
_OF_PRETRAINING = re.compile(
    r"(mask_token|decoder\w*|\w+_head|classifier|projector|predictor|logit_scale|logit_bias)(\.|$)"
    r"|.*\b(relative_position_index|attn_mask)$"
)
# Words in a prefix by which the better of several copies is told: others are students.
_TEACHERS = ("teacher", "ema", "momentum", "target")
_PATCHES = "patch_embed.proj.weight"
# How transformers names the layers of the same architectures.
_OF_TRANSFORMERS = re.compile(r"(encoder\.)?layer\.\d+\.(attention|layernorm)")


class LoadedWeights(NamedTuple):
    """What was loaded.

    Parameters
    ----------
    sha256
        Hash of the file; None if there is none.
    notes
        What was left out of the file or resized, one sentence each.
    """

    sha256: str | None
    notes: tuple[str, ...] = ()


def tensors_sha256(module: nn.Module) -> str:
    """Hash the weights of a model: name, dtype, shape and bytes of each, sorted by name.

    It identifies the weights independently of the file or download that they came from.

    Examples
    --------
    >>> layer = nn.Linear(1, 1)
    >>> before = tensors_sha256(layer)
    >>> _ = nn.init.constant_(layer.bias, 3.0)
    >>> len(before), before == tensors_sha256(layer)
    (64, False)
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(module: nn.Module, path: Path) -> LoadedWeights:
    """Load a file that must hold the whole network.

    Names may have a common prefix, such as ``module.``, ``model.``, ``backbone.`` or ``encoder.``.
    timm converts the formats that it knows (DINOv2, MAE, CLIP and others), resamples position
    embeddings to the model's image size and adapts the first convolution to its channels. Heads,
    decoders and mask tokens are left out. A .npz file must hold original ViT (augreg) weights.

    Parameters
    ----------
    module
        The network, of timm or not.
    path
        A .safetensors, .npz, .pth or .bin file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it cannot be read, does not fit, or holds NaN or infinite values.
    """
    if not path.is_file():
        msg = f"backbone.weights: no file {path}."
        raise FileNotFoundError(msg)
    notes: tuple[str, ...] = ()
    if path.suffix == ".npz":
        _load_npz(module, path)
    else:
        notes = _load_tensors(module, _read(path), path)
    if infinite := not_finite(module.state_dict()):
        msg = f"the weights in {path} hold NaN or infinite values: {some(infinite)}."
        raise ValueError(msg)
    return LoadedWeights(file_sha256(path), notes)


def _load_tensors(module: nn.Module, content: Mapping[str, Tensor], path: Path) -> tuple[str, ...]:
    """Load named tensors as far as the network has them; returns what was left out or resized."""
    own = module.state_dict()
    prefix = _prefix(content, own, path)
    weights = {
        k.removeprefix(prefix): _single(v) for k, v in content.items() if k.startswith(prefix)
    }
    others = [key for key in content if not key.startswith(prefix)]
    extra = [key for key in weights if key not in own and _is_extra(module, key)]
    # timm would also resample patches, which is a mistake in the settings rather than a wish.
    fitted = _converted(module, weights, path) if _same_patches(own, weights) else weights
    fitted = {k: v for k, v in fitted.items() if k in own or not _is_extra(module, k)}
    notes = [left_out(path.name, others + extra)] if others or extra else []
    notes += [
        f"{key} of {path.name} was resized from {_shape(weights[key])} to {_shape(fitted[key])}"
        for key in own
        if key in fitted and key in weights and weights[key].shape != fitted[key].shape
    ]
    _require_fit(own, fitted, path)
    module.load_state_dict({**_counters(own), **fitted})
    return tuple(notes)


def _prefix(content: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> str:
    """The prefix under which a file holds the network, found by the names of its weights."""
    counts: Counter[str] = Counter()
    for key in content:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in own:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    # Half of the weights, so that one name that occurs elsewhere too decides nothing. The file may
    # be that of a smaller model, of which the message then lists what is missing.
    most = max(counts.values(), default=0)
    if 2 * most < min(len(own), len(content)):
        wrappers = [w for w in ("module.", "_orig_mod.") if all(k.startswith(w) for k in content)]
        return wrappers[0] if wrappers else ""
    best = sorted((prefix for prefix, count in counts.items() if count == most), key=len)
    if "" in best or len(best) == 1:
        return best[0]
    teachers = [prefix for prefix in best if any(word in prefix for word in _TEACHERS)]
    if len(teachers) == 1:
        return teachers[0]
    msg = (
        f"{path} must hold the network once, got it under the names {some(best)}: save the "
        "weights of one of them, best as .safetensors"
    )
    raise ValueError(msg)


def _single(value: Tensor) -> Tensor:
    """Weights in half precision as float32: not everything can be resized in half precision."""
    half = value.is_floating_point() and value.element_size() < 4
    return value.float() if half else value


def _converted(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Weights under timm's names and in the sizes of the model, as far as timm can convert them."""
    models = sys.modules[type(module).__module__]
    convert: Any = getattr(models, "checkpoint_filter_fn", None)
    converted: dict[str, Tensor] = dict(weights)
    settings: Mapping[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    try:
        if convert is not None and models.__name__.startswith("timm."):
            converted = dict(convert(converted, module))
        # timm hands in the name of one convolution, or of several.
        first = settings.get("first_conv") or ()
        for name in [first] if isinstance(first, str) else first:
            key, own = f"{name}.weight", module.get_parameter(f"{name}.weight")
            theirs = converted.get(key)
            if theirs is None or theirs.ndim != 4 or theirs.shape[2:] != own.shape[2:]:
                continue
            if theirs.shape[1] != own.shape[1]:
                converted[key] = adapt_input_conv(own.shape[1], theirs, base_chans=theirs.shape[1])
    except Exception as error:  # a foreign file may raise anything in timm's converters
        reason = " ".join(str(error).split()) or type(error).__name__
        msg = f"the weights in {path} cannot be fitted to the model by timm: {reason}"
        raise ValueError(msg) from error
    return converted


def _same_patches(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    ours, theirs = own.get(_PATCHES), weights.get(_PATCHES)
    if ours is None or theirs is None or ours.ndim != 4 or theirs.ndim != 4:
        return True
    return ours.shape[2:] == theirs.shape[2:]


def _is_extra(module: nn.Module, key: str) -> bool:
    return _is_classifier(module, key) or _OF_PRETRAINING.match(key) is not None


def _counters(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of batches that batch norms have seen: no weights, and absent from older files."""
    return {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}


def _require_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise one ValueError for all missing, unknown and misshapen weights."""
    shapes = [
        f"{key} is {_shape(weights[key])}, the model has {_shape(value)}"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    required = own.keys() - _counters(own).keys()
    misfits = {
        "missing": [key for key in own if key in required and key not in weights],
        "unexpected": [key for key in weights if key not in own],
        "of another shape": shapes,
    }
    if any(misfits.values()):
        lists = " ".join(f"{kind}: {some(names)}." for kind, names in misfits.items() if names)
        cure = (
            "Check backbone.name and backbone.options (img_size, patch_size, embed_dim, depth, "
            "in_chans) against what the file was trained with."
        )
        if any(_OF_TRANSFORMERS.search(key) for key in misfits["unexpected"]):
            cure = "The names are those of transformers: set backbone.name to hf:FOLDER for it."
        msg = f"the weights in {path} do not fit the model. {lists} {cure}"
        raise ValueError(msg)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            if zipfile.is_zipfile(path):  # but for files of old versions of torch
                require_plausible_archive(path)
            # DINO's and other files hold command-line settings beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file may raise anything
        reason = (str(error).splitlines() or [""])[0]
        # torch's message would advise running the code that the file contains.
        if path.suffix != ".safetensors" and not isinstance(error, OSError):
            reason = (
                "it holds more than tensors, or is damaged. Save only the model's state_dict(), "
                "best as .safetensors."
            )
        raise _unusable(path, reason) from error
    # Wrappers may be nested, but not without end. A flat file may have a tensor of such a name.
    for _ in range(_NESTED):
        entries = content if isinstance(content, Mapping) else {}
        inner = (entries.get(wrapper) for wrapper in _WRAPPERS)
        content = next((x for x in inner if isinstance(x, Mapping) and x), content)
    if not isinstance(content, Mapping) or not content:
        raise _unusable(path, "it holds no named tensors.")
    others = [str(key) for key, value in content.items() if not _is_plain(value)]
    if others:
        raise _unusable(path, f"entries that are no tensors of real numbers: {some(others)}.")
    return {str(key): value for key, value in content.items()}


def _is_plain(value: object) -> bool:
    # torch would drop part of a complex number; no layer has sparse or quantised weights. A small
    # storage may be viewed as a tensor that fills the memory once it is copied.
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_complex() or value.is_meta or value.is_quantized)
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _load_npz(module: nn.Module, path: Path) -> None:
    loader: Any = getattr(module, "load_pretrained", None)
    if loader is None:
        msg = f"timm cannot read .npz weights for this model: give {path} as .safetensors or .pth."
        raise ValueError(msg)
    try:
        require_plausible_archive(path)
        # Opened here: NumPy would leave a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            blocks = {m[1] for key in arrays.files if (m := re.search(r"encoderblock_(\d+)/", key))}
        own: Any = getattr(module, "blocks", ())
        if blocks and len(blocks) != len(own):  # timm would ignore additional blocks
            msg = f"it has {len(blocks)} blocks, the model {len(own)}"
            raise ValueError(msg)
        with path.open("rb") as file:  # timm would leave the file open
            loader(file)
    except Exception as error:  # a foreign file may raise anything in timm's loader
        reason = " ".join(str(error).split())
        msg = f"the weights in {path} are not those of the original ViT for this model: {reason}"
        raise ValueError(msg) from error


def _is_classifier(module: nn.Module, key: str) -> bool:
    settings: Mapping[str, Any] = getattr(module, "default_cfg", None) or {}
    named = settings.get("classifier") or ()
    prefixes = {"head", "head_dist", "fc", *([named] if isinstance(named, str) else named)}
    return any(key.startswith(f"{prefix}.") for prefix in prefixes)


def _unusable(path: Path, reason: str) -> ValueError:
    kinds = ".safetensors, .pth, .bin or .npz"
    return ValueError(f"backbone.weights: cannot read {path} as {kinds}: {reason}")


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a scalar"


def left_out(source: str, names: Sequence[str]) -> str:
    """A note on weights that a model does not have, those of one part together.

    Examples
    --------
    >>> left_out("w.pth", ["mask_token", "decoder.0.weight", "decoder.0.bias", "head.bias"])
    'left out of w.pth: mask_token, decoder (2 weights), head.bias'
    """
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.partition(".")[0], []).append(name)
    shown = [
        within[0] if len(within) == 1 else f"{part} ({len(within)} weights)"
        for part, within in parts.items()
    ]
    return f"left out of {source}: {some(shown)}"
