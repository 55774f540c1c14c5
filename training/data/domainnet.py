"""DomainNet by its official lists: ``DOMAIN_train.txt`` and ``DOMAIN_test.txt`` of path and label.

A line is ``clipart/aircraft_carrier/clipart_001_000001.jpg 0``; paths start at the folder of the
lists. All domains whose lists are there make one data set of the classes that they share.
"""

from pathlib import Path

from training.config import DataConfig
from training.data.folder import (
    Classes,
    check_count,
    check_same,
    file_split,
    named_folder,
    some,
    tree_source,
)
from training.data.source import Source, Split


def domainnet_source(config: DataConfig) -> Source:
    """Read the lists in ``root/domainnet`` or ``root``; without any, a train/ and test/ tree.

    Classes are numbered as in the lists and named after the folders of their images.

    Raises
    ------
    FileNotFoundError
        If there are neither lists nor folders, or a domain lacks one of its two lists.
    ValueError
        If a list is malformed, the lists disagree, or there are not 345 classes.
    """
    root = named_folder(config)
    domains = listed_domains(root)
    if not domains:
        return check_count(tree_source(root, config), config)
    train = read_lists(root, domains, "train")

    def test() -> Split:
        found = read_lists(root, domains, "test")
        check_same(root, set(train), set(found), "test")
        return file_split({name: found[name] for name in train}, config)

    return check_count(Source(list(train), file_split(train, config), test), config)


def listed_domains(root: Path) -> list[str]:
    """Names of the domains that have a list in a folder; both lists have to be there.

    Raises
    ------
    FileNotFoundError
        If a domain has one of its two lists only.
    """
    names = {
        split: {path.name.removesuffix(f"_{split}.txt") for path in root.glob(f"*_{split}.txt")}
        for split in ("train", "test")
    }
    alone = names["train"] ^ names["test"]
    if alone:
        msg = f"{root} lacks one of the lists DOMAIN_train.txt and DOMAIN_test.txt of {some(alone)}"
        raise FileNotFoundError(msg)
    return sorted(names["train"])


def read_lists(root: Path, domains: list[str], split: str) -> Classes:
    """The files of a split by class, in the order of the labels.

    Raises
    ------
    ValueError
        If a line is not a path and a label, or a label stands for folders of two names.
    """
    names: dict[int, str] = {}
    files: dict[int, list[Path]] = {}
    for domain in domains:
        path = root / f"{domain}_{split}.txt"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            name, _, digits = line.strip().rpartition(" ")
            if not name or not (digits.isascii() and digits.isdigit()):
                msg = f"{path}, line {number}: expected a path and a label, got {line!r}"
                raise ValueError(msg)
            label, file = int(digits), root / name.strip()
            if names.setdefault(label, file.parent.name) != file.parent.name:
                msg = (
                    f"{path}, line {number}: label {label} is {names[label]} elsewhere, here "
                    f"{file.parent.name}"
                )
                raise ValueError(msg)
            files.setdefault(label, []).append(file)
    if len(set(names.values())) != len(names):
        msg = f"the lists in {root} give one class two labels"
        raise ValueError(msg)
    return {names[label]: files[label] for label in sorted(names)}
