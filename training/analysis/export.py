"""A finished run in other libraries' forms: timm, transformers, ONNX, and adapters of PEFT."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from backends.torch.peft import new_folder, save_adapter, update_record
from backends.torch.readouts import CosineClassifier, RidgeClassifier
from training.analysis.predict import Classifier, load
from training.backbones import build_backbone
from training.backbones.build import timm_settings
from training.backbones.config import HUGGING_FACE
from training.backbones.hugging_face import silence
from training.backbones.preprocessing import Preprocessing
from training.run_dir import (
    ENVIRONMENT,
    read_json,
    readable,
    require_intact,
    require_new,
    storable,
    sync,
    write_atomically,
    write_json,
)
from training.seeds import derive, seeded

Format = Literal["timm", "hf", "onnx", "peft"]
FORMATS: tuple[Format, ...] = get_args(Format)

CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_WRITTEN = {CONFIG, WEIGHTS, PROCESSOR, *_ADAPTER}  # an export may replace a folder of these

_NEEDS: Mapping[Format, tuple[str, ...]] = {
    "timm": (),
    "hf": ("transformers",),
    "onnx": ("onnx", "onnxscript"),
    "peft": (),
}
CHECKED_BY: Mapping[Format, str] = {
    "timm": "timm",
    "hf": "transformers",
    "onnx": "onnxruntime",
    "peft": "peft",
}
_TOLERANCE = 1e-3  # of the largest feature or score: other kernels round otherwise
_TINY = 1e-30
_ONE_FILE = 2_000_000_000  # bytes: protobuf takes no more
_PROBES = 3
_TALKATIVE = ("timm", "torch.onnx", "onnxscript", "onnx_ir", "transformers")


class Export(NamedTuple):
    """What was written.

    Attributes
    ----------
    path : Path
        The folder, or of ONNX the file.
    notes : list of str
        What to know to use it, one sentence each.
    difference : float or None
        Largest difference of features (for ONNX, of scores and of probabilities) between the run
        and what the other library loaded, on random images, as a fraction of the largest value;
        None if that library is not installed.
    """

    path: Path
    notes: list[str]
    difference: float | None


def export(
    run: str | Path,
    out: str | Path,
    form: Format,
    *,
    readout: str | None = None,
    overwrite: bool = False,
    allow: Sequence[str] = (),
) -> Export:
    """Write a finished run in another library's form, load it there and compare.

    Parameters
    ----------
    run : str or Path
        A run folder.
    out : str or Path
        A new or empty folder; for ONNX a new file FILE.onnx. It appears when it is complete and
        gives the results of the run.
    form : str
        What to write:

        - ``timm``: the backbone, for ``timm.create_model("local-dir:OUT", pretrained=True)``.
        - ``hf``: the backbone, for ``transformers.AutoModel.from_pretrained('OUT')``.
        - ``onnx``: the whole classifier, from pixels in [0, 1] to scores and probabilities.
        - ``peft``: what the run added to the pretrained backbone, as an adapter for
          ``peft.PeftModel.from_pretrained(BACKBONE, OUT)``.
    readout : str, optional
        For ONNX, the read-out; the primary one by default.
    overwrite : bool
        Replace an earlier export.
    allow : sequence of str
        As in :func:`training.load`.

    Returns
    -------
    Export

    Raises
    ------
    ValueError
        If the form cannot hold this run, or what was written gives other results when it is loaded.
    ModuleNotFoundError
        If a library that writes the form is not installed.
    FileNotFoundError
        If the folder holds no finished run.
    FileExistsError
        If ``out`` holds something that may not be replaced.
    OSError
        If it cannot be written; what was there is as it was before.

    See Also
    --------
    training.load : the run in Python, with nothing exported.
    """
    if form not in FORMATS:
        msg = f"format must be one of {', '.join(FORMATS)}, got {form!r}"
        raise ValueError(msg)
    if readout is not None and form != "onnx":
        msg = f"a read-out is part of onnx only, got {readout!r} for {form}; leave it out"
        raise ValueError(msg)
    missing = [name for name in _NEEDS[form] if find_spec(name) is None]
    if missing:
        msg = f"format {form} needs {' and '.join(missing)}: pip install 'loda[export]'"
        raise ModuleNotFoundError(msg)
    place = Path(out)
    (_require_file if form == "onnx" else _require_folder)(place, overwrite=overwrite)
    classifier = load(run, allow=allow)
    classifier.model.eval()
    if form == "onnx":
        return _to_onnx(classifier, place, readout)
    writers: dict[str, Callable[[Classifier, Path], tuple[list[str], Tensor | None]]] = {
        "timm": _to_timm,
        "hf": _to_transformers,
        "peft": partial(_to_peft, Path(run)),
    }
    with new_folder(place) as inner:
        with _quiet(form):
            notes, features = writers[form](classifier, inner)
        difference = None
        if features is not None:
            difference = _compared(form, classifier.model(_probes(classifier)), features)
        # Some writers create files that only their owner may read; use those of a new file.
        model = inner.with_name("mode")
        model.touch()
        for path in inner.iterdir():
            path.chmod(model.stat().st_mode)
    sync(place.parent)
    return Export(place, [note.replace("OUT", str(place)) for note in notes], difference)


def preprocessing(classifier: Classifier) -> Preprocessing:
    """What a run does to a decoded image before its backbone sees it, in evaluation."""
    data, channels = classifier.experiment.data, classifier.backbone.channels
    images = data.images
    resized = data.test_resize or images.resize or data.side or images.image_size

    def numbers(value: float | Sequence[float]) -> tuple[float, ...]:
        return tuple(value) if isinstance(value, Sequence) else (float(value),) * channels

    return Preprocessing(
        images.image_size,
        numbers(images.mean),
        numbers(images.std),
        images.interpolation,
        images.image_size / resized,
        images.crop_mode if images.resize else "center",
        channels,
    )


# --- timm -----------------------------------------------------------------------------------------


def _to_timm(classifier: Classifier, folder: Path) -> tuple[list[str], Tensor | None]:
    """Write what timm's save_for_hf writes, with the run's own preprocessing."""
    config = _timm_config(classifier, "timm")
    write_json(folder / CONFIG, config)
    save_file(storable(classifier.model.state_dict()), folder / WEIGHTS, metadata={"format": "pt"})
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    notes = [
        "timm.create_model('local-dir:OUT', pretrained=True) gives the backbone, which maps images "
        "to features."
    ]
    return [*notes, *_registration(config)], _features(again, _probes(classifier))


def _timm_config(classifier: Classifier, form: str) -> dict[str, Any]:
    """The ``config.json`` of a timm model: architecture, arguments and preprocessing."""
    backbone = classifier.backbone
    settings = dict(getattr(classifier.model, "pretrained_cfg", None) or {})
    architecture = settings.get("architecture") or backbone.timm_name.partition(".")[0]
    if backbone.timm_name.startswith(HUGGING_FACE) or not timm.is_model(architecture):
        msg = (
            f"format {form} holds backbones of timm{' and transformers' if form == 'hf' else ''}, "
            f"got {backbone.name}; choose another format"
        )
        raise ValueError(msg)
    _, saved = timm_settings(backbone.timm_name)
    prepared = preprocessing(classifier)
    kept = ("fixed_input_size", "first_conv", "classifier", "pool_size", "license")
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": backbone.features,
        "model_args": {**saved, **backbone.timm_options},
        "pretrained_cfg": {
            **{key: settings[key] for key in kept if key in settings},
            "input_size": [prepared.channels, prepared.image_size, prepared.image_size],
            "mean": prepared.mean,
            "std": prepared.std,
            "interpolation": prepared.interpolation,
            "crop_pct": prepared.crop_pct,
            "crop_mode": prepared.crop_mode,
            "num_classes": 0,
            "custom_load": False,
        },
    }


def _registration(config: Mapping[str, Any]) -> list[str]:
    """What has to be imported for a model that this package registers in timm."""
    if config["architecture"].startswith("loda_"):
        return ["The model is one of this package: import training.backbones.conv_vit first."]
    return []


# --- transformers ---------------------------------------------------------------------------------


def _to_transformers(classifier: Classifier, folder: Path) -> tuple[list[str], Tensor | None]:
    """Write a model of transformers, or one of timm in transformers' wrapper for these."""
    from transformers import AutoModel

    own = classifier.backbone.timm_name.startswith(HUGGING_FACE)
    if own:
        wrapper = copy(classifier.model)
        model: Any = classifier.model.model
        model.save_pretrained(folder)
        prepared = preprocessing(classifier)
        if prepared.crop_mode != "border":  # which image processors do not know
            write_json(folder / PROCESSOR, _processor(prepared))
        # Without its pooler if the run has none: transformers would make one of random weights.
        extra = {"add_pooling_layer": False} if getattr(model, "pooler", 0) is None else {}
        wrapper._modules = {**wrapper._modules}
        wrapper.model = AutoModel.from_pretrained(folder, **extra).eval()
        options = "".join(f", {key}={value}" for key, value in extra.items())
        notes = [
            f"transformers.AutoModel.from_pretrained('OUT'{options}) gives the backbone; the "
            f"features are {_place_of_features(wrapper, _probes(classifier))}."
        ]
        return notes, _features(wrapper, _probes(classifier))
    from transformers import TimmWrapperConfig, TimmWrapperModel

    config = _timm_config(classifier, "hf")
    kept = {key: config[key] for key in ("architecture", "model_args", "pretrained_cfg")}
    make: Any = TimmWrapperConfig  # whose checked fields leave out those of all configurations
    wrapped = TimmWrapperModel(make(**kept, do_pooling=True, num_labels=0))
    wrapped.timm_model.load_state_dict(classifier.model.state_dict())
    wrapped.save_pretrained(folder)
    again = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        features = again(_probes(classifier)).pooler_output
    notes = [
        "transformers.AutoModel.from_pretrained('OUT') gives the backbone, by timm; the features "
        "are pooler_output."
    ]
    return [*notes, *_registration(config)], features


