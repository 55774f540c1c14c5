"""CIFAR-10 from its pictures, the stem, the recipe in miniature and the weights that it made."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional

import training
from backends.torch import adapt
from training.backbones import build_backbone, conv_vit
from training.config import PACKAGED_WEIGHTS, BackboneConfig
from training.pretrain import cifar10, cifar_images

RECORDED = "884ccced8cc1a099e9b20bc02b1ec9382ed88a2ca75795ffd28f44a71da257b7"
WEIGHTS = Path(training.__file__).parent / "weights" / PACKAGED_WEIGHTS["cifar_vit"]
TINY: dict[str, Any] = {
    **cifar10.OPTIONS,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "widths": [8, 8],
    "num_classes": 4,
}
MINIATURE = cifar10.Recipe(seed=3, epochs=4, batch_size=16, lr=3e-3)


def colours(count: int, seed: int) -> cifar_images.Images:
    """Four classes of noise, each around a grey of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    noise = torch.randint(64, (count, 32, 32, 3), generator=generator)
    pixels = (noise + 60 * labels[:, None, None, None]).to(torch.uint8)
    return cifar_images.Images(pixels, labels)


def sheets(root: Path, split: str, tiles: np.ndarray) -> None:
    """Write tiles (classes, rows, columns, 32, 32, 3) as one picture a class."""
    for name, grid in zip("abcdefghij", tiles, strict=True):
        rows, columns = grid.shape[:2]
        sheet = grid.transpose(0, 2, 1, 3, 4).reshape(rows * 32, columns * 32, 3)
        Image.fromarray(sheet).save(root / f"{split}_{name}.webp", lossless=True)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def trained() -> cifar10.Result:
    return cifar10.train(MINIATURE, colours(64, 0), colours(40, 1), options=TINY)


# The images


def test_tiles_are_read_row_by_row_and_labelled_by_class(tmp_path: Path) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (10, 2, 3, 32, 32, 3), dtype=np.uint8)
    sheets(tmp_path, "train", tiles)
    images = cifar_images.read(tmp_path, "train")
    assert np.array_equal(images.pixels.numpy(), tiles.reshape(60, 32, 32, 3))
    assert images.labels.tolist() == [label for label in range(10) for _ in range(6)]
    kept, held = cifar_images.split_off(images, 3)
    assert torch.equal(held.pixels, images.pixels[2::3])
    assert torch.bincount(held.labels).tolist() == [2] * 10
    assert len(kept.labels) == 40


def test_missing_and_odd_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no test_CLASS\.webp under"):
        cifar_images.read(tmp_path, "test")
    Image.new("RGB", (64, 40)).save(tmp_path / "test_cat.webp")
    with pytest.raises(ValueError, match=r"test_cat\.webp has 64 x 40 pixels: not a grid"):
        cifar_images.read(tmp_path, "test")


