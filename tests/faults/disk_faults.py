"""Faults of the disk: full, read-only, unmounted, failing calls, and a power cut."""

import errno
import os
import signal
from functools import partial

from tests.faults.disks import MountedDisk
from tests.faults.missed import FaultMissed
from tests.faults.process_faults import STEP
from tests.faults.site import FaultSite
from tests.faults.traffic import MailTraffic
from tests.waiting import until

SECONDS = 5.0
TRIES = 90  # messages while calls fail
_WAITING_BODY = """SELECT m.id, m.segment, m.position FROM messages m
    JOIN deliveries d ON d.queue_id = m.id
    WHERE d.state = 'queued' AND d.claim_count = 0 AND m.segment IS NOT NULL
    ORDER BY m.id LIMIT 1"""
_UNSENDABLE = "SELECT 1 FROM deliveries WHERE queue_id = :id AND last_outcome = 'unsendable'"
# Older mail: what is being accepted now is always there.
_NEVER_TRIED = "SELECT 1 FROM deliveries WHERE queue_id < :id AND claim_count = 0"


def fill_spool(site: FaultSite, traffic: MailTraffic) -> None:
    ballast = _spool_disk(site).fill()
    try:
        site.wait(SECONDS)
    finally:
        ballast.unlink()


def read_only_spool(site: FaultSite, traffic: MailTraffic) -> None:
    """By a remount. If files stay open for writing, the kernel refuses that; then the file system
    becomes read-only as after an error, and the relay starts again once it is repaired."""
    disk = _spool_disk(site)
    if disk.read_only():
        try:
            site.wait(SECONDS)
        finally:
            disk.writable()
        return
    disk.abort()
    site.wait(SECONDS)
    _restart_on(site, disk)


def _restart_on(site: FaultSite, *disks: MountedDisk) -> None:
    """Stop the relay, check and mount these disks again, and start it."""
    site.kill()
    for disk in disks:
        disk.unmount()
        disk.check()
        disk.mount()
    site.start()


def unmount_spool(site: FaultSite, traffic: MailTraffic) -> None:
    """The bare mount point is there instead."""
    disk = _spool_disk(site)
    disk.unmount(lazily=True)
    try:
        site.wait(SECONDS)
    finally:
        disk.mount()


def fail_calls(
    site: FaultSite,
    traffic: MailTraffic,
    *,
    write: int = 0,
    sync: int = 0,
    read: int = 0,
    short: bool = False,
    database: bool = False,
) -> None:
    """Let each third call on the spool fail, or on the files of SQLite."""
    assert site.shim is not None
    before = site.shim.hits
    prefix = site.directory / "database" if database else None
    with site.shim.disk(write=write, sync=sync, read=read, short=short, prefix=prefix):
        traffic.until_tried(TRIES, 120)
    if site.shim.hits == before:
        raise FaultMissed("no call has failed")


fail_writes = partial(fail_calls, write=errno.EIO)
fail_writes_without_space = partial(fail_calls, write=errno.ENOSPC)
fail_syncs = partial(fail_calls, sync=errno.EIO)
fail_reads = partial(fail_calls, read=errno.EIO)
fail_syncs_of_sqlite = partial(fail_calls, sync=errno.EIO, database=True)
shorten_writes = partial(fail_calls, short=True)


def lose_place(site: FaultSite, traffic: MailTraffic) -> None:
    """The disk cannot read a place of a body that waits, also when smtpd starts again. The other
    mail does not wait; that body is sent a minute later, when it can be read again."""
    assert site.shim is not None
    for worker in site.workers:
        worker.kill()
    traffic.until_accepted(STEP)
    place = until(lambda: site.rows(_WAITING_BODY), 30)[0]
    segment = str(place.segment).replace("-", "")
    bad = site.spool / "journal" / segment
    with site.shim.bad_place(bad, place.position, place.position + 1):
        for worker in site.workers:
            worker.start()
        until(lambda: site.rows(_UNSENDABLE, id=place.id), 30)
        os.kill(site.smtpd.pid, signal.SIGKILL)
        until(lambda: not site.smtpd.running)
        site.smtpd.start()
        traffic.until_accepted(STEP)
        until(lambda: not site.rows(_NEVER_TRIED, id=place.id), 30)


def cut_power(site: FaultSite, traffic: MailTraffic) -> None:
    """Spool and database lose what is not synced; then everything starts again."""
    assert site.database_disk is not None
    disks = _spool_disk(site), site.database_disk
    for _ in range(2):
        for disk in disks:
            disk.cut_power()
        site.kill()
        for disk in disks:
            disk.unmount()
            disk.mount()
        site.start()
        traffic.until_tried(STEP)


def _spool_disk(site: FaultSite) -> MountedDisk:
    assert site.spool_disk is not None
    return site.spool_disk
