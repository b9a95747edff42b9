"""Faults of the database: away, read-only, without connections, and connections that break."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial

import psycopg

from tests.faults.books import JOURNAL
from tests.faults.missed import FaultMissed
from tests.faults.process_faults import STEP
from tests.faults.proxy import CutMode
from tests.faults.site import DATABASE, LEASE, FaultSite
from tests.faults.traffic import MailTraffic

MIN_CUTS = 5
TRIES = 150  # messages while connections are cut


def stop_database(site: FaultSite, traffic: MailTraffic) -> None:
    """For longer than a lease."""
    assert site.postgres is not None
    site.postgres.stop()
    try:
        site.wait(2 * LEASE)
    finally:
        site.postgres.start()


def start_without_database(site: FaultSite, traffic: MailTraffic) -> None:
    """Everything ends, and the database comes back last. With the journal smtpd does not wait for
    it."""
    assert site.postgres is not None
    site.kill()
    with ThreadPoolExecutor() as pool:
        others = [one for one in site.programs if one is not site.postgres]
        starting = [pool.submit(program.start) for program in others]
        site.wait(2 * LEASE)
        if JOURNAL:
            traffic.until_accepted(STEP)
        site.postgres.start()
        for program in starting:
            program.result()


def lock_database(site: FaultSite, traffic: MailTraffic) -> None:
    """A program that is not the relay's holds a write transaction of SQLite open."""
    connection = sqlite3.connect(site.directory / "database" / "relay.db", isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        site.wait(2 * LEASE)
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def cut(mode: CutMode, site: FaultSite, traffic: MailTraffic) -> None:
    """Break connections to PostgreSQL while mail flows."""
    assert site.proxy is not None
    before = site.proxy.cuts
    with site.proxy.cutting(mode):
        traffic.until_tried(TRIES, 120)
    if site.proxy.cuts - before < MIN_CUTS:
        raise FaultMissed(f"only {site.proxy.cuts - before} connections were cut")


cut_at_random_bytes = partial(cut, "random")
cut_before_commit = partial(cut, "before COMMIT")
cut_after_commit = partial(cut, "after COMMIT")


def read_only(site: FaultSite, traffic: MailTraffic) -> None:
    """As a standby, or an administrator's ALTER DATABASE."""
    site.administrate(f"ALTER DATABASE {DATABASE} SET default_transaction_read_only = on")
    site.disconnect_clients()
    try:
        site.wait(2 * LEASE)
    finally:
        site.administrate(f"ALTER DATABASE {DATABASE} RESET default_transaction_read_only")
        site.disconnect_clients()


def no_connections(site: FaultSite, traffic: MailTraffic) -> None:
    """Another program takes every connection that PostgreSQL allows."""
    assert site.postgres is not None
    with ExitStack() as stack:
        site.disconnect_clients()
        for _ in range(200):
            with suppress(psycopg.OperationalError):
                connection = psycopg.connect(
                    host=str(site.postgres.directory), user="postgres", dbname="postgres"
                )
                stack.enter_context(connection)
                if connection.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = %s", [DATABASE]
                ).fetchone() != (0,):
                    connection.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                        [DATABASE],
                    )
        site.wait(2 * LEASE)
