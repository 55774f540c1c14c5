"""Files of strangers: each works or gives a clear error, and none runs code."""

import io
import json
import warnings
import zipfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import assert_clear, says
from hypothesis import example, given
from hypothesis import strategies as st
from mangled import DEEP, ODD, damaged, mangled
from PIL import Image
from safetensors.torch import save
from small_runs import small_vit

from training import cli
from training.backbones.weights import load_weights
from training.config import BackboneConfig, DataConfig, Experiment, dump_experiment, read_experiment
from training.data import UnreadableImageError, open_image
from training.sweep import plan, read_sweep

CONFIG: Any = yaml.safe_load(dump_experiment(Experiment()))
SWEEP: Any = {
    "configs": ["digits"],
    "settings": {"head.start": "class_mean"},
    "seeds": [1, 2],
    "variants": {"loda": {}, "plain": {"method": {"name": "seq_lora", "rank": 4}}},
    "slurm": {"timeout_min": 6},
}
# What yaml.dump would not write: other languages, code, and texts that grow as they are read.
TEXTS = [
    "[" * 3000,
    "{a: " * 3000,
    "- " * 3000 + "x",
    "a: !!python/object/apply:os.system ['false']",
    "seed: !!python/name:os.system",
    "a: &a [x, x]\n"
    + "".join(
        f"{c}: &{c} [*{p}, *{p}]\n"
        for p, c in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu", strict=True)
    ),
    "backbone: {options: &o {a: *o}}",
    "&a [*a]",
    "seed: 1\nseed: 2",
    "base: base",
    "base: ../../../../etc/passwd",
    "base: [a]",
    "base: {a: b}: c",
    "base: '",
    "\t- a\n b:",
    "seed: 9" * 2000,
    "seed: " + "9" * 6000,
    "train: {lr: 0x" + "f" * 400 + "}",
    "train.lr: 0.1",
    "config: a.yaml",
    "{}",
    "",
    "\ufeffseed: 3",
    "seed: 2001-01-01",
    "? [a]\n: b",
    "print_config: true",
    "help: true",
]