def test_an_epoch_gives_each_image_once_as_a_window_of_the_mirrored_image() -> None:
    pixels = torch.randint(256, (10, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    images = cifar_images.Images(pixels.to(torch.uint8), torch.arange(10))
    batches = list(cifar_images.epoch(images, 5, 0, torch.Generator().manual_seed(1)))
    assert [len(labels) for _, labels in batches] == [5, 5]
    seen = torch.cat([labels for _, labels in batches])
    assert sorted(seen.tolist()) == list(range(10))
    wide = functional.pad(cifar_images.scaled(images.pixels), (4,) * 4, mode="reflect")
    flips = []
    for x, label in zip(torch.cat([x for x, _ in batches]), seen, strict=True):
        windows = wide[label].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
        plain = (windows == x).flatten(2).all(2).sum().item()
        mirrored = (windows == x.flip(2)).flatten(2).all(2).sum().item()
        assert plain + mirrored == 1
        flips.append(mirrored)
    assert 0 < sum(flips) < 10


def test_a_square_of_each_image_is_erased_and_the_generator_decides() -> None:
    images = cifar_images.Images(
        torch.full((64, 32, 32, 3), 255, dtype=torch.uint8), torch.arange(64)
    )

    def one(seed: int) -> torch.Tensor:
        return next(cifar_images.epoch(images, 64, 8, torch.Generator().manual_seed(seed)))[0]

    erased = one(0) == 0
    lost = erased[:, 0].sum(dim=(1, 2))
    assert ((erased.sum(1) == 0) | (erased.sum(1) == 3)).all()
    assert lost.max() == 64
    assert lost.min() >= 16  # a quarter stays where the middle is on a corner
    # Rows and columns of the lost pixels span a full rectangle.
    assert torch.equal(lost, erased[:, 0].any(1).sum(1) * erased[:, 0].any(2).sum(1))
    assert torch.equal(one(0), one(0))
    assert not torch.equal(one(0), one(1))


# The stem


def test_tokens_are_in_rows_and_see_what_is_near_them() -> None:
    torch.manual_seed(0)
    stem = timm.create_model(conv_vit.NAME, **TINY).patch_embed
    image = torch.randn(1, 3, 32, 32)
    other = image.clone()
    other[..., 31, 0] += 5  # the corner at the bottom left
    moved = (stem(image) - stem(other)).abs().amax(dim=2)[0]
    assert moved.shape == (16,)
    assert moved[12] > 0
    assert (moved[:4] == 0).all()
    assert (moved[[3, 7, 11, 15]] == 0).all()


def test_folding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = cifar10.build({**TINY, "num_classes": 0}).double()
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    for _ in range(3):
        model(images)  # gives the normalisation statistics of its own
    model.eval()
    folded = copy.deepcopy(model)
    conv_vit.fold(folded)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
    torch.testing.assert_close(folded(images), model(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{"patch_size": 4}, {"img_size": 30}, {"widths": [8, 8, 8]}, {"widths": [8]}]
)
def test_sizes_that_the_stem_does_not_make_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one token of 8 x 8 pixels by two widths"):
        timm.create_model(conv_vit.NAME, **{**TINY, **options})


def test_there_is_nothing_to_download() -> None:
    with pytest.raises(ValueError, match="no weights to download"):
        conv_vit.loda_conv_vit(pretrained=True)


# The recipe


def test_the_same_seed_gives_the_same_weights(trained: cifar10.Result) -> None:
    state = torch.random.get_rng_state()
    again = cifar10.train(MINIATURE, colours(64, 0), colours(40, 1), options=TINY)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(again.tensors, trained.tensors)
    assert again.losses == trained.losses
    other = cifar10.Recipe(**{**vars(MINIATURE), "seed": 4, "epochs": 1})
    changed = cifar10.train(other, colours(64, 0), colours(40, 1), options=TINY)
    assert not same(changed.tensors, trained.tensors)


def test_the_recipe_learns(trained: cifar10.Result) -> None:
    assert trained.losses[-1] < trained.losses[0]
    assert trained.accuracy > 0.5  # chance is a quarter
    assert {t.dtype for t in trained.tensors.values()} == {torch.float16}


def test_the_command_line_writes_once_and_a_trial_opens_no_test_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (10, 1, 10, 32, 32, 3), dtype=np.uint8)
    sheets(tmp_path, "train", tiles)
    words = ["--data", str(tmp_path), "--epochs", "1", "--batch-size", "30"]
    cifar10.main([*words, "--trial"])
    assert "accuracy on held-out training images: " in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.safetensors"))
    sheets(tmp_path, "test", tiles[:, :, :1])
    out = tmp_path / "new" / "weights.safetensors"
    cifar10.main([*words, "--out", str(out)])
    printed = capsys.readouterr().out
    assert "2684682 weights" in printed
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["tensors_sha256"] == cifar10.digest(load_file(out))
    assert f"SHA-256 of the backbone's tensors: {metadata['tensors_sha256']}" in printed
    assert "--epochs 1 --batch-size 30 " in metadata["recipe"]
    before = out.read_bytes()
    for wrong, message in [(["--out", str(out)], "exists"), ([], "either --out FILE")]:
        with pytest.raises(SystemExit):
            cifar10.main([*words, *wrong])
        assert message in capsys.readouterr().err
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]


# The weights of the package


def test_the_packaged_weights_are_those_of_the_recipe() -> None:
    with safe_open(WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert WEIGHTS.stat().st_size <= 6_000_000
    assert metadata["timm_model"] == conv_vit.NAME
    assert json.loads(metadata["timm_options"]) == cifar10.OPTIONS
    assert metadata["recipe"] == cifar10.command(cifar10.Recipe())
    assert metadata["tensors_sha256"] == RECORDED
    assert build_backbone(BackboneConfig("cifar_vit")).tensors_sha256 == RECORDED
    page = Path(__file__).parents[1] / "docs" / "backbones.md"
    assert RECORDED in page.read_text(encoding="utf-8")
    assert f"{100 * float(metadata['test_accuracy']):.2f} %" in page.read_text(encoding="utf-8")


def test_the_packaged_backbone_is_a_transformer_that_loda_adapts() -> None:
    backbone = build_backbone(BackboneConfig("cifar_vit"))
    assert (backbone.features, backbone.channels, backbone.image_size) == (192, 3, 32)
    assert sum(p.numel() for p in backbone.module.parameters()) <= 6_000_000
    assert {p.dtype for p in backbone.module.parameters()} == {torch.float32}
    layers = adapt(backbone.module, "*.attn.qkv")
    assert list(layers) == [f"blocks.{i}.attn.qkv" for i in range(6)]
    assert all(isinstance(b.norm1, torch.nn.LayerNorm) for b in backbone.module.blocks)
    assert backbone.module(torch.zeros(2, 3, 32, 32)).shape == (2, 192)


def test_the_packaged_backbone_takes_no_other_weights() -> None:
    with pytest.raises(ValueError, match=r"backbone\.name cifar_vit comes with its own weights"):
        BackboneConfig("cifar_vit", weights="a.pth")


def test_the_packaged_weights_reach_their_recorded_accuracy(shared: Path) -> None:
    folder = shared / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"CIFAR-10 is not here: {folder}")
    _, some = cifar_images.split_off(cifar_images.read(folder, "test"), 25)
    with safe_open(WEIGHTS, framework="pt") as file:
        recorded = float(file.metadata()["test_accuracy"])
    found = cifar10.accuracy(cifar10.load(load_file(WEIGHTS)), some)
    # 400 images: three standard errors are below five per cent.
    assert found == pytest.approx(recorded, abs=0.05)
