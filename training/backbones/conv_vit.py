"""A small vision transformer behind a convolutional stem, for images of 32 x 32 pixels.

A ViT on raw patches needs far more images and epochs than a CPU can process. Here residual
convolutions turn 32 x 32 pixels into 4 x 4 tokens for timm's VisionTransformer, whose blocks are
those of any ViT: ``blocks.0.attn.qkv`` and so on. Importing this module registers the model in timm
as ``loda_conv_vit``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import load_pretrained, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

NAME = "loda_conv_vit"
STRIDE = 8
WIDTHS = (64, 128)


class Conv(nn.Module):
    """A convolution: with batch normalisation in training, with a bias once folded."""

    def __init__(
        self, channels: int, out: int, *, kernel: int = 3, stride: int = 1, folded: bool
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding=1, bias=folded)
        self.norm = nn.Identity() if folded else nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, channels, H, W) to (N, out, H / stride, W / stride)."""
        y: Tensor = self.norm(self.conv(x))
        return y


class Residual(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, width: int, *, folded: bool) -> None:
        super().__init__()
        self.first = Conv(width, width, folded=folded)
        self.second = Conv(width, width, folded=folded)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width, H, W) to the same shape."""
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class ConvStem(nn.Module):
    """Images (N, C, S, S) to tokens (N, S * S / 64, D), in place of timm's PatchEmbed.

    Tokens that it made before pass as they are, so that images need not be seen twice.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        widths: Sequence[int],
        folded: bool,
        **_: Any,
    ) -> None:
        super().__init__()
        if patch_size != STRIDE or img_size % STRIDE or len(widths) != 2:
            msg = (
                f"the stem makes one token of {STRIDE} x {STRIDE} pixels by two widths: got "
                f"patch_size {patch_size}, img_size {img_size} and widths {list(widths)}."
            )
            raise ValueError(msg)
        self.img_size = (img_size, img_size)
        self.num_patches = (img_size // STRIDE) ** 2
        self.token_bytes = 4 * self.num_patches * embed_dim  # of an image, in float32
        low, high = widths
        self.layers = nn.Sequential(
            Conv(in_chans, low, kernel=4, stride=2, folded=folded),
            nn.ReLU(),
            Residual(low, folded=folded),
            Conv(low, high, kernel=4, stride=2, folded=folded),
            nn.ReLU(),
            Residual(high, folded=folded),
            Conv(high, embed_dim, kernel=4, stride=2, folded=folded),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the tokens, row by row."""
        if x.ndim == 3:
            return x
        y: Tensor = self.layers(x)
        return y.flatten(2).transpose(1, 2)


def fold(model: nn.Module) -> None:
    """Fold batch normalisation into the preceding convolutions; for evaluation only."""
    for layer in model.modules():
        if isinstance(layer, Conv) and isinstance(layer.norm, nn.BatchNorm2d):
            layer.conv = fuse_conv_bn_eval(layer.conv, layer.norm)
            layer.norm = nn.Identity()


@register_model
def loda_conv_vit(
    pretrained: bool = False, *, widths: Sequence[int] = WIDTHS, folded: bool = True, **options: Any
) -> VisionTransformer:
    """Build the model, as ``timm.create_model("loda_conv_vit", ...)`` does.

    Parameters
    ----------
    pretrained
        Load the weights of a folder, ``local-dir:FOLDER``; there are none to download.
    widths
        Channels of the stem at a half and at a quarter of the image's side.
    folded
        Without batch normalisation, which is worked into the convolutions once it is trained.
    options
        Those of timm's VisionTransformer.
    """
    # timm passes these to find weights, which there are in a folder (local-dir:) only.
    place = options.pop("pretrained_cfg", None)
    for name in ("pretrained_cfg_overlay", "pretrained_model_args", "cache_dir"):
        options.pop(name, None)
    if pretrained and not place:
        msg = f"{NAME} has no weights to download: load them from a file."
        raise ValueError(msg)
    sizes = {"img_size": 32, "patch_size": STRIDE, "embed_dim": 192, "depth": 6, "num_heads": 6}
    stem = partial(ConvStem, widths=widths, folded=folded)
    if place:
        options.setdefault("num_classes", place["num_classes"])
    model = VisionTransformer(**{**sizes, **options}, embed_layer=stem)
    if pretrained:
        load_pretrained(model, place, num_classes=model.num_classes)
    return model
