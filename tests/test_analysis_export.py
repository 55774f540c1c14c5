"""Runs in other libraries' forms: loaded there, they give the same features and scores."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from run_contents import resealed
from safetensors.torch import load_file
from small_runs import PIXELS, READOUTS, finished, tiny, tree
from timm.data import resolve_data_config
from torch import Tensor, nn

from training.analysis.export import export, preprocessing
from training.analysis.predict import load
from training.backbones import BackboneConfig, build_backbone
from training.cli import main
from training.config import experiment_of
from training.data.image_files import decode
from training.run_dir import read_json
from training.seeds import derive, seeded
from training.train import train

NORMALISED = {"mean": 0.4, "std": 0.3}


@pytest.fixture(scope="session")
def normalised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pixels are normalised, and whose update is not small."""
    return finished(tmp_path_factory, data=NORMALISED, train={"lr": 0.05})


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def features(run: Path, images: Tensor) -> Tensor:
    model = load(run).model.eval()
    with torch.no_grad():
        result: Tensor = model(images)
    return result


# timm


def test_timm_loads_the_backbone_bit_for_bit(
    normalised: Path, images: Tensor, tmp_path: Path
) -> None:
    written = export(normalised, tmp_path / "timm", "timm")
    assert written.difference == 0
    model = timm.create_model(f"local-dir:{written.path}", pretrained=True).eval()
    torch.testing.assert_close(model(images), features(normalised, images), rtol=0, atol=0)
    assert {p.stat().st_mode & 0o777 for p in written.path.iterdir()} == {_usual_mode(tmp_path)}


def _usual_mode(folder: Path) -> int:
    (folder / "usual").touch()
    return (folder / "usual").stat().st_mode & 0o777


def test_timm_is_told_how_to_prepare_images(normalised: Path, tmp_path: Path) -> None:
    export(normalised, tmp_path / "timm", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    config = resolve_data_config(model.pretrained_cfg)
    assert config["input_size"] == (3, 16, 16)
    assert tuple(config["mean"]) == (0.4, 0.4, 0.4)
    assert tuple(config["std"]) == (0.3, 0.3, 0.3)
    assert config["crop_pct"] == 1


def test_an_export_is_a_backbone_of_the_next_run(normalised: Path, tmp_path: Path) -> None:
    export(normalised, tmp_path / "timm", "timm")
    again = build_backbone(BackboneConfig(f"local-dir:{tmp_path / 'timm'}"))
    expected = load(normalised).model.state_dict()
    for name, tensor in again.module.state_dict().items():
        assert torch.equal(tensor, expected[name])


# transformers


def test_transformers_loads_a_backbone_of_timm(
    normalised: Path, images: Tensor, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    written = export(normalised, tmp_path / "hf", "hf")
    assert written.difference == 0
    model = transformers.AutoModel.from_pretrained(written.path).eval()
    with torch.no_grad():
        actual = model(images).pooler_output
    torch.testing.assert_close(actual, features(normalised, images), rtol=0, atol=0)
    processor = transformers.AutoImageProcessor.from_pretrained(written.path)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    prepared = processor(pixels, return_tensors="pt")["pixel_values"]
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.4) / 0.3
    torch.testing.assert_close(prepared[0], expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, when PEFT asks it
def test_transformers_loads_a_backbone_of_its_own(
    images: Tensor, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=32, image_size=16, patch_size=8)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    run = train(
        tiny(
            tree(tmp_path_factory),
            tmp_path / "run",
            data=NORMALISED,
            backbone={"name": f"hf:{tmp_path / 'vit'}", "pretrained": True},
            method={"target": "*.attention.[qkv]_proj"},
            train={"lr": 0.05},
        ),
        quiet=True,
    )
    written = export(run, tmp_path / "hf", "hf")
    assert written.difference == 0
    assert "add_pooling_layer=False" in written.notes[0]
    model = transformers.AutoModel.from_pretrained(written.path, add_pooling_layer=False).eval()
    with torch.no_grad():
        actual = model(images).last_hidden_state[:, 0]
    torch.testing.assert_close(actual, features(run, images), rtol=0, atol=0)
    processor = transformers.AutoImageProcessor.from_pretrained(written.path)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    prepared = processor(pixels, return_tensors="pt")["pixel_values"]
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.4) / 0.3
    torch.testing.assert_close(prepared[0], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="timm"):
        export(run, tmp_path / "timm", "timm")

    peft = pytest.importorskip("peft")
    export(run, tmp_path / "adapter", "peft")
    base = transformers.AutoModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(images).last_hidden_state[:, 0], features(run, images), rtol=0, atol=1e-5
        )


