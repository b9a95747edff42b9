"""The list of faults: what each needs, what clients may hear, and where it runs.

A case is quick on the databases in `quick`, and part of the whole matrix on those in `full`.
`hears` are the replies that clients may get besides 250: codes, or `lost` for a connection that
broke. `accepts`: clients hear 250 alone while the fault lasts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tests.faults import (
    clock_faults,
    database_faults,
    disk_faults,
    peer_faults,
    process_faults,
)
from tests.faults.books import JOURNAL
from tests.faults.site import FaultSite
from tests.faults.traffic import MailTraffic

POSTGRESQL = ("postgresql",)
SQLITE = ("sqlite",)
BOTH = ("postgresql", "sqlite")
LOST = frozenset({"lost"})
LATER = frozenset({"451"})
FULL_DISK = frozenset({"451", "452"})
# While the database is away. With the journal clients hear 250 all the time.
AWAY: frozenset[str] = frozenset() if JOURNAL else LATER


@dataclass(frozen=True, slots=True)
class FaultCase:
    """One row of the matrix."""

    name: str
    fault: Callable[[FaultSite, MailTraffic], None]
    hears: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()  # features of the site
    quick: tuple[str, ...] = POSTGRESQL
    full: tuple[str, ...] = BOTH

    @property
    def accepts(self) -> bool:
        return not self.hears


_DISK = frozenset({"disk"})
_SHIM = frozenset({"shim"})
_PROXY = frozenset({"proxy"})
CASES = (
    FaultCase("smtpd killed", process_faults.kill_smtpd, LOST, quick=BOTH),
    FaultCase("spooler killed", process_faults.kill_spooler, LATER | LOST, quick=BOTH),
    FaultCase("worker killed", process_faults.kill_workers, quick=BOTH),
    FaultCase("broker killed", process_faults.kill_broker),
    FaultCase("PostgreSQL killed", process_faults.kill_postgres, AWAY, full=POSTGRESQL),
    FaultCase("everything killed", process_faults.kill_everything, LATER | LOST, quick=BOTH),
    FaultCase("worker stopped past its lease", process_faults.stop_worker, AWAY),
    FaultCase("smtpd stopped past deadlines", process_faults.stop_smtpd, LATER | LOST),
    FaultCase("spooler stopped past deadlines", process_faults.stop_spooler, LATER | LOST),
    FaultCase(
        "PostgreSQL stopped past leases", process_faults.stop_postgres, AWAY, full=POSTGRESQL
    ),
    FaultCase(
        "everything stopped past leases", process_faults.stop_everything, LATER | LOST, quick=()
    ),
    FaultCase("database away", database_faults.stop_database, AWAY, full=POSTGRESQL),
    FaultCase(
        "database back last",
        database_faults.start_without_database,
        LATER | LOST,
        full=POSTGRESQL,
    ),
    FaultCase("database locked", database_faults.lock_database, AWAY, quick=SQLITE, full=SQLITE),
    FaultCase(
        "cut at random bytes", database_faults.cut_at_random_bytes, AWAY, _PROXY, full=POSTGRESQL
    ),
    FaultCase(
        "cut before COMMIT", database_faults.cut_before_commit, AWAY, _PROXY, full=POSTGRESQL
    ),
    FaultCase("cut after COMMIT", database_faults.cut_after_commit, AWAY, _PROXY, full=POSTGRESQL),
    FaultCase("database read-only", database_faults.read_only, AWAY, full=POSTGRESQL),
    FaultCase(
        "database without connections", database_faults.no_connections, AWAY, full=POSTGRESQL
    ),
    FaultCase("spool full", disk_faults.fill_spool, FULL_DISK, _DISK),
    FaultCase("spool read-only", disk_faults.read_only_spool, LATER | LOST, _DISK),
    FaultCase("spool unmounted", disk_faults.unmount_spool, FULL_DISK, _DISK),
    FaultCase("writes fail", disk_faults.fail_writes, LATER | LOST, _SHIM),
    FaultCase(
        "writes find no space",
        disk_faults.fail_writes_without_space,
        FULL_DISK | LOST,
        _SHIM,
        quick=(),
    ),
    FaultCase("syncs fail", disk_faults.fail_syncs, LATER | LOST, _SHIM, quick=BOTH),
    FaultCase(
        "SQLite's syncs fail",
        disk_faults.fail_syncs_of_sqlite,
        LATER | LOST,
        _SHIM,
        quick=(),
        full=SQLITE,
    ),
    FaultCase("reads fail", disk_faults.fail_reads, LATER | LOST, _SHIM),
    FaultCase("a place cannot be read", disk_faults.lose_place, LATER | LOST, _SHIM),
    FaultCase("short writes", disk_faults.shorten_writes, FULL_DISK | LOST, _SHIM, quick=()),
    FaultCase("power cut", disk_faults.cut_power, LATER | LOST, _DISK, quick=BOTH),
    FaultCase("relay's clock stepped", clock_faults.step_relay_clock, needs=_SHIM, quick=BOTH),
    FaultCase(
        "database's clock stepped",
        clock_faults.step_database_clock,
        AWAY,
        _SHIM,
        full=POSTGRESQL,
    ),
    FaultCase("broker flushed", peer_faults.flush_broker),
    FaultCase("broker stopped", process_faults.stop_broker),
    FaultCase("broker lies", peer_faults.replace_broker_by_a_liar),
    FaultCase("servers down", peer_faults.stop_servers),
    FaultCase("servers insane", peer_faults.drive_servers_insane, quick=BOTH),
    *(
        FaultCase(f"servers: {kind}", fault, quick=(), full=POSTGRESQL)
        for kind, fault in peer_faults.INSANE_BY_KIND.items()
    ),
)


def chosen(names: Iterable[str] = (), *, full: bool) -> list[tuple[FaultCase, str]]:
    """Cases with a database each; all of them unless `names` are given. Raises KeyError for an
    unknown name."""
    by_name = {case.name: case for case in CASES}
    cases = [by_name[name] for name in names] or CASES
    return [
        (case, database)
        for database in BOTH
        for case in cases
        if database in (case.full if full or names else case.quick)
    ]
