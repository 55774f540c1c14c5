"""The recipes of photographs: their images, training in miniature, the weights of cifar_vit."""

import json
from pathlib import Path
from typing import Any

import cifar_vit
import numpy as np
import photographs
import pytest
import tiny_imagenet_vit
import torch
from PIL import Image
from pretraining import command_line
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional

import training
from training.backbones import BackboneConfig, build_backbone, conv_vit
from training.backbones.config import PACKAGED_WEIGHTS

RECORDED = "884ccced8cc1a099e9b20bc02b1ec9382ed88a2ca75795ffd28f44a71da257b7"
WEIGHTS = Path(training.__file__).parent / "weights" / PACKAGED_WEIGHTS["cifar_vit"]
TINY: dict[str, Any] = {
    **cifar_vit.SOURCE.options,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "widths": [8, 8],
    "num_classes": 4,
}
MINIATURE = photographs.Recipe(seed=3, epochs=4, batch_size=16, lr=3e-3)


def colours(count: int, seed: int) -> photographs.Images:
    """Four classes of noise, each around a grey of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    noise = torch.randint(64, (count, 32, 32, 3), generator=generator)
    pixels = (noise + 60 * labels[:, None, None, None]).to(torch.uint8)
    return photographs.Images(pixels, labels)


def sheets(root: Path, split: str, tiles: np.ndarray) -> None:
    """Write tiles (classes, rows, columns, 32, 32, 3) as one picture a class."""
    for name, grid in zip("abcdefghij", tiles, strict=True):
        rows, columns = grid.shape[:2]
        sheet = grid.transpose(0, 2, 1, 3, 4).reshape(rows * 32, columns * 32, 3)
        Image.fromarray(sheet).save(root / f"{split}_{name}.webp", lossless=True)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def trained() -> photographs.Result:
    return photographs.train(MINIATURE, colours(64, 0), colours(40, 1), options=TINY)


# The images


def test_tiles_are_read_row_by_row_and_labelled_by_class(tmp_path: Path) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (10, 2, 3, 32, 32, 3), dtype=np.uint8)
    sheets(tmp_path, "train", tiles)
    images = cifar_vit.read(tmp_path, "train")
    assert np.array_equal(images.pixels.numpy(), tiles.reshape(60, 32, 32, 3))
    assert images.labels.tolist() == [label for label in range(10) for _ in range(6)]
    others, held = photographs.split_off(images, 3)
    assert torch.equal(held.pixels, images.pixels[2::3])
    assert torch.bincount(held.labels).tolist() == [2] * 10
    assert len(others.labels) == 40


def test_missing_and_odd_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no test_CLASS\.webp under"):
        cifar_vit.read(tmp_path, "test")
    Image.new("RGB", (64, 40)).save(tmp_path / "test_cat.webp")
    with pytest.raises(ValueError, match=r"test_cat\.webp has 64 x 40 pixels: not a grid"):
        cifar_vit.read(tmp_path, "test")


def test_folders_are_read_by_class_and_other_sizes_are_named(tmp_path: Path) -> None:
    for name, shades in (("cat", (10, 20)), ("ant", (30, 40))):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for number, shade in enumerate(shades):
            Image.new("L", (32, 32), shade).save(folder / f"{number}.jpg", quality=100)
    images = tiny_imagenet_vit.read(tmp_path, "train")
    assert images.pixels.shape == (4, 32, 32, 3)
    assert images.pixels[:, 0, 0, 0].tolist() == [30, 40, 10, 20]
    assert images.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(FileNotFoundError, match="no test/CLASS"):
        tiny_imagenet_vit.read(tmp_path, "test")
    Image.new("RGB", (64, 40)).save(tmp_path / "train" / "cat" / "odd.jpg")
    with pytest.raises(ValueError, match="64 x 40"):
        tiny_imagenet_vit.read(tmp_path, "train")


def test_an_epoch_gives_each_image_once_as_a_window_of_the_mirrored_image() -> None:
    pixels = torch.randint(256, (10, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    images = photographs.Images(pixels.to(torch.uint8), torch.arange(10))
    batches = list(photographs.epoch(images, 5, 0, torch.Generator().manual_seed(1)))
    assert [len(labels) for _, labels in batches] == [5, 5]
    seen = torch.cat([labels for _, labels in batches])
    assert sorted(seen.tolist()) == list(range(10))
    wide = functional.pad(photographs.scaled(images.pixels), (4,) * 4, mode="reflect")
    flips = []
    for x, label in zip(torch.cat([x for x, _ in batches]), seen, strict=True):
        windows = wide[label].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
        plain = (windows == x).flatten(2).all(2).sum().item()
        mirrored = (windows == x.flip(2)).flatten(2).all(2).sum().item()
        assert plain + mirrored == 1
        flips.append(mirrored)
    assert 0 < sum(flips) < 10


def test_a_square_of_each_image_is_erased_and_the_generator_decides() -> None:
    images = photographs.Images(
        torch.full((64, 32, 32, 3), 255, dtype=torch.uint8), torch.arange(64)
    )

    def one(seed: int) -> torch.Tensor:
        return next(photographs.epoch(images, 64, 8, torch.Generator().manual_seed(seed)))[0]

    erased = one(0) == 0
    lost = erased[:, 0].sum(dim=(1, 2))
    assert ((erased.sum(1) == 0) | (erased.sum(1) == 3)).all()
    assert lost.max() == 64
    assert lost.min() >= 16  # a quarter stays where the middle is on a corner
    # Rows and columns of the lost pixels span a full rectangle.
    assert torch.equal(lost, erased[:, 0].any(1).sum(1) * erased[:, 0].any(2).sum(1))
    assert torch.equal(one(0), one(0))
    assert not torch.equal(one(0), one(1))


# The recipe


def test_the_same_seed_gives_the_same_weights(trained: photographs.Result) -> None:
    state = torch.random.get_rng_state()
    again = photographs.train(MINIATURE, colours(64, 0), colours(40, 1), options=TINY)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(again.tensors, trained.tensors)
    assert again.losses == trained.losses
    other = photographs.Recipe(**{**vars(MINIATURE), "seed": 4, "epochs": 1})
    changed = photographs.train(other, colours(64, 0), colours(40, 1), options=TINY)
    assert not same(changed.tensors, trained.tensors)


def test_the_recipe_learns(trained: photographs.Result) -> None:
    assert trained.losses[-1] < trained.losses[0]
    assert trained.accuracy > 0.5  # chance is a quarter
    assert {t.dtype for t in trained.tensors.values()} == {torch.float16}


def test_the_command_line_writes_once_and_a_trial_opens_no_test_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (10, 1, 10, 32, 32, 3), dtype=np.uint8)
    sheets(tmp_path, "train", tiles)
    words = ["--data", str(tmp_path), "--epochs", "1", "--batch-size", "30"]
    cifar_vit.main([*words, "--trial"])
    assert "accuracy on held-out training images: " in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.safetensors"))
    sheets(tmp_path, "test", tiles[:, :, :1])
    out = tmp_path / "new" / "weights.safetensors"
    cifar_vit.main([*words, "--out", str(out)])
    printed = capsys.readouterr().out
    assert "2684682 weights" in printed
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["tensors_sha256"] == photographs.digest(
        load_file(out), cifar_vit.SOURCE.options
    )
    assert f"SHA-256 of the backbone's tensors: {metadata['tensors_sha256']}" in printed
    assert "--epochs 1 --batch-size 30 " in metadata["recipe"]
    before = out.read_bytes()
    for wrong, message in [(["--out", str(out)], "exists"), ([], "either --out FILE")]:
        with pytest.raises(SystemExit):
            cifar_vit.main([*words, *wrong])
        assert message in capsys.readouterr().err
    (tmp_path / "test_j.webp").unlink()  # the classes of the others would have other numbers
    with pytest.raises(SystemExit):
        cifar_vit.main([*words, "--out", str(out), "--overwrite"])
    assert "10 classes of test images, got 9" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]


# The weights of the package


def test_the_packaged_weights_are_those_of_the_recipe() -> None:
    with safe_open(WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert WEIGHTS.stat().st_size <= 6_000_000
    assert metadata["timm_model"] == conv_vit.NAME
    assert json.loads(metadata["timm_options"]) == cifar_vit.SOURCE.options
    # The file was written when the recipe was a module of the package, under another command.
    settings = command_line(cifar_vit.SOURCE.program, photographs.Recipe()).partition(" --")[2]
    assert metadata["recipe"].partition(" --")[2] == settings
    assert metadata["tensors_sha256"] == RECORDED
    assert build_backbone(BackboneConfig("cifar_vit")).tensors_sha256 == RECORDED
    page = Path(__file__).parents[1] / "docs" / "backbones.md"
    assert RECORDED in page.read_text(encoding="utf-8")
    assert f"{100 * float(metadata['test_accuracy']):.2f} %" in page.read_text(encoding="utf-8")


def test_the_packaged_weights_reach_their_recorded_accuracy(shared: Path) -> None:
    folder = shared / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"CIFAR-10 is not here: {folder}")
    _, some = photographs.split_off(cifar_vit.read(folder, "test"), 25)
    with safe_open(WEIGHTS, framework="pt") as file:
        recorded = float(file.metadata()["test_accuracy"])
    accuracy = photographs.accuracy(
        photographs.load(load_file(WEIGHTS), cifar_vit.SOURCE.options), some
    )
    # 400 images: three standard errors are below five per cent.
    assert accuracy == pytest.approx(recorded, abs=0.05)
