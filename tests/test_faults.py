"""A few of the faults that `make faults` tries in number; see tests/faults.py."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.gate
@pytest.mark.skipif(sys.platform != "linux", reason="faults are put before the C library of Linux")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_a_run_survives_faults_of_files_and_processes(tmp_path: Path) -> None:
    command = [sys.executable, Path(__file__).with_name("faults.py"), tmp_path / "faults"]
    done = subprocess.run([*command, "--each=1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| 1 | 1 |") == 6
