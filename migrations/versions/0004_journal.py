"""The journal: its segments, the place of each body, and the mark of the spool.

A body stands in a segment (`messages.segment`, `position`) or, as all bodies before this revision,
in a file of its own (both NULL). `backoff_step` becomes `deferrals`: a worker of an earlier version
would look for files, so its claims must fail and not misread.
"""

from contextlib import suppress

from alembic import op
from sqlalchemy import Connection

from migrations.views import drop_views
from relay.settings import Settings, load
from relay.spool.journal.directory import ADOPTED, OWNED, JournalDirectory
from relay.spool.store import Spool

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

ROLE = "qmqp_relay_reader"  # may read every table; it may be missing (see 0002)
SEGMENTS = """CREATE TABLE segments (
    id {id} NOT NULL,
    committed_to BIGINT NOT NULL,
    sealed_at {instant},
    messages BIGINT,
    least_id {id},
    greatest_id {id},
    live_bytes BIGINT,
    checked_at {instant},
    sparse_since {instant},
    CONSTRAINT segments_key PRIMARY KEY (id)
)"""
WAITING = """SELECT count(*) FROM deliveries
WHERE state IN ('queued', 'sending', 'deferred', 'held') OR due_at IS NOT NULL"""
SEALED = """SELECT replace(CAST(id AS text), '-', '') FROM segments WHERE sealed_at IS NOT NULL"""
UNSEALED = """SELECT replace(CAST(id AS text), '-', '') FROM segments WHERE sealed_at IS NULL"""


def upgrade() -> None:
    """Add the table and the columns, and rename one."""
    connection = op.get_bind()
    postgresql = connection.dialect.name == "postgresql"
    kinds = (
        {"id": "UUID", "instant": "TIMESTAMP WITH TIME ZONE"}
        if postgresql
        else {"id": "TEXT", "instant": "BIGINT"}
    )
    drop_views(connection)
    connection.exec_driver_sql(SEGMENTS.format(**kinds))
    connection.exec_driver_sql(f"ALTER TABLE messages ADD COLUMN segment {kinds['id']}")
    connection.exec_driver_sql("ALTER TABLE messages ADD COLUMN position BIGINT")
    connection.exec_driver_sql("ALTER TABLE spool ADD COLUMN mark BIGINT DEFAULT '0' NOT NULL")
    _rename("backoff_step", "deferrals")
    if (
        postgresql
        and connection.exec_driver_sql(f"SELECT 1 FROM pg_roles WHERE rolname = '{ROLE}'").scalar()
    ):
        connection.exec_driver_sql(f"GRANT SELECT ON segments TO {ROLE}")


def downgrade() -> None:
    """Take them away; refused while mail waits, with rows or without."""
    connection = op.get_bind()
    if waiting := connection.exec_driver_sql(WAITING).scalar():
        raise RuntimeError(
            f"{waiting} deliveries wait whose bodies stand in segments, or in files that end in a"
            " trailer. The earlier version cannot read them: deliver, bounce or drop them first"
        )
    if unsealed := _unsealed(connection):
        raise RuntimeError(
            f"{len(unsealed)} segments of the journal may hold mail that has no rows yet:"
            f" {', '.join(sorted(unsealed)[:5])}. Start smtpd with the database, and stop it when"
            " `qmqp-relay stats` shows no lag; it seals its segments then"
        )
    drop_views(connection)
    _rename("deferrals", "backoff_step")
    connection.exec_driver_sql("ALTER TABLE spool DROP COLUMN mark")
    connection.exec_driver_sql("ALTER TABLE messages DROP COLUMN position")
    connection.exec_driver_sql("ALTER TABLE messages DROP COLUMN segment")
    connection.exec_driver_sql("DROP TABLE segments")


def _unsealed(connection: Connection) -> set[str]:
    """The segments that are not sealed: in the table, and in the spool if it is mounted here."""
    sealed = {*connection.exec_driver_sql(SEALED).scalars()}
    unsealed = {*connection.exec_driver_sql(UNSEALED).scalars()}
    known = "SELECT replace(CAST(id AS text), '-', '') FROM spool"
    with suppress(OSError):
        spool = Spool(load(Settings).spool_dir)
        if spool.identity and spool.identity == connection.exec_driver_sql(known).scalar():
            names = JournalDirectory(spool.handle).segments(OWNED, ADOPTED)
            unsealed |= {segment for segment, _ in names} - sealed
    return unsealed


def _rename(old: str, new: str) -> None:
    connection = op.get_bind()
    connection.exec_driver_sql(f"ALTER TABLE deliveries RENAME COLUMN {old} TO {new}")
    if connection.dialect.name != "postgresql":
        return
    # From version 18 on PostgreSQL names NOT NULL constraints after their columns.
    named = "SELECT 1 FROM pg_constraint WHERE conname = 'deliveries_{}_not_null'"
    if connection.exec_driver_sql(named.format(old)).scalar():
        connection.exec_driver_sql(
            f"ALTER TABLE deliveries RENAME CONSTRAINT deliveries_{old}_not_null"
            f" TO deliveries_{new}_not_null"
        )
