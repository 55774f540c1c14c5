"""The recipe of drawings: every style, the same drawings again, nothing lost, clear refusals."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import renditions
from PIL import Image


def write_photos(root: Path, count: int = 24) -> None:
    """A bright disc on a darker ground, of other colours and another size in each photo."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    for number in range(count):
        place = root / "train" / ("altar", "beacon")[number % 2] / f"{number:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        inside = (rows - 16) ** 2 + (columns - 16) ** 2 < rng.integers(36, 144)
        colours = rng.integers(0, 90, 3), rng.integers(160, 256, 3)
        pixels = np.where(inside[..., None], colours[1], colours[0]).astype(np.uint8)
        Image.fromarray(pixels).save(place)


def drawings(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.png")}


def test_a_folder_of_drawings_has_the_names_of_the_photos_and_is_the_same_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    for out in ("first", "second"):
        renditions.main([str(photos), "--out", str(tmp_path / out)])
        assert "24" in capsys.readouterr().out
    first, before = drawings(tmp_path / "first"), drawings(photos)
    assert first.keys() == before.keys()
    assert first == drawings(tmp_path / "second")
    assert not [name for name in before if first[name] == before[name]]


def test_every_class_has_every_style() -> None:
    for name in ("altar", "beacon"):
        styles = [renditions.style(f"train/{name}/{number:03}.jpg") for number in range(400)]
        assert {style: styles.count(style) > 60 for style in renditions.STYLES} == dict.fromkeys(
            renditions.STYLES, True
        )


@pytest.mark.parametrize("style", renditions.STYLES, ids=lambda style: style.__name__)
def test_a_style_keeps_size_and_outline_and_loses_colours(
    style: Callable[[Image.Image], Image.Image], tmp_path: Path
) -> None:
    write_photos(tmp_path, 1)
    photo = Image.open(tmp_path / "train" / "altar" / "00.png").convert("RGB")
    noisy = np.asarray(photo) + np.random.default_rng(1).integers(0, 12, (32, 32, 3))
    drawn = style(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    pixels = np.asarray(drawn.convert("RGB")).astype(int)
    assert pixels.shape == (32, 32, 3)
    many = len(np.unique(noisy.reshape(-1, 3), axis=0))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) < many
    # The edge of the disc is the strongest step of the photo, and is there in the drawing.
    steps = np.abs(np.diff(pixels.sum(2), axis=1))
    edge = np.abs(np.diff(np.asarray(photo).astype(int).sum(2), axis=1)) > 0
    near = edge | np.roll(edge, 1, 1) | np.roll(edge, -1, 1)
    assert steps[near].mean() > 2 * steps[~near].mean()


def test_nothing_is_overwritten_and_a_run_that_fails_leaves_nothing_that_looks_whole(
    tmp_path: Path,
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    write_photos(photos)
    out.mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        renditions.write(photos, out)
    out.rmdir()
    (photos / "train" / "beacon" / "99.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"99\.png"):
        renditions.write(photos, out)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    (photos / "train" / "beacon" / "99.png").unlink()
    assert renditions.write(photos, out) == 24
    Image.new("RGB", (32, 32)).save(photos / "train" / "altar" / "00.jpg")
    with pytest.raises(FileExistsError, match="another image"):
        renditions.write(photos, tmp_path / "other")


def test_a_folder_without_images_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        renditions.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "SPLIT/CLASS" in capsys.readouterr().err
