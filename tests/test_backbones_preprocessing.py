"""How networks want their images, read from what timm, transformers and weights files say."""

from typing import Any

import pytest

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