@torch.no_grad()
def _place_of_features(wrapper: Any, images: Tensor) -> str:
    """Where a model of transformers gives what `Pooled` takes for the features."""
    given = {"interpolate_pos_encoding": True} if wrapper.resizes else {}
    output = wrapper.model(images, **given)
    if getattr(output, "pooler_output", None) is not None:
        return "pooler_output"
    if output.last_hidden_state.ndim > 3:
        return "last_hidden_state, averaged over rows and columns"
    return "last_hidden_state[:, 0]" if wrapper.has_class_token else "last_hidden_state.mean(dim=1)"


def _processor(prepared: Preprocessing) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of an image processor that does what the run does."""
    size = round(prepared.image_size / prepared.crop_pct)
    squash = prepared.crop_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": prepared.channels == 3,
        "do_resize": True,
        "size": {"height": size, "width": size} if squash else {"shortest_edge": size},
        "resample": Image.Resampling[prepared.interpolation.upper()].value,
        "do_center_crop": True,
        "crop_size": {"height": prepared.image_size, "width": prepared.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": prepared.mean,
        "image_std": prepared.std,
    }


# --- ONNX -----------------------------------------------------------------------------------------


class _Cosines(nn.Module):
    """Cosines to one direction a class, as `CosineClassifier.logits`."""

    def __init__(self, classifier: CosineClassifier) -> None:
        super().__init__()
        weight = functional.normalize(classifier.weight, dim=1, eps=1e-6)
        self.register_buffer("weight", weight)

    def forward(self, features: Tensor) -> Tensor:
        unit = functional.normalize(features, dim=1, eps=1e-6)
        return functional.linear(unit, self.get_buffer("weight")).clamp(-1.0, 1.0)


class _Ridge(nn.Module):
    """Linear scores of random features, as `RidgeClassifier.logits`."""

    def __init__(self, classifier: RidgeClassifier) -> None:
        super().__init__()
        self.register_buffer("projection", classifier.projection)
        self.register_buffer("weight", classifier.weight)

    def forward(self, features: Tensor) -> Tensor:
        weight = self.get_buffer("weight")
        hidden = torch.relu(features @ self.get_buffer("projection").to(features.dtype))
        return (hidden.to(weight.dtype) @ weight).float()


class _Whole(nn.Module):
    """From pixels in [0, 1] to scores, and to probabilities where the read-out has them."""

    def __init__(self, classifier: Classifier, readout: str) -> None:
        super().__init__()
        prepared = preprocessing(classifier)
        for name, values in (("mean", prepared.mean), ("std", prepared.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None])
        self.backbone = classifier.model
        fitted = classifier.readouts[readout]
        if isinstance(fitted, CosineClassifier):
            self.readout: nn.Module = _Cosines(fitted)
        elif isinstance(fitted, RidgeClassifier):
            self.readout = _Ridge(fitted)
        else:
            msg = (
                f"ONNX holds read-outs by cosines and by ridge regression, got {readout}; choose "
                f"another --readout"
            )
            raise ValueError(msg)  # noqa: TRY004 - the run is at fault, not the caller
        self.temperature = classifier.temperatures.get(readout)

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        normalised = (pixels - self.get_buffer("mean")) / self.get_buffer("std")
        scores: Tensor = self.readout(self.backbone(normalised).float())
        if self.temperature is None:
            return scores
        return scores, (scores / self.temperature).softmax(dim=1)


def _to_onnx(classifier: Classifier, path: Path, readout: str | None) -> Export:
    """Write the whole classifier as one ONNX file."""
    name = classifier.chosen(readout)
    whole = _Whole(classifier, name).eval()
    size = sum(x.numel() * x.element_size() for x in whole.state_dict().values())
    if size > _ONE_FILE:
        msg = f"an ONNX file must be smaller than 2 GB, got {size / 1e9:.1f} GB of weights"
        raise ValueError(msg)
    probes = _pixels(classifier)
    outputs = ["scores"] if whole.temperature is None else ["scores", "probabilities"]
    with _quiet("onnx"), torch.no_grad():
        try:
            program = torch.onnx.export(
                whole,
                (probes,),
                dynamo=True,
                verbose=False,
                input_names=["pixels"],
                output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            )
        except Exception as error:  # torch has several, and of operators that ONNX lacks others
            msg = (
                f"torch cannot export {classifier.backbone.name} to ONNX: "
                f"{' '.join(str(error).split())[:300]}"
            )
            raise ValueError(msg) from error
        assert program is not None  # noqa: S101 - it is where dynamo=True
        program.model.metadata_props.update(_onnx_record(classifier, name, whole.temperature))
        expected = whole(probes)
        expected = expected if isinstance(expected, tuple) else (expected,)
        difference: float | None = None

        def write(temporary: Path) -> None:
            nonlocal difference
            program.save(temporary, external_data=False)
            if find_spec("onnxruntime") is None:
                return
            from onnxruntime import InferenceSession

            session = InferenceSession(temporary.read_bytes(), providers=["CPUExecutionProvider"])
            actual = session.run(None, {"pixels": probes.numpy()})
            difference = max(
                _compared("onnx", one, torch.from_numpy(other))
                for one, other in zip(expected, actual, strict=True)
            )

        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)
    prepared = preprocessing(classifier)
    notes = [
        f"Input: pixels, float32 in [0, 1], of shape (batch, {prepared.channels}, "
        f"{prepared.image_size}, {prepared.image_size}), resized and cropped as its metadata say; "
        "normalisation is part of the graph.",
        f"Output: {' and '.join(outputs)} of the read-out {name}, of shape (batch, "
        f"{len(classifier.classes)}); the names of the classes are in the metadata.",
    ]
    return Export(path, notes, difference)


def _onnx_record(classifier: Classifier, readout: str, temperature: float | None) -> dict[str, str]:
    """Metadata of the ONNX file: names of the classes, and how to prepare an image."""
    prepared = preprocessing(classifier)
    return {
        "classes": json.dumps(classifier.classes, ensure_ascii=False),
        "readout": readout,
        "temperature": "" if temperature is None else repr(temperature),
        "preprocessing": json.dumps(vars(prepared)),
    }


# --- PEFT -----------------------------------------------------------------------------------------


def _to_peft(run: Path, classifier: Classifier, folder: Path) -> tuple[list[str], Tensor | None]:
    """Write what a run added to the weights of the pretrained backbone as one LoRA."""
    experiment = classifier.experiment
    require_intact(run, ENVIRONMENT)
    with seeded(derive(experiment.seed, 0, "backbone")):  # as the run drew what is random in it
        base = build_backbone(experiment.backbone)
    with readable(run / ENVIRONMENT):
        recorded = read_json(run / ENVIRONMENT)["backbone"]["tensors_sha256"]
    if base.tensors_sha256 != recorded:
        msg = (
            f"the pretrained weights of {base.name} are not those that the run began with; an "
            "adapter belongs to exactly these: put them back"
        )
        raise ValueError(msg)
    own = base.timm_name.startswith(HUGGING_FACE)
    before: Any = base.module.model if own else base.module
    after: Any = classifier.model.model if own else classifier.model
    record = update_record(before, after)
    given = base.timm_name.removeprefix(HUGGING_FACE)
    save_adapter(folder, before, record, base_model=given)
    ranks = [len(down) for downs in record.downs.values() for down in downs.values()]
    notes = [
        f"peft.PeftModel.from_pretrained(BACKBONE, 'OUT') adds it to the backbone {base.name} as "
        f"it was before the first task: {len(ranks)} layers, ranks {min(ranks)} to {max(ranks)}.",
    ]
    if find_spec("peft") is None:
        return notes, None
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(before, folder)
    if own:
        base.module.model = adapted
        return notes, _features(base.module.eval(), _probes(classifier))
    return notes, _features(adapted.eval(), _probes(classifier))


# --- places and comparisons -----------------------------------------------------------------------


def _require_file(path: Path, *, overwrite: bool) -> None:
    if path.suffix.lower() != ".onnx":
        msg = f"--out of format onnx must be a file FILE.onnx, got {path}"
        raise ValueError(msg)
    require_new(path, overwrite=overwrite)


def _require_folder(path: Path, *, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        msg = f"{path} is a file: choose another --out"
        raise FileExistsError(msg)
    names = {entry.name for entry in path.iterdir()}
    others = sorted(names - _WRITTEN)
    if others:
        msg = f"{path} holds other files ({', '.join(others[:4])}): choose another --out"
        raise FileExistsError(msg)
    if names and not overwrite:
        msg = f"{path} holds an export already: choose another --out, or add --overwrite"
        raise FileExistsError(msg)


def _pixels(classifier: Classifier) -> Tensor:
    """Random pixels in [0, 1], the same ones every time, of shape (3, C, S, S)."""
    prepared = preprocessing(classifier)
    shape = (_PROBES, prepared.channels, prepared.image_size, prepared.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _probes(classifier: Classifier) -> Tensor:
    """The random pixels, normalised."""
    prepared = preprocessing(classifier)
    mean, std = (torch.tensor(x)[:, None, None] for x in (prepared.mean, prepared.std))
    return (_pixels(classifier) - mean) / std


@torch.no_grad()
def _features(model: nn.Module, images: Tensor) -> Tensor:
    features: Tensor = model(images)
    return features


def _compared(form: Format, expected: Tensor, actual: Tensor) -> float:
    """Largest difference over the largest value; refused if kernels would not explain it.

    Raises
    ------
    ValueError
        If the results differ.
    """
    if expected.shape == actual.shape:
        largest = float(expected.detach().abs().max())
        difference = float((expected.detach() - actual.detach()).abs().max()) / max(largest, _TINY)
        if difference <= _TOLERANCE:
            return difference
        how = f"by up to {difference:.2g} of the largest value"
    else:
        how = f"in shape, {tuple(actual.shape)} for {tuple(expected.shape)}"
    msg = (
        f"format {form} cannot hold this run: loaded by {CHECKED_BY[form]}, its results differ "
        f"{how}; nothing was written"
    )
    raise ValueError(msg)


@contextmanager
def _quiet(form: Format) -> Iterator[None]:
    """Keep the other libraries' logs and warnings of their own internals from the terminal."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with silence() if form == "hf" else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
