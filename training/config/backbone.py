"""The section ``backbone`` of an experiment."""

from dataclasses import dataclass, field
from typing import Any

PACKAGED_WEIGHTS = {"glyphs": "glyphs_vit.safetensors", "cifar_vit": "cifar_vit.safetensors"}
"""Files of the backbones that come with the package, by the name of the backbone."""

HUGGING_FACE = "hf:"
"""What the name of a backbone starts with that the library transformers builds."""

_KEEP_WEIGHTS = {
    "cache_dir",
    "dynamic_img_pad",
    "dynamic_img_size",
    "img_size",
    "in_chans",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "strict_img_size",
}
"""Options of timm, beside drop rates, under which it still loads every pretrained weight."""


@dataclass
class BackboneConfig:
    """The frozen, pretrained network.

    Parameters
    ----------
    name
        glyphs or cifar_vit (in the package, no download), the name of any timm model, or
        hf:ORGANISATION/NAME or hf:FOLDER for a vision transformer of transformers.
    weights
        A local .safetensors, .pth or .npz file with the weights; its classifier is dropped.
    options
        Further arguments for timm.create_model, such as {img_size: 32, in_chans: 1}. Those that
        change the architecture need weights, or pretrained false.
    pretrained
        Start from pretrained weights, which timm downloads if no file is given; else random ones.
    """

    name: str = "glyphs"
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = True

    def __post_init__(self) -> None:
        # By the last three timm would be told of files and addresses to read weights from.
        forbidden = {"num_classes", "pretrained", "checkpoint_path", "cache_dir"}
        reserved = (forbidden | {"pretrained_cfg", "pretrained_cfg_overlay"}) & set(self.options)
        if reserved:
            msg = (
                f"backbone.options must not hold {sorted(reserved)}: the classifier is always left "
                "out, and weights are chosen by backbone.weights and backbone.pretrained."
            )
            raise ValueError(msg)
        if self.weights is not None and not self.pretrained:
            msg = "backbone.weights is given, but backbone.pretrained is false: set one of them."
            raise ValueError(msg)
        if self.name in PACKAGED_WEIGHTS and (self.weights is not None or self.options):
            msg = (
                f"backbone.name {self.name} comes with its own weights and options: to use others, "
                "give the name of a timm model, for instance --backbone.name vit_tiny_patch16_224."
            )
            raise ValueError(msg)
        if self.name.startswith(HUGGING_FACE) and (self.weights is not None or self.options):
            msg = (
                f"backbone.name {self.name} takes weights and options from its own files: leave "
                "out backbone.weights and backbone.options, or name a timm model."
            )
            raise ValueError(msg)
        # timm would download the weights first, and then drop or leave random what does not match.
        changing = sorted(k for k in self.options if k not in _KEEP_WEIGHTS and "drop" not in k)
        if changing and self.pretrained and self.weights is None:
            msg = (
                f"backbone.options {changing} change the architecture of {self.name}, which timm's "
                "pretrained weights do not fit: give a file with weights for it as "
                "--backbone.weights FILE, or start from random ones by --backbone.pretrained false."
            )
            raise ValueError(msg)
