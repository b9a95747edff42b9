"""The units of deploy/systemd: systemd itself reads them, and finds them confined."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from relay.listeners import parse_listener
from relay.settings import names

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy" / "systemd"
COMMON = (UNITS / "qmqp-relay-.service.d" / "10-common.conf").read_text()
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
WORST = 2.0  # of systemd-analyze security: 0 is confined, 10 is not


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units with a program that exists."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze on this machine")
    directory = tmp_path_factory.mktemp("units")
    shutil.copytree(UNITS, directory, dirs_exist_ok=True)
    for path in directory.rglob("*"):
        if path.suffix in (".service", ".conf"):
            text = path.read_text()
            path.write_text(text.replace("/opt/qmqp-relay/bin/qmqp-relay", sys.executable))
    return directory


def analyze(units: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def instance(name: str) -> str:
    return name.replace("@.", "@1.")


@pytest.mark.parametrize("name", [*SERVICES, "qmqp-relay.target", "qmqp-relay-smtpd.socket"])
def test_systemd_understands_a_unit(units: Path, name: str) -> None:
    done = analyze(units, "verify", "--man=no", str(units / instance(name)))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_confined(units: Path, name: str) -> None:
    done = analyze(units, "security", "--offline=true", "--no-pager", instance(name))
    assert done.returncode == 0, done.stderr
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure, done.stdout
    assert float(exposure[1]) <= WORST, done.stdout
    assert re.search(r"^✓ User=/DynamicUser=", done.stdout, re.M), "not as root"


def test_up_may_open_port_25_and_no_other_service_has_a_privilege(units: Path) -> None:
    for name in SERVICES:
        done = analyze(units, "security", "--offline=true", "--no-pager", instance(name))
        allowed = "✗ AmbientCapabilities=" in done.stdout
        assert allowed == (name == "qmqp-relay-up.service"), done.stdout


def test_services_have_known_settings_and_commands() -> None:
    texts = [path.read_text() for path in UNITS.rglob("*") if path.is_file()]
    used = {name for text in texts for name in re.findall(r"\b(RELAY_[A-Z_]+?)(?:_FILE)?=", text)}
    assert used <= names()
    commands = re.findall(r"^ExecStart=/opt/qmqp-relay/bin/qmqp-relay (\S+)", "".join(texts), re.M)
    assert sorted(commands) == ["migrate", "smtpd", "up", "web", "worker"]


def test_smtpd_takes_the_socket_by_its_name() -> None:
    socket = (UNITS / "qmqp-relay-smtpd.socket").read_text()
    service = (UNITS / "qmqp-relay-smtpd.service").read_text()
    listener = re.findall(r"RELAY_SMTP_LISTEN=(\S+)", service)
    assert [parse_listener(text).socket_name for text in listener] == re.findall(
        r"^FileDescriptorName=(\S+)", socket, re.M
    )
    assert "Requires=qmqp-relay-smtpd.socket" in service


def test_a_bad_setting_is_not_tried_again() -> None:
    assert "RestartPreventExitStatus=2" in COMMON


def test_the_guide_names_every_unit() -> None:
    guide = (ROOT / "docs" / "operate.md").read_text()
    section = guide.split("\n## With systemd\n")[1].split("\n## ")[0]
    for path in UNITS.iterdir():
        assert instance(path.name) in section or path.suffix in (".service.d",), path.name
