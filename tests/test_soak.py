"""The command behind the table of docs/developers/soak.md, on a few tasks."""

from pathlib import Path

import pytest
import soak


@pytest.mark.slow
@pytest.mark.gate
def test_a_short_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.soak(tmp_path / "soak", tasks=4, ends=4, seed=3, rest=[])
    said = capsys.readouterr().out
    assert "Differences in bits: none." in said
    assert "SIG" in said