def ends_clearly(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that may refuse, but not crash; what it says then."""
    capsys.readouterr()
    status = cli.main(arguments)
    said = capsys.readouterr().err
    assert_clear(arguments[0], status, said)
    return said


def works_or_refuses(path: Path, read: Any) -> None:
    with suppress(ValueError, OSError):
        read(path)


texts = (
    st.sampled_from(TEXTS).map(str.encode)
    | mangled(CONFIG).map(lambda x: yaml.safe_dump(x, allow_unicode=True).encode())
    | damaged(dump_experiment(Experiment()).encode())
    | st.text(max_size=60).map(str.encode)
)


@given(texts)
def test_configurations(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_bytes(text)
    works_or_refuses(path, read_experiment)


@pytest.mark.parametrize("text", TEXTS)
def test_configurations_that_are_hard_to_read(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "base.yaml"
    path.write_bytes(text.encode())
    works_or_refuses(path, read_experiment)
    works_or_refuses(path, read_sweep)
    ends_clearly(["sweep", str(path), "--out", str(tmp_path / "out"), "--dry-run"], capsys)


sweeps = mangled(SWEEP).map(lambda x: yaml.safe_dump(x, allow_unicode=True).encode()) | damaged(
    yaml.safe_dump(SWEEP).encode()
)


@given(sweeps)
def test_sweeps(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "sweep.yaml"
    path.write_bytes(text)
    out = tmp_path_factory.getbasetemp() / "sweep"

    def read(path: Path) -> None:
        for job in plan(read_sweep(path), out):
            assert out in job.folder.parents

    works_or_refuses(path, read)


def image(kind: str, **how: Any) -> bytes:
    rng = np.random.default_rng(0)
    content = io.BytesIO()
    pixels = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    pixels.save(content, kind, **how)
    return content.getvalue()


IMAGES = {
    "BMP": image("BMP"),
    "GIF": image("GIF"),
    "JPEG": image("JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00"),
    "JPEG2000": image("JPEG2000"),
    "PNG": image("PNG"),
    "PPM": image("PPM"),
    "TIFF": image("TIFF", compression="tiff_lzw"),
    "WEBP": image("WEBP"),
}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@given(st.sampled_from(sorted(IMAGES)).flatmap(lambda kind: damaged(IMAGES[kind])))
@example(EPS)
@example(b"")
def test_images(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "image.png"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata and decodes all the same
        with suppress(UnreadableImageError):
            assert open_image(path, DataConfig("folder", root="x", resize=8)).shape == (3, 8, 8)


@pytest.mark.parametrize("kind", sorted(IMAGES))
def test_every_kind_of_image_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(IMAGES[kind])
    assert open_image(path, DataConfig("folder", root="x", resize=8)).shape == (3, 8, 8)


def test_no_image_starts_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(EPS)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("it did"))
    with pytest.raises(UnreadableImageError, match=r"cannot identify"):
        open_image(path, DataConfig("folder", root="x", resize=8))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
def test_a_small_file_that_claims_to_be_huge_is_refused(tmp_path: Path, kind: str) -> None:
    content, side = bytearray(IMAGES[kind]), (60000).to_bytes(4, "big")
    if kind == "PNG":
        content[16:24] = side + side
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    elif kind == "GIF":
        content[6:10] = b"\x60\xea\x60\xea"
    else:
        content[18:26] = side[::-1] + side[::-1]
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"exceeds limit of .* Scale it down"):
        open_image(path, DataConfig("folder", root="x", resize=8))


ARRAYS: Any = {
    "0/blocks.0/moment_new": np.eye(6) + 1,
    "0/blocks.0/moment_old": np.diag(np.arange(1.0, 7)),
    "0/blocks.0/A_general": np.eye(6)[:2],
    "0/blocks.0/B_general": np.ones((4, 2)),
    "0/blocks.0/A_isolated": np.eye(6)[2:4],
    "0/blocks.0/B_isolated": np.ones((4, 2)),
    "0/blocks.0/moment_new_trained": np.eye(6),
    "0/blocks.0/qkv_before": np.zeros((4, 6)),
    "0/blocks.0/qkv_after": np.ones((4, 6)),
    "0/blocks.0/coefficients": np.eye(2),
    "settings": np.array(json.dumps({"gamma": 3.0, "form": "full"})),
}
STRANGE: Any = [
    np.array(3.0),
    np.array([]),
    np.zeros((0, 0)),
    np.zeros((6, 6)),
    np.full((6, 6), np.nan),
    np.full((6, 6), 1e308),
    np.full((2, 6), 1e-320),
    np.eye(5),
    np.eye(6) * 1j,
    np.eye(6, dtype=bool),
    np.eye(6, dtype=np.uint8),
    np.eye(6, dtype=np.float16),
    np.eye(6).astype("M8[s]"),
    np.array([["a"] * 6] * 6),
    np.zeros((6, 6), dtype=[("a", "f4"), ("b", "i4")]),
    -np.eye(6),
    np.ones((1, 6, 6)),
    np.triu(np.ones((6, 6))),
    *(np.array(json.dumps(odd)) for odd in ODD if odd is not DEEP),
    *(np.array(json.dumps({"gamma": odd})) for odd in ODD[:12]),
    np.array("[" * 3000),
    np.array(b"{}"),
]


def archive(arrays: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    arrays = dict(ARRAYS)
    for name in draw(st.lists(st.sampled_from(sorted(ARRAYS)), max_size=3)):
        if draw(st.booleans()):
            arrays.pop(name, None)
        else:
            arrays[name] = draw(st.sampled_from(STRANGE))
    content = archive(arrays)
    return draw(damaged(content)) if draw(st.integers(0, 2)) == 0 else content


@given(archives())
def test_arrays_to_verify(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "arrays.npz"
    path.write_bytes(content)
    assert_clear("verify", *says(["verify", str(path)]))


def test_an_archive_that_claims_to_be_huge_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bomb.npz"
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000000), }"
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(path, "w") as file:
        name = "0/blocks.0/moment_new.npy"
        file.writestr(name, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    assert "cannot read" in ends_clearly(["verify", str(path)], capsys)


def weights(kind: str) -> bytes:
    tensors, content = small_vit().state_dict(), io.BytesIO()
    if kind == "safetensors":
        return save(tensors)
    if kind == "pth":
        torch.save({"state_dict": tensors}, content)
        return content.getvalue()
    return archive({name: tensor.numpy() for name, tensor in tensors.items()})


WEIGHTS = {kind: weights(kind) for kind in ("npz", "pth", "safetensors")}


@given(st.sampled_from(sorted(WEIGHTS)), st.data())
def test_weights(tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / f"weights.{kind}"
    path.write_bytes(data.draw(damaged(WEIGHTS[kind])))
    works_or_refuses(path, partial(load_weights, small_vit()))


@pytest.mark.parametrize("odd", [torch.zeros(16, dtype=torch.cfloat), torch.zeros(16).to("meta")])
def test_weights_that_are_no_real_numbers(tmp_path: Path, odd: torch.Tensor) -> None:
    path, model = tmp_path / "weights.pth", small_vit()
    torch.save({**model.state_dict(), "norm.bias": odd}, path)
    with pytest.raises(ValueError, match=r"hold no real numbers: norm\.bias"):
        load_weights(model, path)


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def test_no_pickle_is_ever_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.npz"
    evil: Any = np.array([Evil(trace)], dtype=object)
    np.savez(path, **{"0/blocks.0/moment_new": evil}, allow_pickle=True)
    assert "cannot read" in ends_clearly(["verify", str(path)], capsys)
    torch.save({"state_dict": Evil(trace)}, tmp_path / "evil.pth")
    run = ["--data.name=digits", f"--backbone.weights={tmp_path / 'evil.pth'}"]
    model = ["--backbone.name=vit_tiny_patch16_224", f"--out={tmp_path / 'run'}"]
    assert "more than tensors" in ends_clearly(["train", *run, *model], capsys)
    assert not trace.exists()


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"])
def test_options_of_a_backbone_name_no_files(key: str) -> None:
    with pytest.raises(ValueError, match=f"must not hold .'{key}'"):
        BackboneConfig("vit_tiny_patch16_224", options={key: {"file": "evil.pth"}})
