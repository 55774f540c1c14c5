"""The recipe of the backbone glyphs: characters, the rejection of digits, training, the weights."""

import json
from pathlib import Path

import digit_rejection
import glyphs_vit
import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining import command_line
from safetensors import safe_open
from safetensors.torch import load_file

import training
from training.data import glyphs

WEIGHTS = Path(training.__file__).parent / "weights" / "glyphs_vit.safetensors"
MINIATURE = glyphs_vit.Recipe(
    seed=3, classes=12, unseen=10, steps=30, batch_size=32, warmup=5, threads=1
)


@pytest.fixture(scope="module")
def classes() -> glyphs.Glyphs:
    return digit_rejection.glyph_classes(40, seed=11)


@pytest.fixture(scope="module")
def shipped() -> torch.nn.Module:
    """Build the backbone from the file's own metadata, as a user of the file has to."""
    with safe_open(WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    options = json.loads(metadata["timm_options"])
    model = timm.create_model(metadata["timm_model"], pretrained=False, **options)
    model.load_state_dict(load_file(WEIGHTS), strict=True)
    return model.eval()


def jittered_digits(amount: float, copies: int) -> tuple[glyphs.Glyphs, np.ndarray]:
    """Return the digit templates with moved vertices, and the digit that each is."""
    shapes = digit_rejection.digit_strokes()
    flat = glyphs.pack([shape for variants in shapes.values() for shape in variants])
    digit = np.repeat([d for d, variants in shapes.items() for _ in variants], copies)
    points = np.repeat(flat.points, copies, axis=0)
    noise = np.random.default_rng(5).normal(0, amount, size=points.shape)
    return glyphs.Glyphs(points + noise, np.repeat(flat.arcs, copies, axis=0)), digit


# Drawing


def test_instances_are_block_counts_of_varied_handwriting(classes: glyphs.Glyphs) -> None:
    one = classes.take(np.zeros(50, dtype=int))
    counts = glyphs_vit.handwrite(one, np.random.default_rng(0))
    assert counts.shape == (50, 8, 8)
    assert counts.dtype == np.uint8
    assert counts.max() == 16
    assert counts.min() == 0
    assert len(np.unique(counts.reshape(50, -1), axis=0)) == 50


def test_instances_depend_on_the_generator_alone(classes: glyphs.Glyphs) -> None:
    first, again = (glyphs_vit.handwrite(classes, np.random.default_rng(7)) for _ in range(2))
    other = glyphs_vit.handwrite(classes, np.random.default_rng(8))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_package_passes_pixels_from_zero_to_one(classes: glyphs.Glyphs) -> None:
    images = glyphs_vit.write(classes, np.arange(40), np.random.default_rng(0))
    counts = glyphs_vit.handwrite(classes, np.random.default_rng(0))
    assert images.shape == (40, 1, 8, 8)
    np.testing.assert_array_equal(images[:, 0].numpy() * 16, counts)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.floats(1.0, 5.0))
def test_ink_is_every_pixel_centre_within_the_radius_of_a_dot(seed: int, radius: float) -> None:
    dots = np.random.default_rng(seed).uniform(-4, 36, size=(2, 5, 2)).astype(np.float32)
    grid = np.arange(32) + 0.5
    pixels = np.stack(np.meshgrid(grid, grid), axis=-1)
    distance = np.linalg.norm(dots[:, :, None, None] - pixels, axis=-1).min(axis=1)
    ink = glyphs.draw(dots.astype(np.float64), np.full(2, radius))
    clear = np.abs(distance - radius) > 1e-4  # rounding decides pixels on the rim
    np.testing.assert_array_equal(ink[clear], (distance <= radius)[clear])


def test_fitted_dots_fill_their_box_and_keep_their_aspect() -> None:
    dots = np.random.default_rng(0).uniform(size=(6, 9, 2)) * [1.0, 3.0]
    fitted = glyphs.fit(dots, np.full((6, 2), 20.0), np.full((6, 2), 16.0))
    before, after = np.ptp(dots, axis=1), np.ptp(fitted, axis=1)
    np.testing.assert_allclose(after.max(axis=1), 20.0)
    np.testing.assert_allclose(after[:, 0] / after[:, 1], before[:, 0] / before[:, 1])
    np.testing.assert_allclose((fitted.min(axis=1) + fitted.max(axis=1)) / 2, 16.0)


def test_arcs_are_bezier_curves_and_padding_adds_no_ink() -> None:
    start, pull, end = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    dots = glyphs.trace(*glyphs.pack([[np.array([start, pull, end])]]))[0]
    t = np.linspace(0, 1, glyphs.DOTS)[:, None]
    curve = (1 - t) * ((1 - t) * start + t * pull) + t * ((1 - t) * pull + t * end)  # de Casteljau
    np.testing.assert_allclose(dots.reshape(-1, glyphs.DOTS, 2) - curve, 0, atol=1e-12)


def test_strokes_that_are_no_arcs_are_refused() -> None:
    bar = digit_rejection.line((0, 0), (0, 1))
    with pytest.raises(ValueError, match=r"2 k \+ 1"):
        glyphs.pack([[bar[:2]]])
    with pytest.raises(ValueError, match="more than 8 arcs"):
        glyphs.pack([[bar] * 9])
    with pytest.raises(ValueError, match="no stroke"):
        glyphs.pack([[]])


# No digits


