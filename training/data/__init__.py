"""Class-incremental streams of images: the data sets, the class order, transforms and loaders."""

from training.data.batches import Batches, cut_loader, loader, passes_begun, start_at
from training.data.check import DataReport, check_data, verify_data
from training.data.dataset import ImageSet
from training.data.decode import UnreadableImageError, open_image
from training.data.stream import Stream, build_stream
from training.data.transforms import Transform, test_transform, train_transform
from training.distributed import Share

__all__ = [
    "Batches",
    "DataReport",
    "ImageSet",
    "Share",
    "Stream",
    "Transform",
    "UnreadableImageError",
    "build_stream",
    "check_data",
    "cut_loader",
    "loader",
    "open_image",
    "passes_begun",
    "start_at",
    "test_transform",
    "train_transform",
    "verify_data",
]
