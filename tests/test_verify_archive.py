"""The verifier of files: what it says, with which exit status, and what it needs."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from strategies import to_library

from loda_math import general_subspace, isolated_subspace, merge, recalibration, rounding_unit
from loda_math.verify import (
    Check,
    LayerSettings,
    read_archive,
    verification_table,
    verify_archive,
    verify_layer,
)
from loda_math.verify.__main__ import main
from loda_math.verify.archive import require_plausible_archive

SETTINGS = LayerSettings(
    down_scale=0.5, general_weight=1.0, ridge=1e-2, form="full", gamma=1.5, isolated_weight=2.0
)


def solved(seed: int = 0, rules: LayerSettings = SETTINGS) -> dict[str, np.ndarray]:
    """Bases, Λ and a merge of one layer, all right."""
    rng = np.random.default_rng(seed)
    new, old, trained = (x.T @ x / 30 for x in rng.standard_normal((3, 30, 6)))
    general = rules.down_scale * general_subspace(new, old, 3).T
    isolated = rules.down_scale * isolated_subspace(new, old, 2, ridge=rules.ridge).T
    ups, before = [rng.standard_normal((4, r)) for r in (3, 2)], rng.standard_normal((4, 6))
    c = recalibration(ups[0], general, trained, old, rules.gamma, rules.form)
    after = merge(before, rules.general_weight * ups[0], general, c)
    after = merge(after, rules.isolated_weight * ups[1], isolated)
    return {
        "moment_new": new,
        "moment_old": old,
        "moment_new_trained": trained,
        "A_general": general,
        "B_general": ups[0],
        "A_isolated": isolated,
        "B_isolated": ups[1],
        "coefficients": c,
        "weight_before": before,
        "weight_after": after,
    }


def write(path: Path, *layers: dict[str, np.ndarray], **settings: Any) -> str:
    said = vars(SETTINGS) | settings
    named = {
        f"task2/block{i}/{name}": x for i, layer in enumerate(layers) for name, x in layer.items()
    }
    np.savez(path, settings=json.dumps(said), **named)
    return str(path)


def verdicts(path: Path, arrays: dict[str, np.ndarray], **settings: Any) -> dict[str, bool]:
    """What is said of one layer in a file that says only these settings."""
    said = {"settings": json.dumps(settings)} if settings else {}
    np.savez(path, **said, **{f"1/block0.qkv/{name}": x for name, x in arrays.items()})
    return {check.what: check.passed for check in verify_archive(path)}


def test_right_layers_pass_with_status_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.npz", solved(0), solved(1))
    assert main([path]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("8 of 8 checks passed\n")
    assert err == ""


@pytest.mark.parametrize(
    "name", ["A_general", "A_isolated", "coefficients", "moment_old", "weight_after"]
)
def test_one_wrong_layer_fails_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    wrong = solved(1)
    wrong[name] = wrong[name] + 0.3 * np.eye(*wrong[name].shape)
    assert main([write(tmp_path / "a.npz", solved(0), wrong)]) == 1
    out = capsys.readouterr().out
    assert "OFF" in out
    assert all("block1" in line for line in out.splitlines() if line.endswith("OFF"))
    # The fault is a third of the scale; who tolerates that lets it pass.
    assert main([write(tmp_path / "a.npz", solved(0), wrong), "--tolerance", "10"]) == 0


def test_settings_travel_with_the_arrays(tmp_path: Path) -> None:
    path, published = tmp_path / "a.npz", LayerSettings()  # those of a file that says none
    arrays = solved(0, published)
    names = ["general", "isolated", "Λ direction", "merge"]
    assert verdicts(path, arrays) == dict.fromkeys(names, True)
    assert verdicts(path, arrays, **vars(published)) == verdicts(path, arrays)
    # A fused layer may call its weight by what it is.
    renamed = {name.replace("weight_", "qkv_"): x for name, x in arrays.items()}
    assert verdicts(path, renamed) == verdicts(path, arrays)
    assert not verdicts(path, arrays, gamma=1.5)["Λ direction"]
    assert not verdicts(path, arrays, form="full")["Λ full"]
    assert not verdicts(path, arrays, down_scale=1.0)["general"]
    assert not verdicts(path, arrays, ridge=1.0)["isolated"]
    # As on single-precision tokens, the least energies are rounding, and R is regularised.
    assert all(verdicts(path, arrays, accumulation_eps=1e-7).values())
    given = [arrays[k] for k in ("B_general", "A_general", "moment_new_trained", "moment_old")]
    full = {"coefficients": recalibration(*given, published.gamma)}
    verdict = verdicts(path, arrays | full, form="full")
    assert verdict["Λ full"]
    assert not verdict["merge"]  # the weights were merged with other coefficients


def test_the_moment_at_the_merge_may_differ_from_that_of_the_choice(tmp_path: Path) -> None:
    arrays = solved(0, LayerSettings())
    later = arrays["moment_old"] + 0.5 * np.eye(6)
    verdict = verdicts(tmp_path / "a.npz", arrays | {"moment_old_at_merge": later})
    assert [what for what, passed in verdict.items() if not passed] == ["Λ direction"]
    del arrays["coefficients"]  # they are found from the weights, which then are wrong as well
    verdict = verdicts(tmp_path / "a.npz", arrays | {"moment_old_at_merge": later})
    assert [what for what, passed in verdict.items() if not passed] == ["Λ direction", "merge"]


def damaged(tmp_path: Path) -> dict[str, str]:
    """Files that cannot be checked, by what is wrong with them."""
    whole = Path(write(tmp_path / "whole.npz", solved())).read_bytes()
    files = {"empty": b"", "text": b"hello\n", "cut": whole[: len(whole) // 2]}
    middle = len(whole) // 2
    files["scrambled"] = whole[:middle] + bytes(255 - x for x in whole[middle:])
    for name, content in files.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    np.savez(tmp_path / "objects.npz", **{"1/a/moment_new": np.asarray([{}], dtype=object)})
    np.savez(tmp_path / "nothing.npz", other=np.eye(2))
    for name, text in {"list": "[]", "no json": "{oops"}.items():
        np.savez(tmp_path / f"{name}.npz", settings=text, **{"1/a/moment_new": np.eye(2)})
    layers = {
        "shapes": {"moment_old": np.eye(5)},
        "width": {"A_general": np.eye(3, 5)},
        "rank": {"B_isolated": np.ones((4, 3))},
        "batch": {"moment_new": np.eye(6)[None].repeat(2, 0)},
        "square": {"coefficients": np.eye(2)},
        "text array": {"moment_new": np.asarray("x")},
    }
    for name, changed in layers.items():
        write(tmp_path / f"{name}.npz", solved() | changed)
    for name in ("A_general", "A_isolated"):
        write(tmp_path / f"without {name}.npz", {k: x for k, x in solved().items() if k != name})
    write(tmp_path / "only moments.npz", {"moment_new": np.eye(6)})
    write(tmp_path / "unknown.npz", solved(), colour=1)
    write(tmp_path / "word.npz", solved(), ridge="x")
    write(tmp_path / "null.npz", solved(), isolated=None)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1/a/moment_new.npy", b"no array")
        archive.infolist()[0].file_size = 2**31 - 2  # what it says of itself
    return {x.stem: str(x) for x in (*tmp_path.glob("*.npz"), tmp_path / "missing.npz")}


def test_a_bad_file_is_one_clear_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = damaged(tmp_path)
    assert main([files.pop("whole")]) == 0
    capsys.readouterr()
    for name, path in files.items():
        assert main([path]) == 2, name
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert f"{name}.npz" in err
        with pytest.raises((ValueError, FileNotFoundError), match="npz"):
            verify_archive(path)
    with pytest.raises(ValueError, match="unpack"):
        read_archive(tmp_path / "bomb.npz")
    with pytest.raises(ValueError, match="colour"):
        read_archive(tmp_path / "unknown.npz")
    assert main([write(tmp_path / "a.npz", solved()), "--tolerance", "0"]) == 2
    assert "tolerance" in capsys.readouterr().err


def test_what_is_not_asked_for_is_not_unpacked(tmp_path: Path) -> None:
    path, unsafe = Path(write(tmp_path / "a.npz", solved())), tmp_path / "more.npy"
    np.save(unsafe, np.asarray([{}], dtype=object))  # refused as soon as it is read
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.write(unsafe, "task2/block0/more.npy")
    with np.load(path) as content, pytest.raises(ValueError, match="allow_pickle"):
        content["task2/block0/more"]
    assert all(check.passed for check in verify_archive(path))


def test_archives_that_unpack_to_far_more_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "sound.npz", a=np.arange(10))
    require_plausible_archive(tmp_path / "sound.npz")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(2**20))
        archive.infolist()[0].file_size = 2**31  # what the directory of the archive announces
    (tmp_path / "no.npz").write_bytes(b"no archive")
    for name in ("bomb", "no"):
        with pytest.raises(ValueError, match="archive"):
            require_plausible_archive(tmp_path / f"{name}.npz")


def test_nothing_but_numpy_and_the_mathematics_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", solved())
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('loda_math.verify', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, path],
        capture_output=True, text=True, cwd=root, check=True,
    )  # fmt: skip
    assert "4 of 4 checks passed" in done.stdout
    assert not set(done.stdout.splitlines()[-1].split()) & {"torch", "jax", "training", "backends"}


def test_a_layer_of_any_library(xp: ModuleType) -> None:
    arrays = {name: to_library(xp, x, "float32") for name, x in solved().items()}
    checks = verify_layer(arrays, SETTINGS)
    assert [c.what for c in checks] == ["general", "isolated", "Λ full", "merge"]
    assert all(c.passed for c in checks)
    assert all(0 < share < 1 for c in checks[:2] for share in (c.new, c.old))
    # Without Λ it is recovered from the weights.
    del arrays["coefficients"]
    assert [c.passed for c in verify_layer(arrays, SETTINGS)] == [True] * 4
    arrays["weight_after"] = arrays["weight_before"]
    assert [c.passed for c in verify_layer(arrays, SETTINGS)] == [True, True, False, False]


def test_a_direction_that_holds_only_rounding_is_nobodys_mistake() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((500, 4))
    inputs[:, 3] = inputs[:, 0] + 1e-5 * inputs[:, 3]
    single = inputs.astype(np.float32)
    moment = (single.T @ single / 500).astype(np.float64)
    # A sound direction, and one along which both channels agree but for rounding.
    down = np.array([[0.0, 1, 0, 0], [0.5**0.5, 0, 0, -(0.5**0.5)]])
    up, eps = rng.standard_normal((3, 2)), rounding_unit(single)
    settings = replace(SETTINGS, general_weight=1.0, accumulation_eps=eps)
    solved = recalibration(up, down, moment, moment, 1.5, accumulation_eps=eps)
    arrays = {"moment_old": moment, "moment_new_trained": moment, "B_general": up}
    arrays |= {"A_general": down, "coefficients": solved, "moment_new": moment}
    verdicts = {c.what: c.passed for c in verify_layer(arrays, settings)}
    assert verdicts["Λ full"]
    blind = recalibration(up, down, moment, moment, 1.5, accumulation_eps=0.0)
    checks = verify_layer(arrays | {"coefficients": blind}, replace(settings, accumulation_eps=0.0))
    assert {c.what: c.passed for c in checks}["Λ full"]
    checks = verify_layer(arrays, replace(settings, accumulation_eps=0.0))
    assert not {c.what: c.passed for c in checks}["Λ full"]


def test_the_first_task_has_one_branch_and_no_recalibration(xp: ModuleType) -> None:
    arrays = solved()
    arrays["A_general"] = 0.5 * general_subspace(arrays["moment_new"], None, 3).T
    arrays["weight_after"] = arrays["weight_before"] + arrays["B_general"] @ arrays["A_general"]
    for name in ("coefficients", "B_isolated", "A_isolated"):
        del arrays[name]
    arrays["A_general_init"] = arrays["A_general"]
    for old in (np.zeros((6, 6)), None):
        given = {name: x for name, x in (arrays | {"moment_old": old}).items() if x is not None}
        checks = verify_layer({n: to_library(xp, x, "float32") for n, x in given.items()}, SETTINGS)
        assert [(c.what, c.passed) for c in checks] == [("general", True), ("merge", True)]


def test_layers_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    layers = ("2/block10/x", "2/block9/x", "10/block1/x", "2/Block1/x")
    named = {f"task{layer}/moment_new": np.eye(2) for layer in layers}
    np.savez(tmp_path / "a.npz", **named)
    places = ["/".join(place) for place in read_archive(tmp_path / "a.npz").layers]
    order = ("2/Block1/x", "2/block9/x", "2/block10/x", "10/block1/x")
    assert [place.removeprefix("task") for place in places] == list(order)


def test_the_table_names_every_number() -> None:
    checks = [
        Check("general", True, 1e-9, 2e-8, 3e-7, 0.5, 0.25, 4, task="1", layer="a.b"),
        Check("merge", False, None, 1e-2, None, task="12", layer="c"),
    ]
    assert verification_table(checks).split("\n") == [
        "task  layer  what      defect  residual      gap     new     old  rank  verdict",
        "1     a.b    general  1.0e-09   2.0e-08  3.0e-07  0.5000  0.2500     4       ok",
        "12    c      merge              1.0e-02                                     OFF",
        "1 of 2 checks passed",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("down_scale", 0.0),
        ("general_weight", -1.0),
        ("isolated_weight", -1.0),
        ("ridge", -1e-3),
        ("gamma", float("nan")),
        ("history_weight", float("inf")),
        ("energy_floor", 1.5),
        ("accumulation_eps", 0.5),
        ("isolated", "Quotient"),
        ("ridge_scale", "median"),
        ("form", "whole"),
        ("joint", "yes"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be") as error:
        LayerSettings(**{name: value})
    assert str(value) in str(error.value)


def test_a_floor_belongs_to_the_ratio_of_traces() -> None:
    assert LayerSettings(isolated="trace_ratio", energy_floor=0.4).energy_floor == 0.4
    for rule in ("quotient", "null"):
        with pytest.raises(ValueError, match="energy_floor"):
            LayerSettings(isolated=rule, energy_floor=0.4)


def test_names_in_a_file_do_not_reach_the_terminal_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = "a\x1b[2K\r\u202eb"
    np.savez(tmp_path / "f.npz", **{f"1/{layer}/{k}": v for k, v in solved().items()})
    main([str(tmp_path / "f.npz")])
    printed = "".join(capsys.readouterr())
    assert "\\x1b[2K" in printed
    assert all(line.isprintable() for line in printed.splitlines())