# ONNX


def session(path: Path) -> Any:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime").InferenceSession(path)


@pytest.mark.slow
@pytest.mark.parametrize("readout", READOUTS)
def test_onnx_holds_the_whole_classifier(
    normalised: Path, images: Tensor, tmp_path: Path, readout: str
) -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    # On so few images the terms of the ridge's sums are far larger than the sums.
    tolerance = 1e-3 if readout == "ridge" else 1e-5
    written = export(normalised, tmp_path / "m.onnx", "onnx", readout=readout)
    assert written.difference is not None
    assert written.difference < tolerance
    classifier = load(normalised)
    opened = session(written.path)
    for count in (1, 5):  # any number of images
        scores, *shares = opened.run(None, {"pixels": images[:count].numpy()})
        expected = classifier.logits((images[:count] - 0.4) / 0.3, readout)
        atol = tolerance * max(float(expected.abs().max()), 1.0)
        np.testing.assert_allclose(scores, expected.numpy(), rtol=0, atol=atol)
        if readout in classifier.temperatures:
            (shares,) = shares
            np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=0, atol=1e-6)
            t = classifier.temperatures[readout]
            expected = (expected.double() / t).softmax(dim=1)
            np.testing.assert_allclose(shares, expected.numpy(), rtol=0, atol=1e-4)
        else:
            assert not shares
    record = opened.get_modelmeta().custom_metadata_map
    assert json.loads(record["classes"]) == classifier.classes
    assert json.loads(record["preprocessing"])["image_size"] == 16
    assert record["readout"] == readout


@pytest.mark.slow
def test_onnx_decides_image_files_as_predict_does(normalised: Path, tmp_path: Path) -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    with pytest.raises(ValueError, match=r"FILE\.onnx"):
        export(normalised, tmp_path / "m.bin", "onnx")
    export(normalised, tmp_path / "m.onnx", "onnx")
    classifier = load(normalised)
    root = Path(classifier.experiment.data.options["root"])
    files = sorted((root / "test").rglob("*.png"))
    pixels = np.stack([decode(file) for file in files])
    scores, *_ = session(tmp_path / "m.onnx").run(
        None, {"pixels": (pixels.transpose(0, 3, 1, 2) / 255).astype(np.float32)}
    )
    answers = [classifier.classes[k] for k in scores.argmax(axis=1)]
    assert answers == [best.name for (best,) in classifier.predict(files)]


def test_onnx_needs_its_libraries(normalised: Path, tmp_path: Path) -> None:
    try:
        importlib.import_module("onnxscript")
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match="onnxscript"):
            export(normalised, tmp_path / "m.onnx", "onnx")
    else:
        pytest.skip("they are installed here")


# PEFT


@pytest.mark.parametrize("method", ["loda", "seq_lora", "sd_lora", "o_lora", "inflora"])
def test_an_adapter_holds_what_the_run_added(
    images: Tensor, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, method: str
) -> None:
    run = finished(tmp_path_factory, method, data=NORMALISED, train={"lr": 0.05})
    written = export(run, tmp_path / "adapter", "peft")
    assert {p.name for p in written.path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    experiment = load(run).experiment
    stored = load_file(written.path / "adapter_model.safetensors")

    with seeded(derive(experiment.seed, 0, "backbone")):
        base = build_backbone(experiment.backbone).module
    final = load(run).model
    # Without PEFT: W + B A is the weight of the run, to rounding.
    for name, layer in base.named_modules():
        key = f"base_model.model.{name}.lora_"
        if f"{key}A.weight" in stored:
            assert isinstance(layer, nn.Linear)
            update = stored[f"{key}B.weight"] @ stored[f"{key}A.weight"]
            expected = final.get_parameter(f"{name}.weight")
            atol = 1e-6 * float(expected.detach().abs().max())
            torch.testing.assert_close(layer.weight + update, expected, rtol=0, atol=atol)
    peft = pytest.importorskip("peft")
    adapted = peft.PeftModel.from_pretrained(base, written.path).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(images), features(run, images), rtol=0, atol=1e-5)
    assert written.difference is not None
    assert written.difference < 1e-5


