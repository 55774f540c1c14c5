"""The file of a sweep: what it may say, and what is refused with a reason."""

from pathlib import Path

import pytest
from small_sweeps import sweep_file

from training.sweeps import Job, packaged_sweeps, plan, read_groups, read_sweep, write_groups


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "found list"),
        ({"variants": ["loda"]}, "has variants and seeds"),
        ({"variants": ["loda"], "seeds": [1], "seed": 1}, "found"),
        ({"variants": {}, "seeds": [1]}, "variants is"),
        ({"variants": {"../up": {}}, "seeds": [1]}, "letters, digits"),
        ({"variants": {"-a": {}}, "seeds": [1]}, "letters, digits"),
        ({"variants": {"loda": {}, "LoDA": {}}, "seeds": [1]}, "different names"),
        ({"variants": [["loda"]], "seeds": [1]}, "variants is"),
        ({"variants": ["loda"], "seeds": [1, 1]}, "different whole numbers"),
        ({"variants": ["loda"], "seeds": [-1]}, "different whole numbers"),
        ({"variants": ["loda"], "seeds": [True]}, "different whole numbers"),
        ({"variants": ["loda"], "seeds": [1], "settings": 3}, "settings is 3"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_sweep(sweep_file(tmp_path, content))


def test_plain_names_are_methods(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, {"variants": ["frozen"], "seeds": [1]}))
    assert sweep.variants == {"frozen": {"method.name": "frozen"}}


@pytest.mark.parametrize("name", packaged_sweeps())
def test_packaged_sweeps_are_sound(name: str, tmp_path: Path) -> None:
    # As the commands in their heads say: some come with data, some with a backbone.
    given = [] if name == "digits" else ["--data.root=x"]
    given += ["--backbone.weights=y"] if name in ("caltech101", "caltech101-trials") else []
    jobs = plan(read_sweep(name), tmp_path, given)
    assert len({job.folder for job in jobs}) == len(jobs) >= 10
    assert all(isinstance(job, Job) for job in jobs)
    sweep = read_sweep(name)
    if sweep.groups:
        assert {variant for part in sweep.groups.values() for variant in part} == {*sweep.variants}


def test_an_unknown_sweep_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"a packaged one \(caltech101, .*digits\)"):
        read_sweep("nothing")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("variants: {a: {}, b: {}, a: {}}\nseeds: [1]\n", "key 'a' stands twice, on line 1"),
        (
            "variants:\n  a: {}\n  b: {}\n  a: {}\nseeds: [1]\n",
            "'a' .* on lines 2 and 4",
        ),
        ("seeds: [1]\nvariants: [loda]\nseeds: [2]\n", "'seeds' stands twice, on lines 1 and 3"),
        (
            "variants:\n  a:\n    method.rank: 1\n    method: {rank: 2}\nseeds: [1]\n",
            r"'variants\.a\.method\.rank' stands twice, on lines 3 and 4",
        ),
        ("variants: [", "is not YAML"),
    ],
)
def test_keys_that_stand_twice_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=said):
        read_sweep(path)


def test_groups_name_variants(tmp_path: Path) -> None:
    content = {"variants": ["loda", "frozen"], "seeds": [1]}
    groups = {"all": ["loda", "frozen"], "one": ["loda"]}
    sweep = read_sweep(sweep_file(tmp_path, {**content, "groups": groups}))
    write_groups(tmp_path / "out", sweep.groups)
    assert read_groups(tmp_path / "out") == groups
    write_groups(tmp_path / "out", None)  # another sweep on the folder, which has none
    assert read_groups(tmp_path / "out") == groups
    for wrong in ({"a": ["ncm"]}, {"a": ["loda", "loda"]}, {"a": []}, ["loda"], {"a": "loda"}):
        with pytest.raises(ValueError, match="lists of different variants"):
            read_sweep(sweep_file(tmp_path, {**content, "groups": wrong}))
