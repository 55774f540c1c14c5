"""The glyphs: characters of pen strokes, their pictures, and the data set of two alphabets."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from training.data import DataConfig, build_stream
from training.data.glyphs import (
    ALPHABETS,
    CHARACTER_CORRELATION,
    TEST_IMAGES,
    Drawings,
    Glyphs,
    bend,
    characters,
    distinct_glyphs,
    instances,
    paint,
    pictures,
)

# The generator and its two alphabets are frozen: results on record were measured on these images.
# Whoever changes one of them has to run the protocol of docs/protocol.md again.
STROKES = "210a0705efd2cb57b6733d7faea70d466a847752cda4f40aff5619c0f395aaee"
IMAGES = "4285227743f6c6cc1befbb9a91957722320335a35588b0cfa083f87a93566552"


def sha256(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


def some(count: int) -> Glyphs:
    return characters().take(slice(count))


def config(**options: object) -> DataConfig:
    return DataConfig(
        "glyphs", options, init_cls=8, increment=8, tasks=5, image_size=32, mean=0.5, std=0.5
    )


# The frozen images


def test_the_characters_are_the_frozen_ones() -> None:
    # Rounded: the last bit of a sine is not the same on every processor.
    assert sha256(characters().points.round(9) + 0.0, characters().arcs) == STROKES


def test_the_images_are_the_frozen_ones() -> None:
    counts = {"train": 60, "test": TEST_IMAGES}
    chosen = [instances(number, *item) for number in (0, 119, 120, 399) for item in counts.items()]
    assert sha256(*chosen) == IMAGES


def test_no_process_and_no_order_changes_an_image() -> None:
    code = (
        "import hashlib; from training.data.glyphs import instances\n"
        "print(hashlib.sha256(instances(7, 'test', 40).tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    instances(8, "train", 60)
    assert done.stdout.strip() == sha256(instances(7, "test", 40))


# The alphabets


def test_the_alphabets_share_no_character() -> None:
    choose, test = ALPHABETS["choose"], ALPHABETS["test"]
    assert not set(choose) & set(test)
    assert len(characters().points) == len(choose) + len(test)


def test_no_two_characters_look_alike_and_none_is_bare() -> None:
    rows = pictures(characters())
    alike = rows @ rows.T - 2 * np.eye(len(rows))
    assert alike.max() <= CHARACTER_CORRELATION
    assert min(len(np.unique(arcs, axis=0)) for arcs in characters().arcs) >= 5


def test_a_longer_list_begins_with_the_shorter_one() -> None:
    short, long = (
        distinct_glyphs(n, 3, lambda batch: np.ones(len(batch.points), dtype=bool)) for n in (5, 9)
    )
    np.testing.assert_array_equal(long.points[:5], short.points)
    with pytest.raises(ValueError, match="glyph"):
        distinct_glyphs(0, 3, lambda batch: np.ones(len(batch.points), dtype=bool))


# The images


def test_an_image_is_ink_on_a_ground_of_another_luminance() -> None:
    dots = bend(some(50), np.random.default_rng(0), 32)
    images = paint(dots, np.random.default_rng(1))
    assert images.shape == (50, 32, 32, 3)
    assert images.dtype == np.uint8
    # The same draws with strokes of no length give the grounds: ink is where the two differ.
    grounds = paint(dots * 0, np.random.default_rng(1))
    differs = np.abs(images.astype(int) - grounds).max(axis=3) > 40
    shares = differs.mean(axis=(1, 2))
    assert shares.min() > 0.02
    assert shares.max() < 0.6
    luminance = np.array([0.299, 0.587, 0.114])
    for image, ground, where in zip(images, grounds, differs, strict=True):
        step = (image[where].astype(float) - ground[where]) @ luminance
        assert abs(step.mean()) > 25


def test_all_ink_is_inside_the_image() -> None:
    dots = bend(some(50), np.random.default_rng(0), 32)
    images = paint(dots, np.random.default_rng(1)).astype(int)
    grounds = paint(dots * 0, np.random.default_rng(1)).astype(int)
    changed = (np.abs(images - grounds) > 0).any(axis=3)
    corners = changed[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() < 0.05


def test_instances_of_a_character_are_all_different_and_so_are_the_splits() -> None:
    train, test = instances(3, "train", 240), instances(3, "test", 40)
    both = np.concatenate([train, test]).reshape(len(train) + len(test), -1)
    assert len(np.unique(both, axis=0)) == 280


# The data set


def test_the_stream_has_the_images_of_its_characters() -> None:
    stream = build_stream(config(alphabet="test", images=30), seed=0)
    assert [len(task) for task in stream.tasks] == [8] * 5
    assert len(stream.train) == 40 * 30
    assert len(stream.test) == 40 * TEST_IMAGES
    name = stream.class_names[17]
    alphabet, _, number = name.partition("-")
    assert alphabet == "test"
    of_class = stream.test.subset([17])
    shown = torch.stack([image for image, _ in of_class])
    expected = instances(ALPHABETS["test"][int(number)], "test", TEST_IMAGES)
    assert torch.equal(shown, torch.from_numpy(expected))


def test_a_seed_chooses_the_characters_and_twenty_tasks_have_those_of_five() -> None:
    five, other = (build_stream(config(), seed=seed) for seed in (11, 12))
    assert set(five.class_names) != set(other.class_names)
    assert all(name.startswith("choose-") for name in five.class_names)
    twenty = DataConfig("glyphs", init_cls=2, increment=2, tasks=20, image_size=32)
    assert build_stream(twenty, seed=11).class_names == five.class_names


def test_an_unknown_alphabet_is_refused() -> None:
    with pytest.raises(ValueError, match="alphabet"):
        config(alphabet="latin")


def test_a_stream_without_training_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.images"):
        config(images=0)


def test_drawings_end_where_their_alphabet_does() -> None:
    drawings = Drawings(range(2), "train", 60)
    assert len(drawings) == 2 * 60
    assert torch.equal(drawings[119], torch.from_numpy(instances(1, "train", 60)[-1]))
    with pytest.raises(IndexError):
        drawings[len(drawings)]
