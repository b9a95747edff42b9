"""Faults of the broker and of the QMQP servers: flushed, lying, away, insane."""

from functools import partial

from tests.faults.liar import LyingBroker
from tests.faults.missed import FaultMissed
from tests.faults.process_faults import STEP
from tests.faults.servers import INSANITIES
from tests.faults.site import FaultSite
from tests.faults.traffic import MailTraffic

SECONDS = 5.0
TRIES = 120  # messages while servers are insane


def flush_broker(site: FaultSite, traffic: MailTraffic) -> None:
    for _ in range(10):
        if site.broker.ask("FLUSHALL") != b"+OK":
            raise FaultMissed("the broker did not flush")
        traffic.until_tried(STEP // 3)


def replace_broker_by_a_liar(site: FaultSite, traffic: MailTraffic) -> None:
    site.broker.kill()
    liar = LyingBroker(site.broker.socket, site.rng)
    try:
        traffic.until_tried(3 * STEP)
    finally:
        liar.close()
        site.broker.start()
    if not liar.count:
        raise FaultMissed("no program has asked the lying broker")


def stop_servers(site: FaultSite, traffic: MailTraffic) -> None:
    for server in site.servers:
        server.stop()
    site.wait(SECONDS)
    for server in site.servers:
        server.start()


def drive_servers_insane(
    site: FaultSite, traffic: MailTraffic, *, kinds: tuple[str, ...] = tuple(INSANITIES)
) -> None:
    """The first server all the time, the second only in the second half."""
    first, second = (server.insane for server in site.servers)
    try:
        first.kinds = kinds
        traffic.until_tried(TRIES // 2)
        second.kinds = kinds
        traffic.until_tried(TRIES // 2)
        site.wait(SECONDS)  # retries meet the same servers
    finally:
        first.kinds = second.kinds = ()
    if not first.count + second.count:
        raise FaultMissed("no server was insane")


INSANE_BY_KIND = {kind: partial(drive_servers_insane, kinds=(kind,)) for kind in INSANITIES}
