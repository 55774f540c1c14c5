"""Configuration files that build on another one."""

from pathlib import Path

import pytest

from training.config import load_experiment, packaged_configs, read_experiment, resolve_config


def write(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def chain(tmp_path: Path) -> str:
    """Three files: the last builds on the second, which builds on the first."""
    write(tmp_path, "first", "train: {lr: 0.3, epochs: 2}\nseed: 5\nmethod: {rank: 3}\n")
    write(tmp_path, "second", "# why\nbase: first  # beside it\ntrain: {lr: 4e-1}\n")
    return write(tmp_path, "third", "base: second.yaml\nmethod:\n  gamma: 2.5\n  rank: 4\n")


def test_later_files_win_and_leave_the_rest(chain: str) -> None:
    for found in (load_experiment(["--config", chain]), read_experiment(chain)):
        assert (found.train.lr, found.train.epochs, found.seed) == (0.4, 2, 5)
        assert (found.method.rank, found.method.gamma) == (4, 2.5)
    for argv in (["--method.rank=9", "--config", chain], [f"--config={chain}", "--method.rank=9"]):
        assert load_experiment(argv).method.rank == 9


def test_a_base_may_be_a_configuration_of_the_package(tmp_path: Path) -> None:
    path = write(tmp_path, "mine", "base: paper/cub\ndata: {root: birds, tasks: 3}\n")
    found = read_experiment(path)
    assert (found.data.name, found.data.tasks, found.method.history) == ("cub", 3, "both")
    write(tmp_path, "paper/cub", "seed: 77\n")  # what lies beside the file comes first
    assert read_experiment(write(tmp_path, "mine", "base: paper/cub\n")).seed == 77


def test_files_that_only_serve_as_bases_are_not_listed() -> None:
    assert "paper/cub" in packaged_configs()
    assert not [name for name in packaged_configs() if "_protocol" in name or "sweeps" in name]
    assert resolve_config("paper/cub").with_name("_protocol.yaml").is_file()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: nowhere\n", "no configuration 'nowhere'"),
        ("base: third\n", "its base leads back to itself"),
        ("base: 3\n", "base must be the name of a configuration, got 3"),
        ("base:\n", "base must be the name of a configuration, got None"),
        ("base: first\nbase: first\n", "the key 'base' stands twice, on lines 1 and 2"),
        ("method: {rank: 3}\nmethod.rank: 4\n", "'method.rank' stands twice, on lines 1 and 2"),
        ("method:\n  rank: 3\n  gao: true\n  rank: 3\n", "'rank' stands twice, on lines 2 and 4"),
        ("method.options: {penalty: 1, penalty: 1}\n", "'penalty' stands twice, on line 1"),
        ("{base: first}\n", "unknown settings base"),
        ("base: first\nmethod: {rang: 3}\n", "method.rang"),
        ("base: first\ntran: {}\n", "unknown settings tran"),
    ],
)
def test_wrong_bases_are_refused(
    chain: str, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(Path(chain).parent, "third", text)
    with pytest.raises(ValueError, match="is not a configuration") as caught:
        read_experiment(path)
    assert said in str(caught.value)
    with pytest.raises(SystemExit) as leaving:
        load_experiment(["--config", path])
    assert leaving.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_a_base_lacks_is_reported_as_in_the_file_itself(tmp_path: Path) -> None:
    write(tmp_path, "bad", "train: {lr: fast}\n")
    with pytest.raises(ValueError, match=r"top\.yaml is not a configuration.*train\.lr"):
        read_experiment(write(tmp_path, "top", "base: bad\n"))


def test_paths_in_a_base_start_at_the_working_directory(chain: str) -> None:
    write(Path(chain).parent, "first", "data: {name: folder, root: images, resize: 8}\n")
    assert read_experiment(chain).data.root == "images"
