"""The section ``backbone`` of an experiment, and the kinds of networks that it may name.

The classes hold and check settings; `training.backbones.build`, imported when it is needed, builds
the networks.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from training.components import Component, Registry, at_least

if TYPE_CHECKING:
    from training.backbones.build import Backbone
    from training.backbones.preprocessing import Preprocessing

PACKAGED_WEIGHTS = {"glyphs": "glyphs_vit.safetensors", "cifar_vit": "cifar_vit.safetensors"}
"""Files of the backbones that come with the package, by the name of the backbone."""

HUGGING_FACE = "hf:"
"""Prefix of backbone names that the library transformers builds."""

# Options that would make timm add a classifier, or read weights from files or URLs.
_RESERVED = {
    "num_classes",
    "pretrained",
    "checkpoint_path",
    "cache_dir",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
}
# Options of timm, besides drop rates, with which it still loads every pretrained weight.
_KEEP_WEIGHTS = {"dynamic_img_pad", "dynamic_img_size", "img_size", "in_chans", "strict_img_size"}


@dataclass
class Packaged:
    """A small vision transformer that comes with the package.

    Parameters
    ----------
    name
        glyphs or cifar_vit.
    pretrained
        Start from its pretrained weights; otherwise from random ones.
    """

    name: str
    pretrained: bool = True

    def build(self, *, initialise: bool) -> "Backbone":
        """Build it; see `build_backbone`."""
        from training.backbones.build import build_packaged

        return build_packaged(
            PACKAGED_WEIGHTS[self.name], pretrained=self.pretrained and initialise
        )

    def preprocessing(self) -> "Preprocessing | None":
        """How it wants its images; see `preprocessing_of`."""
        from training.backbones.preprocessing import of_packaged

        return of_packaged(PACKAGED_WEIGHTS[self.name])


@dataclass
class HuggingFace:
    """A vision model of transformers.

    Parameters
    ----------
    name
        hf:ORGANISATION/NAME on the Hugging Face hub, or hf:FOLDER.
    pretrained
        Start from its pretrained weights; otherwise from random ones.
    image_size
        Side of the images in pixels, if not the model's own: its position embeddings are
        interpolated.
    """

    default_target: ClassVar[str] = "*att*.[qkv]_proj"
    """Layers that are adapted if ``method.target`` is left as it is: queries, keys and values."""

    name: str
    pretrained: bool = True
    image_size: int | None = None

    def __post_init__(self) -> None:
        at_least("backbone.image_size", self.image_size, 1)

    def build(self, *, initialise: bool) -> "Backbone":
        """Build it; see `build_backbone`."""
        from training.backbones.hugging_face import build_hugging_face

        return build_hugging_face(
            self.name, pretrained=self.pretrained and initialise, image_size=self.image_size
        )

    def preprocessing(self) -> "Preprocessing | None":
        """How it wants its images; see `preprocessing_of`."""
        from training.backbones.preprocessing import of_hugging_face

        return of_hugging_face(self.name, self.image_size)


@dataclass
class Timm:
    """A model of timm.

    Parameters
    ----------
    name
        The name of the model, with or without the tag of its weights; hf-hub:ORGANISATION/NAME or
        local-dir:FOLDER for one that timm saved.
    weights
        A local .safetensors, .pth, .bin or .npz file with the weights. Heads and decoders are left
        out, position embeddings are resized to img_size, the first layer is adapted to in_chans.
    options
        Further arguments of timm.create_model, such as {img_size: 32, in_chans: 1}. Options that
        change the architecture need weights, or pretrained false.
    pretrained
        Start from pretrained weights, which timm downloads if no file is given; otherwise from
        random ones.
    """

    name: str
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = True

    def __post_init__(self) -> None:
        reserved = sorted(_RESERVED & set(self.options))
        if reserved:
            msg = (
                f"backbone.options must not hold {reserved}: the classifier is always left out, "
                "and weights are chosen by backbone.weights and backbone.pretrained."
            )
            raise ValueError(msg)
        if self.weights is not None and not self.pretrained:
            msg = "backbone.weights is given, but backbone.pretrained is false: set one of them."
            raise ValueError(msg)
        # timm would download the weights and then drop, or leave random, all that do not match.
        changing = sorted(k for k in self.options if k not in _KEEP_WEIGHTS and "drop" not in k)
        if changing and self.pretrained and self.weights is None:
            msg = (
                f"backbone.options {changing} change the architecture, which timm's pretrained "
                "weights do not fit: give a file with weights for it as --backbone.weights FILE, "
                "or start from random ones by --backbone.pretrained false."
            )
            raise ValueError(msg)

    def build(self, *, initialise: bool) -> "Backbone":
        """Build it; see `build_backbone`."""
        from training.backbones.build import build_timm

        if not initialise:
            return build_timm(self.name, self.options)
        return build_timm(self.name, self.options, self.weights, pretrained=self.pretrained)

    def preprocessing(self) -> "Preprocessing | None":
        """How it wants its images; see `preprocessing_of`."""
        from training.backbones.preprocessing import of_timm

        return of_timm(self.name, self.options, self.weights)


def _by_library(name: str) -> str:
    kind = HuggingFace if name.startswith(HUGGING_FACE) else Timm
    return f"{kind.__module__}.{kind.__qualname__}"


BACKBONES = Registry(
    "backbone",
    dict.fromkeys(PACKAGED_WEIGHTS, f"{Packaged.__module__}.Packaged"),
    requires=("build",),
    group="loda.backbones",
    other=_by_library,
    families={"the name of a timm model": "vit_tiny_patch16_224"},
)


@dataclass
class BackboneConfig(Component):
    """The frozen, pretrained network.

    Parameters
    ----------
    name
        glyphs or cifar_vit (in the package, no download), the name of any timm model,
        hf-hub:ORGANISATION/NAME or local-dir:FOLDER for one that timm saved, hf:ORGANISATION/NAME
        or hf:FOLDER for a vision model of transformers, or the import path of a class with a
        function build.
    """

    registry = BACKBONES
    section = "backbone"

    name: str = "glyphs"

    def recorded(self) -> Self:
        """A copy with absolute paths, for the record of a run."""
        name, options = self.name, dict(self.options)
        kind, colon, place = name.partition(":")
        folder = Path(place).expanduser()
        if f"{kind}{colon}" in (HUGGING_FACE, "local-dir:") and folder.is_dir():
            name = f"{kind}:{folder.absolute()}"
        if isinstance(options.get("weights"), str):
            options["weights"] = str(Path(options["weights"]).expanduser().absolute())
        return replace(self, name=name, options=options)
