"""A service imports little: each module that it never uses takes memory as long as it runs."""

import json
import os
import subprocess
import sys

import pytest

from relay.settings import PREFIX

PROGRAM = """
import json, sys
from types import SimpleNamespace
from relay.log import configure
configure(SimpleNamespace(log_level="info", log_format="json", log_addresses="full"))
{imports}
print(json.dumps([*sys.modules]))
"""
SERVICES = {
    "smtpd": "import commands.services, smtpd.main",
    "spooler": "import reception.spooler",
    # Celery imports its worker when it is asked for.
    "worker": "import commands.services; from worker.app import app; app.Worker",
}
# What no service uses, though packages that it does use import it where they find it.
UNUSED = (
    *("alembic", "attr", "jinja2", "pygments", "rich", "starlette", "uvicorn"),
    *("celery.bin", "click_repl", "prompt_toolkit", "typer"),
)


def imported(service: str) -> set[str]:
    """The modules of a service that has set up its log."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(imports=SERVICES[service])],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(json.loads(done.stdout))


# smtpd validates the settings, keeps the counters and publishes the hints. The spooler only writes.
UNUSED_BY_SPOOLER = (
    "celery",
    "kombu",
    "prometheus_client",
    "psutil",
    "pydantic",
    "redis",
    "uvloop",
)


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_no_module_that_it_never_uses(service: str) -> None:
    assert not imported(service) & set(UNUSED)


def test_smtpd_publishes_hints_without_celery() -> None:
    assert not imported("smtpd") & {"amqp", "billiard", "celery", "kombu"}


def test_a_worker_without_plugins_imports_none() -> None:
    assert not imported("worker") & {"pluggy", "plugins.loader", "plugins.runner", "qmqp_relay"}


def test_the_spooler_gets_values_and_imports_what_writes_them() -> None:
    assert not imported("spooler") & set(UNUSED_BY_SPOOLER)