def test_every_drawn_digit_is_rejected_in_any_usual_hand() -> None:
    shapes, digit = jittered_digits(0.04, 30)
    rejected = digit_rejection.digit_likeness(shapes) > digit_rejection.DIGIT_CORRELATION
    for value in range(10):
        assert rejected[digit == value].mean() > 0.97, value


@pytest.mark.parametrize("width", [0.55, 1.3])
@pytest.mark.parametrize("slant", [-0.2, 0.1])
def test_stretched_and_slanted_digits_are_rejected(width: float, slant: float) -> None:
    shapes, _ = jittered_digits(0.02, 5)
    plane = np.array([[width, 0.0], [slant, 1.0]])
    moved = glyphs.Glyphs(3 * shapes.points @ plane - 2, shapes.arcs)
    assert (digit_rejection.digit_likeness(moved) > digit_rejection.DIGIT_CORRELATION).mean() > 0.97


def test_no_glyph_class_looks_like_a_digit_or_like_another_class() -> None:
    drawn = digit_rejection.glyph_classes(300, seed=1)
    assert digit_rejection.digit_likeness(drawn).max() <= digit_rejection.DIGIT_CORRELATION
    pictures = glyphs.pictures(drawn)
    alike = pictures @ pictures.T - np.eye(300)
    assert alike.max() <= glyphs.TWIN_CORRELATION


def test_the_rejection_bites_and_leaves_other_shapes() -> None:
    rng = np.random.default_rng(0)
    drawn = glyphs.pack([glyphs.random_glyph(rng) for _ in range(500)])
    share = (digit_rejection.digit_likeness(drawn) > digit_rejection.DIGIT_CORRELATION).mean()
    assert 0.2 < share < 0.8


def test_more_classes_begin_with_the_same_classes(classes: glyphs.Glyphs) -> None:
    few = digit_rejection.glyph_classes(15, seed=11)
    np.testing.assert_array_equal(few.points, classes.points[:15])
    assert (digit_rejection.glyph_classes(15, seed=12).points != few.points).any()


def test_impossible_class_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        digit_rejection.glyph_classes(0, seed=0)


# The recipe


def test_the_same_recipe_gives_the_same_weights_bit_for_bit_and_learns(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    results = [glyphs_vit.train(MINIATURE, episodes=2) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    for index, result in enumerate(results):
        glyphs_vit.save(result, MINIATURE, tmp_path / f"{index}.safetensors")
    first, again = (load_file(tmp_path / f"{index}.safetensors") for index in range(2))
    assert first.keys() == again.keys() == glyphs_vit.build().state_dict().keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    losses = results[0].losses
    assert losses == results[1].losses
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    assert results[0].held_out > 2 / MINIATURE.classes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_the_command_line_writes_what_its_metadata_says_and_replaces_only_if_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "weights.safetensors"
    words = command_line(glyphs_vit.PROGRAM, MINIATURE).split()[2:]
    glyphs_vit.main(["--out", str(out), *words, "--steps", "2", "--episodes", "1"])
    assert "673440 parameters" in capsys.readouterr().out
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["seed"] == "3"
    assert "--steps 2 " in metadata["recipe"]
    before = out.read_bytes()
    with pytest.raises(SystemExit):
        glyphs_vit.main(["--out", str(out), *words, "--steps", "1"])
    assert "exists" in capsys.readouterr().err
    assert out.read_bytes() == before
    glyphs_vit.main(["--out", str(out), *words, "--steps", "1", "--episodes", "1", "--overwrite"])
    assert out.read_bytes() != before


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    recipe = glyphs_vit.Recipe(steps=100, warmup=10)
    rates = [glyphs_vit.rate(step, recipe) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[-1] == pytest.approx(0.0)


def test_episodes_need_enough_classes(classes: glyphs.Glyphs) -> None:
    with pytest.raises(ValueError, match="10-way episodes need 10 classes, got 9"):
        glyphs_vit.few_shot_accuracy(glyphs_vit.build(), classes.take(slice(9)), seed=0, episodes=1)


# The shipped weights


def test_the_shipped_file_is_small_and_says_how_it_was_made(shipped: torch.nn.Module) -> None:
    assert WEIGHTS.stat().st_size <= 4_000_000
    assert sum(p.numel() for p in shipped.parameters()) <= 1_000_000
    with safe_open(WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["timm_model"] == glyphs_vit.TIMM_MODEL
    assert json.loads(metadata["timm_options"]) == glyphs_vit.TIMM_OPTIONS
    assert metadata["pixels"] == "[0,1]"
    # The file was written when the recipe was a module of the package, under another command.
    settings = command_line(glyphs_vit.PROGRAM, glyphs_vit.Recipe()).partition(" --")[2]
    assert metadata["recipe"].partition(" --")[2] == settings
    assert all(torch.isfinite(tensor).all() for tensor in shipped.state_dict().values())


def test_shipped_features_tell_new_classes_apart(shipped: torch.nn.Module) -> None:
    """Glyphs of another seed, in no list of the recipe: far above chance (0.1) and raw pixels."""
    new = digit_rejection.glyph_classes(60, seed=987)
    trained = glyphs_vit.few_shot_accuracy(shipped, new, seed=1, episodes=20)
    raw = glyphs_vit.few_shot_accuracy(torch.nn.Flatten(), new, seed=1, episodes=20)
    assert trained > 0.95
    assert trained > raw + 0.03
