"""Data sets of the Hugging Face library itself; what stands in for it is in test_data_sources."""

from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import CLASSES, folder, grow

from training.config import DataConfig
from training.data import build_stream, loader, train_transform

datasets = pytest.importorskip("datasets", reason="pip install 'loda[hf]' for its data sets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    for place in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{place}.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def by_library(place: Path, cache: Path, **settings: Any) -> DataConfig:
    return DataConfig(
        name="timm",
        dataset=f"hfds/{place}",
        root=str(cache),
        **{"test_split": "test", "resize": 8, "image_size": 8, **settings},
    )


def same_images(ours: DataConfig, theirs: DataConfig) -> None:
    one, other = build_stream(ours, 2), build_stream(theirs, 2)
    assert (one.class_names, one.order) == (other.class_names, other.order)
    for a, b in ((one.train, other.train), (one.test, other.test)):
        assert torch.equal(a.labels, b.labels)
        assert all(torch.equal(x, y) for (x, _), (y, _) in zip(a, b, strict=True))


def test_image_folders_are_those_of_our_own(tmp_path: Path) -> None:
    root = grow(tmp_path / "Images", {"train": 2, "test": 1})  # names keep their capitals
    theirs = by_library(root, tmp_path / "cache")
    same_images(folder(root), theirs)
    images = build_stream(theirs, 2).train.with_transform(train_transform(theirs))
    found = [labels for _, labels in loader(images, 4, shuffle=False, seed=0)]
    assert torch.cat(found).bincount().tolist() == [2] * len(CLASSES)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Files of rows, whose columns have names of their own."""
    root = grow(tmp_path / "tree", {"train": 2, "test": 1})
    (tmp_path / "table").mkdir()
    kinds = datasets.ClassLabel(names=CLASSES)
    features = datasets.Features({"img": datasets.Image(), "fine_label": kinds})
    for split in ("train", "test"):
        paths = sorted((root / split).rglob("*.png"))
        columns = {
            "img": [{"bytes": path.read_bytes(), "path": None} for path in paths],
            "fine_label": [CLASSES.index(path.parent.name) for path in paths],
        }
        rows = pyarrow.Table.from_pydict(columns, schema=features.arrow_schema)
        parquet.write_table(rows, tmp_path / "table" / f"{split}.parquet")
    return tmp_path / "table"


def test_columns_may_have_other_names(table: Path, tmp_path: Path) -> None:
    cache, columns = tmp_path / "cache", {"image_key": "img", "label_key": "fine_label"}
    same_images(folder(tmp_path / "tree"), by_library(table, cache, **columns))
    for key in columns:  # the other one is left out
        lost = "label" if key == "image_key" else "image"
        said = rf"has no column {lost}; it has img, fine_label: name one by data\.{lost}_key"
        with pytest.raises(ValueError, match=said):
            build_stream(by_library(table, cache, **{key: columns[key]}), 0)
