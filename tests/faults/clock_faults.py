"""Faults of clocks: steps of two hours, of the relay's machine or of the database's."""

from tests.faults.process_faults import STEP
from tests.faults.shim import FaultShim
from tests.faults.site import FaultSite
from tests.faults.traffic import MailTraffic

HOURS = 2


def step_relay_clock(site: FaultSite, traffic: MailTraffic) -> None:
    """The wall clock of smtpd and workers."""
    assert site.shim is not None
    _step(site.shim, traffic)


def step_database_clock(site: FaultSite, traffic: MailTraffic) -> None:
    """The wall clock of PostgreSQL."""
    assert site.clock_shim is not None
    _step(site.clock_shim, traffic)


def _step(shim: FaultShim, traffic: MailTraffic) -> None:
    """Forward, far back, and right again; mail flows in between."""
    try:
        for hours in (HOURS, -HOURS):
            shim.step_clock(3600 * hours)
            traffic.until_tried(2 * STEP)
    finally:
        shim.step_clock(0)