def test_a_run_that_trained_no_layer_has_no_adapter(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(ValueError, match="rounding"):
        export(finished(tmp_path_factory, "frozen"), tmp_path / "adapter", "peft")
    assert not any(tmp_path.iterdir())


def test_an_adapter_of_other_pretrained_weights_is_refused(
    normalised: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(normalised, tmp_path / "copy")
    record = read_json(copy / "environment.json")
    record["backbone"]["tensors_sha256"] = 64 * "0"
    (copy / "environment.json").write_text(json.dumps(record), "utf-8")
    with pytest.raises(ValueError, match="not the file"):
        export(copy, tmp_path / "adapter", "peft")
    with pytest.raises(ValueError, match="pretrained weights"):
        export(resealed(copy), tmp_path / "adapter", "peft")


# Places


def test_what_is_there_is_replaced_only_when_asked(normalised: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    export(normalised, place, "timm")  # an empty folder
    before = (place / "model.safetensors").stat().st_ino
    with pytest.raises(FileExistsError, match="overwrite"):
        export(normalised, place, "timm")
    assert (place / "model.safetensors").stat().st_ino == before
    export(normalised, place, "timm", overwrite=True)
    (place / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        export(normalised, place, "timm", overwrite=True)
    with pytest.raises(FileExistsError, match="file"):
        export(normalised, place / "mine.txt", "timm", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_wrong_requests_are_refused(normalised: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tflite"):
        export(normalised, tmp_path / "out", "tflite")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="heads"):
        export(normalised, tmp_path / "out", "timm", readout="heads")
    with pytest.raises(FileNotFoundError, match="no run folder"):
        export(tmp_path / "none", tmp_path / "out", "timm")


OWN = """
from torch import nn

class Pooled:
    def build(self, *, initialise: bool) -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        net.num_features = 8
        return net
"""


@pytest.fixture
def own(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run on a backbone of one's own."""
    (tmp_path / "pooled_net.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    changes: Any = {
        "data": {"name": "folder", "root": str(tree(tmp_path_factory)), **PIXELS},
        "backbone": {"name": "pooled_net.Pooled"},
        "method": {"name": "frozen"},
        "head": {"readout": "nearest_mean"},
        "out": str(tmp_path / "run"),
        "device": "cpu",
    }
    return train(experiment_of(changes), quiet=True)


def test_a_backbone_of_ones_own_is_no_model_of_timm(own: Path, tmp_path: Path) -> None:
    for form in ("timm", "hf"):
        with pytest.raises(ValueError, match="Pooled"):
            export(own, tmp_path / "out", form, allow=["pooled_net.Pooled"])  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_backbone_of_ones_own_is_exported_to_onnx(own: Path, tmp_path: Path) -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    written = export(own, tmp_path / "m.onnx", "onnx", allow=["pooled_net.Pooled"])
    assert written.difference is not None
    assert written.difference < 1e-5


def test_the_command_says_how_to_load_what_it_wrote(
    normalised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "timm"
    assert main(["export", str(normalised), "--format", "timm", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert f"local-dir:{out}" in printed.out
    assert "exactly those of the run" in printed.out
    assert printed.err == ""


def test_preprocessing_is_that_of_the_run(normalised: Path) -> None:
    prepared = preprocessing(load(normalised))
    assert (prepared.image_size, prepared.channels, prepared.crop_pct) == (16, 3, 1)
    assert prepared.mean == (0.4, 0.4, 0.4)
