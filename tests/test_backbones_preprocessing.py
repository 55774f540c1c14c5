"""How networks want their images, read from what timm, transformers and weights files say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    SiglipImageProcessor,
    ViTConfig,
    ViTImageProcessor,
)

from training.backbones import BackboneConfig, Preprocessing, preprocessing_of

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def facts(name: str, **options: Any) -> Preprocessing:
    value = preprocessing_of(BackboneConfig(name, options))
    assert value is not None
    return value


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("glyphs", Preprocessing(8, (0.0,), (1.0,), "bicubic", 1.0, "center", 1)),
        ("cifar_vit", Preprocessing(32, *HALF, "bicubic", 1.0, "center", 3)),
        ("vit_tiny_patch16_224", Preprocessing(224, *HALF, "bicubic", 0.9, "center", 3)),
        (
            "vit_small_patch14_dinov2.lvd142m",
            Preprocessing(518, *IMAGENET, "bicubic", 1.0, "center", 3),
        ),
        (
            "vit_base_patch16_siglip_224",
            Preprocessing(224, *HALF, "bicubic", 0.9, "center", 3),
        ),
        (
            "swin_tiny_patch4_window7_224",
            Preprocessing(224, *IMAGENET, "bicubic", 0.9, "center", 3),
        ),
    ],
)
def test_the_package_and_timm_say_how_images_are_prepared(
    name: str, expected: Preprocessing
) -> None:
    assert facts(name) == expected


def test_options_of_a_model_change_what_it_wants() -> None:
    name = "vit_small_patch14_dinov2.lvd142m"
    wanted = facts(name, options={"img_size": 224, "in_chans": 1})
    assert (wanted.image_size, wanted.channels) == (224, 1)
    # timm adds the weights of three channels up for one: the mean of their means fits.
    assert wanted.mean == pytest.approx((sum(IMAGENET[0]) / 3,))
    four = facts(name, options={"in_chans": 4})
    assert four.mean == (*IMAGENET[0], IMAGENET[0][0])


def test_a_recipe_writes_how_pixels_are_scaled_into_its_file(tmp_path: Path) -> None:
    options = {"img_size": 16, "patch_size": 8}
    for pixels, mean, std in (("(x/255 - 0.4) / 0.2", 0.4, 0.2), ("[0,1]", 0.0, 1.0)):
        save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", metadata={"pixels": pixels})
        wanted = facts(
            "vit_tiny_patch16_224", weights=str(tmp_path / "w.safetensors"), options=options
        )
        assert (wanted.image_size, wanted.mean, wanted.std) == (16, (mean,) * 3, (std,) * 3)
    # The size of the images that the options leave out is in the file, too.
    facts_of_file = {"pixels": "(x/255 - 0.4) / 0.2", "timm_options": '{"img_size": 24}'}
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", metadata=facts_of_file)
    wanted = facts("loda_conv_vit", weights=str(tmp_path / "w.safetensors"))
    assert (wanted.image_size, wanted.mean, wanted.std) == (24, (0.4,) * 3, (0.2,) * 3)
    (tmp_path / "w.safetensors").write_text("damaged")  # refused when it is loaded
    assert facts("resnet18", weights=str(tmp_path / "w.safetensors")).image_size == 224


def test_a_model_of_which_nothing_is_known_has_no_wishes(tmp_path: Path) -> None:
    for name in ("own_components.Net", "loda_conv_vit"):
        assert preprocessing_of(BackboneConfig(name)) is None
    ViTConfig(image_size=16).save_pretrained(tmp_path)  # without an image processor
    assert preprocessing_of(BackboneConfig(f"hf:{tmp_path}")) is None
    with pytest.raises(ValueError, match="square"):
        facts("vit_base_patch16_sapiens2.fb")


class Wishing:
    """A class of the user's that says how it wants its images."""

    preprocessing = Preprocessing(8, (0.5,), (0.25,), "bilinear", 1.0, "squash", 1)

    def build(self) -> torch.nn.Module:
        return torch.nn.Identity()


def test_a_class_of_ones_own_may_say_how_it_wants_its_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = f"{Wishing.__module__}.Wishing"
    assert facts(path) is Wishing.preprocessing
    monkeypatch.setattr(Wishing, "preprocessing", 3)
    with pytest.raises(ValueError, match="Preprocessing"):
        facts(path)


# Against the libraries' own transforms


def applied(wanted: Preprocessing, image: Image.Image) -> np.ndarray[Any, Any]:
    """The image as these settings describe it, by Pillow."""
    side, resized = wanted.image_size, wanted.resized
    if wanted.crop_mode == "squash":
        size = (resized, resized)
    else:
        scale = resized / min(image.size)
        size = (int(image.width * scale), int(image.height * scale))
    kind = getattr(Image.Resampling, wanted.interpolation.upper())
    image = image.resize(size, kind)
    left, top = (round((x - side) / 2) for x in image.size)
    image = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(image, dtype=np.float64) / 255
    return ((pixels - wanted.mean) / wanted.std).transpose(2, 0, 1)


@pytest.fixture
def photo() -> Image.Image:
    """A smooth image in landscape format, so that filters differ little and crops much."""
    rows, columns = np.mgrid[:96, :128]
    channels = [rows + columns, 2 * rows, 255 - columns]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 32, "width": 32}),
        ViTImageProcessor(size={"height": 32, "width": 32}, do_rescale=False),
        ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
        BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        ConvNextImageProcessor(size={"shortest_edge": 32}),
        ConvNextImageProcessor(size={"shortest_edge": 384}),
        DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}),
        SiglipImageProcessor(size={"height": 32, "width": 32}),
        EfficientNetImageProcessor(
            size={"height": 32, "width": 32}, rescale_offset=True, rescale_factor=1 / 127.5
        ),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_images_look_as_the_image_processor_makes_them(
    processor: Any, photo: Image.Image, tmp_path: Path
) -> None:
    ViTConfig(image_size=32).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    wanted = facts(f"hf:{tmp_path}")
    expected = processor(photo, return_tensors="np")["pixel_values"][0]
    result = applied(wanted, photo)
    assert result.shape == expected.shape
    # Within four grey levels: both libraries resize, with filters of their own.
    assert np.abs(result - expected).max() < 4 * np.max(1 / np.array(wanted.std)) / 255


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_siglip_224", "swin_tiny_patch4_window7_224", "resnet18"]
)
def test_images_look_as_timm_makes_them(name: str, photo: Image.Image) -> None:
    wanted = facts(name)
    transform: Any = create_transform(
        (3, wanted.image_size, wanted.image_size),
        interpolation=wanted.interpolation,
        mean=wanted.mean,
        std=wanted.std,
        crop_pct=wanted.crop_pct,
        crop_mode=wanted.crop_mode,
    )
    expected = transform(photo).numpy()
    assert np.abs(applied(wanted, photo) - expected).max() < 0.2
