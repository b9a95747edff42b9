"""The services smtpd and worker, without a command line: `commands.cli.start` runs them so.

They have no arguments, so there is nothing to parse. typer would take 3 MiB as long as they run.
"""

import os

from commands.errors import INTERRUPTED, status_of


def smtpd() -> int:
    """Run the SMTP server; the exit status."""
    from relay.log import configure
    from relay.settings import SmtpdSettings, load
    from smtpd.main import run

    settings = load(SmtpdSettings)
    configure(settings)
    return run(settings)


def worker() -> int:
    """Run a delivery worker; the exit status."""
    from relay.settings import WorkerSettings, load

    settings = load(WorkerSettings)
    # This module reads the settings too, and ends the process for a bad one.
    from worker.app import run

    return run(settings)


SERVICES = {"smtpd": smtpd, "worker": worker}


def run(name: str) -> int:
    """Run the service of this name in this process; the exit status."""
    os.umask(0o077)  # as for every command (commands.cli.main)
    try:
        return SERVICES[name]()
    except KeyboardInterrupt:  # before the service handles it
        return INTERRUPTED
    except Exception as error:
        return status_of(error)
