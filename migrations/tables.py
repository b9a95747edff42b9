"""The tables, column by column: what all migrations together come to, and what the columns of the
views mean.

Only migrations need this: Alembic compares it with a database (tests do, after each migration), and
its words are the comments on PostgreSQL and the lists in docs/inspect.md. The program itself speaks
SQL. What must stay true: a change here has a migration, which does not look here, for it stays as
it was when it was made.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import UUID

from relay.db.schema import words
from relay.queue.outcome import Outcome
from relay.queue.states import UNFINISHED, State

metadata = MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s",
        "ck": "%(table_name)s_%(constraint_name)s",
        "pk": "%(table_name)s_key",
    }
)
Id = Text().with_variant(UUID(as_uuid=False), "postgresql")
Instant = DateTime(timezone=True).with_variant(BigInteger, "sqlite")


def _some(name: str, where: str, *columns: str) -> Index:
    """An index of those deliveries of which `where` is true, by columns or expressions."""
    expressions = [text(column) if column.startswith("(") else column for column in columns]
    condition = text(where)
    return Index(
        f"deliveries_{name}", *expressions, postgresql_where=condition, sqlite_where=condition
    )


messages = Table(
    "messages",
    metadata,
    Column("id", Id, primary_key=True, comment="the queue id, UUIDv7"),
    Column("sender", Text, nullable=False, comment="envelope sender; empty = the null sender"),
    Column(
        "size",
        BigInteger,
        nullable=False,
        comment="bytes of the stored body, LF form, trace header included",
    ),
    Column("received_at", Instant, nullable=False, comment="when the 250 was earned"),
    Column("client_address", Text, nullable=False, comment="address of the SMTP client"),
    Column("helo", Text, nullable=False, comment="what the client called itself"),
    Column("protocol", Text, nullable=False, comment="RFC 3848 keyword"),
    Column("auth_user", Text, comment="authenticated user"),
    Column("header_message_id", Text, comment="Message-ID of the header"),
    Column("body_type", Text, comment="BODY= of MAIL (RFC 6152)"),
    Column("ret", Text, comment="RET= of MAIL (RFC 3461)"),
    Column("envid", Text, comment="ENVID= of MAIL (RFC 3461), xtext"),
    Column("dsn_of", Id, comment="the message that this notice is about"),
    Column(
        "client_trusted",
        Boolean,
        comment="whether the client is in CLIENT_NETWORKS; empty: one of our own, or older",
    ),
    Column(
        "dsn_content", Text, comment="what a DSN encloses of the original: full, header or none"
    ),
    Index("messages_sender", "sender", postgresql_ops={"sender": "text_pattern_ops"}),
    Index(None, "header_message_id"),
    comment="accepted messages; rows are never changed",
)

recipients = Table(
    "recipients",
    metadata,
    Column("queue_id", Id, nullable=False, comment="the message that goes to it"),
    Column("position", Integer, nullable=False, comment="order of RCPT, from 1"),
    Column(
        "address",
        Text,
        nullable=False,
        comment="envelope recipient, local part without SMTP quoting",
    ),
    Column("delivery", Integer, nullable=False, comment="number of the delivery that carries it"),
    Column("notify", Text, comment="NOTIFY= of RCPT (RFC 3461)"),
    Column("orcpt", Text, comment="ORCPT= of RCPT (RFC 3461), xtext"),
    PrimaryKeyConstraint("queue_id", "position"),
    Index("recipients_address", "address", postgresql_ops={"address": "text_pattern_ops"}),
    comment="envelope recipients",
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("queue_id", Id, nullable=False, comment="the message that it carries"),
    Column("number", Integer, nullable=False, comment="from 1 within the message"),
    Column("parent", Integer, comment="the delivery that was split into this one"),
    Column(
        "route",
        Text,
        nullable=False,
        comment="name of the route; its servers are looked up at each attempt",
    ),
    Column("state", Text, nullable=False, comment="where it is; docs/inspect.md lists the states"),
    Column("due_at", Instant, comment="when somebody must look again; empty when nobody need"),
    Column(
        "expires_at", Instant, nullable=False, comment="a try that fails after this is the last"
    ),
    Column("worker", Id, comment="who is sending it"),
    Column(
        "claim_count",
        Integer,
        nullable=False,
        server_default="0",
        comment="times it was claimed; numbers the tries",
    ),
    Column(
        "backoff_step", Integer, nullable=False, server_default="0", comment="deferrals in a row"
    ),
    Column(
        "crash_count",
        Integer,
        nullable=False,
        server_default="0",
        comment="workers lost over it in a row",
    ),
    Column("pending_operation", Text, comment="what an operator asked for while it was being sent"),
    Column("last_outcome", Text, comment="outcome of the last try"),
    Column("last_reply", Text, comment="the server's words, or ours, at the last try"),
    Column("last_server", Text, comment="server of the last try"),
    Column("finished_at", Instant, comment="when it became final"),
    Column("pending_reason", Text, comment="who asked for what is wanted, and why"),
    Column("warned_at", Instant, comment="when the sender was told that it is late"),
    Column(
        "waiting_for",
        Text,
        comment="route:NAME: it becomes due when a server of that route answers",
    ),
    Column(
        "dsn_withheld",
        Text,
        comment="why its sender gets no DSN: rate, postmaster or address; empty: no such reason",
    ),
    Column(
        "warn_at",
        Instant,
        comment="when the sender is warned that it is late; empty: never, or it was done",
    ),
    Column("reason_source", Text, comment="where last_reply comes from: server, relay or operator"),
    PrimaryKeyConstraint("queue_id", "number"),
    CheckConstraint(f"state IN ({words(State)})", name="state"),
    CheckConstraint(
        "due_at IS NOT NULL OR state NOT IN ('queued', 'sending', 'deferred')",
        name="due_where_the_state_needs_it",
    ),
    CheckConstraint("(worker IS NOT NULL) = (state = 'sending')", name="worker_while_sending"),
    # Retries and what was never claimed lie apart, each by `due_at`: a poll takes some of either.
    _some("queued", "state = 'queued'", "route", "(CAST(claim_count > 0 AS integer))", "due_at"),
    _some("sending", "state = 'sending'", "worker", "due_at"),
    _some("deferred", "state = 'deferred'", "due_at"),
    _some("waiting", "state = 'deferred' AND waiting_for IS NOT NULL", "waiting_for", "due_at"),
    _some(
        "unwarned",
        "warn_at IS NOT NULL AND state IN ('queued', 'sending', 'deferred')",
        "warn_at",
        "queue_id",
    ),
    _some("owing", "state IN ('bounced', 'expired') AND due_at IS NOT NULL", "due_at"),
    _some("held", "state = 'held'", "queue_id"),
    _some("finished", f"state NOT IN ({words(UNFINISHED)})", "state", "route"),
    comment="QMQP requests to get across: the queue",
    postgresql_with={
        "fillfactor": 80,
        "autovacuum_vacuum_scale_factor": 0.02,
        "autovacuum_analyze_scale_factor": 0.02,
    },
)

attempts = Table(
    "attempts",
    metadata,
    Column("queue_id", Id, nullable=False, comment="the message that was tried"),
    Column("delivery", Integer, nullable=False, comment="number of the delivery"),
    Column("claim", Integer, nullable=False, comment="which claim of the delivery, from 1"),
    Column(
        "attempt_index",
        Integer,
        nullable=False,
        comment="which server within the claim, from 1; 0: the worker was lost",
    ),
    Column("worker", Id, nullable=False, comment="who tried"),
    Column("server", Text, comment="where; empty when the worker was lost"),
    Column("started_at", Instant, nullable=False, comment="when it began to connect"),
    Column(
        "finished_at",
        Instant,
        nullable=False,
        comment="when the reply was read, or the try given up",
    ),
    Column(
        "outcome",
        Text,
        nullable=False,
        comment="what became of it; docs/inspect.md lists the outcomes",
    ),
    Column(
        "reply",
        Text,
        nullable=False,
        comment="the server's words, or ours; bytes outside ASCII as \\xNN",
    ),
    Column("bytes_sent", BigInteger, nullable=False, comment="bytes of the request that left"),
    PrimaryKeyConstraint("queue_id", "delivery", "claim", "attempt_index"),
    CheckConstraint(f"outcome IN ({words(Outcome)})", name="outcome"),
    Index("attempts_finished_at", "finished_at", postgresql_using="brin"),
    comment="tries, each at one server",
)

workers = Table(
    "workers",
    metadata,
    Column("id", Id, primary_key=True, comment="what deliveries and attempts call it, UUIDv7"),
    Column("host", Text, nullable=False, comment="machine that it runs on"),
    Column("pid", Integer, nullable=False, comment="its process there"),
    Column("started_at", Instant, nullable=False, comment="when it began"),
    Column(
        "lease_expires_at",
        Instant,
        nullable=False,
        comment="the lease: renewed while the worker lives",
    ),
    Column("ended_at", Instant, comment="when it stopped or was declared dead"),
    Column("end_reason", Text, comment="stopped or vanished"),
    Column("claim_seconds", Integer, comment="from a claim of its to the due_at of the delivery"),
    Column(
        "routes", Text, comment="the routes that it knows, JSON: a list of servers for each name"
    ),
    comment="worker processes and their leases",
)

audit = Table(
    "audit",
    metadata,
    Column("id", Id, primary_key=True, comment="what audit_deliveries calls it, UUIDv7"),
    Column("at", Instant, nullable=False, comment="when"),
    Column("actor", Text, nullable=False, comment="user@host who asked"),
    Column("verb", Text, nullable=False, comment="what was done"),
    Column("reason", Text, nullable=False, comment="why, as the operator gave it"),
    Column(
        "filter", Text, nullable=False, comment="to which deliveries, as options of the command"
    ),
    Column("matched", Integer, nullable=False, comment="how many deliveries it touched"),
    comment="what operators did",
)

audit_deliveries = Table(
    "audit_deliveries",
    metadata,
    Column("queue_id", Id, nullable=False, comment="the message of the delivery"),
    Column("delivery", Integer, nullable=False, comment="its number"),
    Column(
        "action", Id, nullable=False, comment="the row of audit that tells who did what and why"
    ),
    PrimaryKeyConstraint("queue_id", "delivery", "action"),
    comment="which deliveries an action touched",
)

pauses = Table(
    "pauses",
    metadata,
    Column("subject", Text, primary_key=True, comment="route:NAME or server:NAME"),
    Column("since", Instant, nullable=False, comment="since when"),
    Column("actor", Text, nullable=False, comment="user@host who asked"),
    Column("reason", Text, nullable=False, comment="why"),
    comment="routes and servers that nothing is sent to for now",
)

open_circuits = Table(
    "open_circuits",
    metadata,
    Column("worker", Id, nullable=False, comment="who leaves it alone"),
    Column("server", Text, nullable=False, comment="which, as the settings name it"),
    Column("why", Text, nullable=False, comment="the server's words, or ours, when it failed last"),
    PrimaryKeyConstraint("worker", "server"),
    comment="servers that workers leave alone for now; who has ended does not count",
)

dsn_limits = Table(
    "dsn_limits",
    metadata,
    Column("sender", Text, primary_key=True, comment="envelope sender of the original"),
    Column("last_at", Instant, nullable=False, comment="when the last such DSN was made"),
    comment="senders that got a DSN about mail from an untrusted client in the last minute",
)

spool = Table(
    "spool",
    metadata,
    Column("id", Id, primary_key=True, comment="also written in the spool directory, as spool-id"),
    Column("created_at", Instant, nullable=False, comment="when it was made"),
    comment="the one spool directory that this database knows",
)

# What the views' columns are, for docs/inspect.md and for the comments on PostgreSQL.
_RECIPIENT_COLUMNS: dict[str, str] = {
    "queue_id": "32 hex digits, as in the 250 reply, in logs and file names",
    "queue_uuid": "the same as the tables keep it; sorts by arrival, and indexes find it",
    "position": "order of the RCPT command, from 1",
    "delivery": "number of the QMQP request that carries this recipient; those of one message and route share it",
    "state": "where it is; docs/inspect.md lists the states",
    "sender": "envelope sender; empty is the null sender",
    "recipient": "envelope recipient, without SMTP quoting",
    "size": "bytes of the stored body, lines ending in LF, our Received field included",
    "route": "name of the route; its servers are looked up at each attempt",
    "attempts": "times that a worker took it",
    "last_outcome": "outcome of the last attempt; docs/inspect.md lists the outcomes",
    "reason": "the server's words at the last attempt, or ours; bytes outside printable ASCII as \\xNN",
    "server": "server of the last attempt",
    "received_at": "when it was accepted",
    "next_at": "deferred: the next attempt; queued: when any worker takes it without a hint",
    "expires_at": "an attempt that fails after this is the last",
    "finished_at": "when it became final; empty while it is not",
    "worker": "the worker that is sending it",
    "pending_operation": "what an operator asked for while it is being sent",
    "client_address": "the SMTP client",
    "helo": "what it called itself",
    "protocol": "how it spoke (RFC 3848 keyword)",
    "header_message_id": "Message-ID of the header",
    "dsn_of": "the queue id that this notice is about; empty for other mail",
}
VIEW_COLUMNS = {
    "mail_queue": _RECIPIENT_COLUMNS,
    "mail_history": _RECIPIENT_COLUMNS,
    "queue_summary": {
        "state": "what is counted: where the deliveries are",
        "route": "and which way they go",
        "deliveries": "how many",
        "bytes": "sum of the sizes of their messages; empty for finished ones, whose files are gone",
        "oldest_at": "when the oldest was received; empty for finished ones",
        "oldest_seconds": "how long ago that is",
        "overdue": "how many are past the time when somebody was to look at them",
    },
    "server_health": {
        "server": "host:port, [v6]:port or unix:/path",
        "attempts": "tries",
        "delivered": "those with that outcome",
        "deferred": "those with that outcome",
        "rejected": "those with that outcome",
        "unreachable": "those with that outcome",
        "uncertain": "those that ended uncertain or malformed",
        "interrupted": "those with that outcome",
        "bytes_sent": "bytes of requests",
        "last_at": "the end of the last one",
        "circuit_open_workers": "how many workers send nothing there for now, because it fails or does not want us",
        "circuit_open_reason": "what it said, or did, to one of them",
        "paused_at": "since when an operator wants nothing sent there",
    },
}
