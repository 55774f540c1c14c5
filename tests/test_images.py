"""Images: decoding of files, what is refused, and what is kept in memory."""

import re
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from image_folders import PLAIN, augmented, folder
from PIL import Image
from timm.data import create_transform

from training.backbones import Preprocessing
from training.data import DataConfig, UnreadableImageError, build_stream, loader, open_image
from training.data import test_transform as evaluation_transform
from training.data.datasets import IMAGE_SUFFIXES


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_unreadable_header_is_found_at_the_start(tree: Path, split: str) -> None:
    path = tree / split / "dog" / "1.png"
    path.write_bytes(b"GIF of something else")
    published = DataConfig("own_components.Few", {"root": str(tree)}, **PLAIN)
    with pytest.raises(UnreadableImageError, match=r"cannot read the image .*dog.1\.png"):
        build_stream(published, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_gives_the_same_sentence_for_any_number_of_workers(
    tree: Path, workers: int
) -> None:
    path = tree / "train" / "dog" / "1.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    train = augmented(tree, workers, cache=False)
    path.write_bytes(path.read_bytes()[:-400])

    def said() -> str:
        with pytest.raises(UnreadableImageError) as caught:
            list(loader(train, 4, shuffle=True, seed=0, workers=workers))
        return str(caught.value)

    assert re.fullmatch(rf"cannot read the image {path}: .*truncated.*\. Repair it.*out\.", said())
    path.unlink()
    assert said() == f"there is no image file {path}."


def test_paths_that_are_no_files_are_told_from_damaged_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as missing:
        open_image(tmp_path / "x.png", DataConfig())
    assert str(missing.value) == f"there is no image file {tmp_path / 'x.png'}."
    with pytest.raises(ValueError, match="is a folder, not an image: give") as a_folder:
        open_image(tmp_path, DataConfig())
    for caught in (missing, a_folder):
        assert "Errno" not in str(caught.value)
        assert "Repair" not in str(caught.value)


@pytest.mark.parametrize("side", [20, 40])  # Pillow warns from the limit on, and refuses from twice
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_the_limit_on_image_size_stays_on(
    tree: Path, monkeypatch: pytest.MonkeyPatch, side: int, action: Literal["error", "ignore"]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    path = tree / "train" / "dog" / "1.png"
    Image.new("RGB", (side, side)).save(path)
    said = rf"{path}: Image size \({side * side} pixels\) exceeds limit of .*Scale it down, or take"
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        assert build_stream(folder(tree), 0).left_out == ["dog/1.png"]
        with pytest.raises(UnreadableImageError, match=said):
            open_image(path, folder(tree))
    Image.new("RGB", (15, 20)).save(path)
    assert len(build_stream(folder(tree), 0).train) == 25


# --- decoding


def palette(*, transparent: bool) -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    if transparent:
        image.info["transparency"] = bytes([0, 128])
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (8, 8), 99), (99, 99, 99)),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.new("LA", (8, 8), (99, 3)), (99, 99, 99)),
        (Image.new("RGBA", (8, 8), (200, 100, 50, 10)), (200, 100, 50)),
        (palette(transparent=False), (200, 100, 50)),
        (palette(transparent=True), (200, 100, 50)),
        (Image.fromarray(np.full((8, 8), 99 * 257, np.uint16)), (99, 99, 99)),
    ],
    ids=["grey", "bits", "grey+alpha", "alpha", "palette", "palette+alpha", "16 bit"],
)
def test_every_kind_of_image_becomes_rgb(
    tmp_path: Path, image: Image.Image, expected: tuple[int, int, int]
) -> None:
    image.save(tmp_path / "x.png")
    pixels = open_image(tmp_path / "x.png", folder(tmp_path))
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == torch.uint8
    assert torch.equal(
        pixels, torch.tensor(expected, dtype=torch.uint8)[:, None, None] + 0 * pixels
    )


