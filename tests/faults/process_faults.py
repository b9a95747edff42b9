"""Faults of processes: killed, or stopped for longer than a lease or a deadline."""

import os
import signal
from collections.abc import Sequence

from tests.faults.site import ACCEPT_DEADLINE, LEASE, FaultSite
from tests.faults.traffic import MailTraffic
from tests.services import ServerProcess
from tests.waiting import until

STEP = 30  # messages between two faults of a series


def kill_smtpd(site: FaultSite, traffic: MailTraffic) -> None:
    """smtpd alone: its spooler has to notice."""
    for _ in range(3):
        os.kill(site.smtpd.pid, signal.SIGKILL)
        until(lambda: not site.smtpd.running)
        site.smtpd.start()
        traffic.until_tried(STEP)


def kill_spooler(site: FaultSite, traffic: MailTraffic) -> None:
    for _ in range(3):
        (spooler,) = until(lambda: site.smtpd.children("reception.spooler"), 30)
        os.kill(spooler, signal.SIGKILL)
        traffic.until_tried(STEP)


def kill_workers(site: FaultSite, traffic: MailTraffic) -> None:
    """One after the other, each while the other works."""
    for worker in site.workers * 2:
        worker.kill()
        traffic.until_tried(STEP)
        worker.start()


def kill_broker(site: FaultSite, traffic: MailTraffic) -> None:
    for _ in range(2):
        site.broker.kill()
        traffic.until_tried(STEP)
        site.broker.start()


def kill_postgres(site: FaultSite, traffic: MailTraffic) -> None:
    assert site.postgres is not None
    for _ in range(2):
        site.postgres.kill()
        site.postgres.start()
        traffic.until_tried(STEP)


def kill_everything(site: FaultSite, traffic: MailTraffic) -> None:
    for _ in range(2):
        site.kill()
        site.start()
        traffic.until_tried(STEP)


def stop_worker(site: FaultSite, traffic: MailTraffic) -> None:
    """Until another worker has expired it."""
    worker = site.workers[0]
    worker.pause()
    try:
        until(lambda: _expired(site, worker.pid), 20 * LEASE)
    finally:
        worker.resume()
    traffic.until_tried(STEP)


def _expired(site: FaultSite, pid: int) -> bool:
    ended = "SELECT 1 FROM workers WHERE pid = :pid AND end_reason = 'expired'"
    return bool(site.rows(ended, pid=pid))


def stop_smtpd(site: FaultSite, traffic: MailTraffic) -> None:
    """With its spooler."""
    _stop(site, [site.smtpd], ACCEPT_DEADLINE + 3)


def stop_spooler(site: FaultSite, traffic: MailTraffic) -> None:
    (spooler,) = site.smtpd.children("reception.spooler")
    os.kill(spooler, signal.SIGSTOP)
    try:
        site.wait(ACCEPT_DEADLINE + 3)
    finally:
        os.kill(spooler, signal.SIGCONT)


def stop_postgres(site: FaultSite, traffic: MailTraffic) -> None:
    assert site.postgres is not None
    _stop(site, [site.postgres], 2 * LEASE)


def stop_broker(site: FaultSite, traffic: MailTraffic) -> None:
    _stop(site, [site.broker], 2 * LEASE)


def stop_everything(site: FaultSite, traffic: MailTraffic) -> None:
    """As a suspended machine does, apart from clients and servers."""
    _stop(site, site.programs, 2 * LEASE)


def _stop(site: FaultSite, programs: Sequence[ServerProcess], seconds: float) -> None:
    for program in programs:
        program.pause()
    try:
        site.wait(seconds)
    finally:
        for program in programs:
            program.resume()
