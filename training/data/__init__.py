"""Class-incremental streams of images: the data sets, the class order, transforms and loaders."""

from training.data.dataset import ImageSet, loader
from training.data.images import UnreadableImageError, open_image
from training.data.stream import Stream, build_stream
from training.data.transforms import Transform, test_transform, train_transform

__all__ = [
    "ImageSet",
    "Stream",
    "Transform",
    "UnreadableImageError",
    "build_stream",
    "loader",
    "open_image",
    "test_transform",
    "train_transform",
]
