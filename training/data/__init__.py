"""Class-incremental streams of images: the data sets, the class order, transforms and loaders.

Settings and data sets do not import torch; the rest is imported when it is first used.
"""

from typing import TYPE_CHECKING

from backends.lazy import load_on_use
from training.data.config import DataConfig
from training.data.datasets import DATA_SETS, DataSet, Split

if TYPE_CHECKING:
    from training.data.check import DataReport, check_data, verify_data
    from training.data.image_files import UnreadableImageError
    from training.data.images import ImageSet, open_image
    from training.data.loaders import Batches, loader
    from training.data.stream import Stream, build_stream
    from training.data.transforms import Transform, test_transform, train_transform

__all__ = [
    "DATA_SETS",
    "Batches",
    "DataConfig",
    "DataReport",
    "DataSet",
    "ImageSet",
    "Split",
    "Stream",
    "Transform",
    "UnreadableImageError",
    "build_stream",
    "check_data",
    "loader",
    "open_image",
    "test_transform",
    "train_transform",
    "verify_data",
]

__getattr__, __dir__ = load_on_use(
    __name__, __all__, ["transforms", "image_files", "images", "stream", "loaders", "check"]
)