def colours(side: int = 16) -> Image.Image:
    """Bands of flat colour, which lossy formats keep."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[: side // 2], pixels[side // 2 :] = (200, 100, 50), (20, 60, 180)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.gif", {}),
        ("x.jp2", {}),
        ("x.avif", {"quality": 95}),
        ("x.webp", {"quality": 95}),
        ("x.mpo", {"save_all": True, "append_images": [Image.new("RGB", (16, 16))]}),
        ("x.jfif", {"format": "JPEG", "quality": 95}),
        ("x.dib", {}),
        ("x.tif", {}),
        ("x.JPG", {"format": "PNG"}),  # the content decides, not the name
    ],
)
def test_formats_of_phones_and_cameras_are_read(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    colours().save(tmp_path / name, **options)
    assert Path(name).suffix.lower() in IMAGE_SUFFIXES
    pixels = open_image(tmp_path / name, folder(tmp_path, resize=16)).double()
    expected = torch.from_numpy(np.array(colours())).permute(2, 0, 1)
    assert (pixels - expected).abs().mean() < 6


def test_cmyk_is_read_as_colours(tmp_path: Path) -> None:
    colours().convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    pixels = open_image(tmp_path / "x.jpg", folder(tmp_path, resize=16)).double()
    expected = torch.from_numpy(np.array(colours())).permute(2, 0, 1)
    assert (pixels - expected).abs().mean() < 6


def ramp(low: float, high: float, dtype: Any) -> np.ndarray[Any, Any]:
    return np.linspace(low, high, 64).reshape(8, 8).astype(dtype)


@pytest.mark.parametrize(
    ("values", "bytes_of"),
    [
        (ramp(0, 1, np.float32), lambda x: x * 255),
        (ramp(0, 0.3, np.float32), lambda x: x * 255),
        (ramp(0, 255, np.float32), lambda x: x),
        (ramp(0, 65535, np.uint16), lambda x: x / 257),
        (ramp(0, 700, np.uint16), lambda x: x / 257),
    ],
)
def test_deep_images_become_bytes_by_one_rule(
    tmp_path: Path, values: np.ndarray[Any, Any], bytes_of: Any
) -> None:
    Image.fromarray(values).save(tmp_path / "x.tif")
    pixels = open_image(tmp_path / "x.tif", folder(tmp_path))
    assert np.abs(pixels.numpy() - bytes_of(values.astype(np.float64))).max() <= 0.51


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (ramp(0, 5, np.int32), "32-bit"),
        (ramp(0, 4000, np.float32), "0 to 4000"),
        (ramp(-1, 1, np.float32), "-1 to 1"),
        (np.full((8, 8), np.nan, np.float32), "nan"),
    ],
)
def test_deep_images_of_unknown_range_are_refused_by_name(
    tmp_path: Path, values: np.ndarray[Any, Any], said: str
) -> None:
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImageError, match=rf"x\.tif.*{said}"):
        open_image(tmp_path / "x.tif", folder(tmp_path))


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (50, 50), (31, 200)])
@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_evaluation_images_are_those_of_timm(
    tmp_path: Path, size: tuple[int, int], mode: str, interpolation: str
) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    wanted = Preprocessing(
        32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), interpolation, 0.875, mode, 3
    )
    config = DataConfig("folder", {"root": str(tmp_path)}, validation=0.0).resolved(wanted)
    ours = evaluation_transform(config)(open_image(tmp_path / "x.png", config))
    theirs = create_transform(
        32,
        interpolation=interpolation,
        mean=wanted.mean,
        std=wanted.std,
        crop_pct=0.875,
        crop_mode=mode,
    )
    with Image.open(tmp_path / "x.png") as image:
        torch.testing.assert_close(ours, theirs(image), rtol=0, atol=1e-6)


def test_a_border_keeps_the_whole_image(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), (250, 0, 0)).save(tmp_path / "x.png")
    config = folder(tmp_path, resize=20, crop_mode="border", mean=0.2, std=1.0)
    pixels = open_image(tmp_path / "x.png", config)
    assert pixels.shape == (3, 20, 20)
    assert (pixels[0, 5:15] == 250).all()
    assert (pixels[:, [0, 1, 2, 3, 4, 15, 16, 17, 18, 19]] == 51).all()


def test_a_large_photo_is_read_at_a_fraction_of_its_size_and_looks_the_same(
    tmp_path: Path,
) -> None:
    grid = torch.linspace(0, 12, 1600)
    waves = (torch.sin(grid)[:, None] * torch.cos(1.7 * grid)[None] * 100 + 128).byte()
    photo = Image.fromarray(waves.numpy()).convert("RGB")
    photo.save(tmp_path / "x.jpg", quality=95)
    photo.save(tmp_path / "x.png")
    config = folder(tmp_path, resize=32)
    reduced, whole = (
        open_image(tmp_path / f"x.{kind}", config).double() for kind in ("jpg", "png")
    )
    assert (reduced - whole).abs().max() <= 4


def test_grey_images_fit_a_network_of_three_channels_and_the_other_way_round() -> None:
    wanted = Preprocessing(8, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), "bicubic", 1.0, "center", 3)
    config = DataConfig(classes=2).resolved(wanted)
    stream = build_stream(config, 0)
    image, _ = stream.test[0]
    plain, _ = build_stream(DataConfig(classes=2), 0).test[0]
    assert torch.equal(image, plain.expand(3, 8, 8))
    scaled = evaluation_transform(config)(image)
    assert torch.allclose(scaled, plain - torch.tensor([0.1, 0.2, 0.3])[:, None, None])


def test_the_rotation_noted_by_the_camera_is_applied(tmp_path: Path) -> None:
    upright = np.zeros((8, 8, 3), dtype=np.uint8)
    upright[:4] = 250  # bright above, dark below
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise for display
    Image.fromarray(np.rot90(upright)).save(tmp_path / "x.png", exif=exif)
    pixels = open_image(tmp_path / "x.png", folder(tmp_path))
    np.testing.assert_array_equal(pixels.permute(1, 2, 0), upright)


def test_an_image_for_digits_becomes_grey_and_8_wide(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), (90, 90, 90)).save(tmp_path / "x.png")
    assert (open_image(tmp_path / "x.png", DataConfig()) == 90).all()
    assert open_image(tmp_path / "x.png", DataConfig()).shape == (1, 8, 8)
    larger = DataConfig(image_size=16, resize=16)
    assert open_image(tmp_path / "x.png", larger).shape == (1, 16, 16)


def test_decoded_images_are_kept_only_when_small_and_resized(tree: Path) -> None:
    cached = build_stream(folder(tree), 0).train
    first = [cached[index][0] for index in range(len(cached))]
    uncached = build_stream(folder(tree, cache=False), 0).train
    assert all(torch.equal(a, uncached[index][0]) for index, a in enumerate(first))
    tree.rename(tree.with_name("moved"))
    assert all(torch.equal(a, cached.subset(range(5))[index][0]) for index, a in enumerate(first))
    with pytest.raises(UnreadableImageError, match="no image file"):
        uncached[0]


def test_digits_are_resized_alike_with_and_without_the_cache() -> None:
    streams = [
        build_stream(DataConfig(image_size=16, resize=16, cache=c), 0) for c in (True, False)
    ]
    for index in (0, 50):
        cached, fresh = (stream.train[index][0] for stream in streams)
        assert cached.shape == (1, 16, 16)
        assert 0 <= cached.min() < cached.max() <= 1
        torch.testing.assert_close(cached, fresh)
