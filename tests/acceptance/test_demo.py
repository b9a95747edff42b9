"""`make demo` passes, shows the states move, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.stack import ROOT, processes_of, relay_environ


@pytest.mark.timeout(180)
def test_the_demo(tmp_path: Path) -> None:
    played = subprocess.run(
        [sys.executable, "-m", "commands.cli.start", "demo"],
        env=relay_environ() | {"TMPDIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert played.returncode == 0, played.stdout + played.stderr
    for word in ("deferred", "bounced", "delivered", "defer-2@example.org", "try 3", "25 MB"):
        assert word in played.stdout
    assert "WRONG" not in played.stdout
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []
