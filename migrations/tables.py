"""The tables and columns after all migrations, and the meaning of the columns of the views.

Only migrations and tests use this: tests let Alembic compare it with a database after the
migrations, and `migrations.views` writes its comments to PostgreSQL. docs/inspect.md has the same
texts. What must stay true: a change here comes with a migration. A migration takes nothing from
here but the views and the comments, because it must not change later.
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

from relay.db.schema import literals
from relay.queue.outcome import Outcome
from relay.queue.states import UNFINISHED, State
from relay.users import Role

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
        comment="bytes of the stored body, with LF line ends and the Received field of the relay",
    ),
    Column("received_at", Instant, nullable=False, comment="when the message was accepted"),
    Column("client_address", Text, nullable=False, comment="address of the SMTP client"),
    Column("helo", Text, nullable=False, comment="name that the client gave in HELO or EHLO"),
    Column("protocol", Text, nullable=False, comment="RFC 3848 keyword, such as ESMTP"),
    Column("auth_user", Text, comment="the user that logged in to send it; empty: none did"),
    Column("header_message_id", Text, comment="Message-ID of the header"),
    Column("body_type", Text, comment="BODY= of MAIL (RFC 6152)"),
    Column("ret", Text, comment="RET= of MAIL (RFC 3461)"),
    Column("envid", Text, comment="ENVID= of MAIL (RFC 3461), xtext"),
    Column("dsn_of", Id, comment="the message that this DSN is about; empty for other mail"),
    Column(
        "client_trusted",
        Boolean,
        comment="whether the client is in CLIENT_NETWORKS or has logged in;"
        " empty: a DSN, or a row from before this column",
    ),
    Column(
        "dsn_content",
        Text,
        comment="how much of the original a DSN encloses: full, header or none;"
        " empty for other mail",
    ),
    Column("segment", Id, comment="segment of the journal that has the body; empty: a file has it"),
    Column("position", BigInteger, comment="where the body begins in the segment"),
    Column("tls", Text, comment="protocol and cipher of the SMTP connection; empty: plain text"),
    Column("prefix", Text, comment="header fields that plugins have added before the body"),
    Index("messages_sender", "sender", postgresql_ops={"sender": "text_pattern_ops"}),
    Index(None, "header_message_id"),
    comment="accepted messages; nothing in a row changes but the place of its body",
)

recipients = Table(
    "recipients",
    metadata,
    Column("queue_id", Id, nullable=False, comment="the message that is sent to it"),
    Column("position", Integer, nullable=False, comment="order of the RCPT command, from 1"),
    Column(
        "address",
        Text,
        nullable=False,
        comment="envelope recipient, local part without SMTP quoting",
    ),
    Column("delivery", Integer, nullable=False, comment="number of the delivery that has it"),
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
    Column("state", Text, nullable=False, comment="its state; docs/inspect.md lists the states"),
    Column("due_at", Instant, comment="when the delivery needs attention; empty if it needs none"),
    Column(
        "expires_at",
        Instant,
        nullable=False,
        comment="an attempt that fails after this is the last",
    ),
    Column("worker", Id, comment="the worker that is sending it"),
    Column(
        "claim_count",
        Integer,
        nullable=False,
        server_default="0",
        comment="how often it was claimed; the number of the last claim",
    ),
    Column(
        "deferrals",
        Integer,
        nullable=False,
        server_default="0",
        comment="how often in a row it was deferred",
    ),
    Column(
        "crash_count",
        Integer,
        nullable=False,
        server_default="0",
        comment="how many workers in a row were lost while sending it",
    ),
    Column(
        "pending_operation", Text, comment="operation that was requested while it was being sent"
    ),
    Column("last_outcome", Text, comment="outcome of the last attempt"),
    Column(
        "last_reply",
        Text,
        comment="reply of the server at the last attempt, or the reason that the relay or"
        " an operator gave; reason_source says which",
    ),
    Column("last_server", Text, comment="server of the last attempt"),
    Column("finished_at", Instant, comment="when it became final; empty while it is not"),
    Column("pending_reason", Text, comment="who requested pending_operation, and why"),
    Column("warned_at", Instant, comment="when a delay warning was generated"),
    Column(
        "waiting_for",
        Text,
        comment="route:NAME: due as soon as a server of that route replies",
    ),
    Column(
        "dsn_withheld",
        Text,
        comment="why its sender gets no DSN: rate, postmaster or address; empty: no such reason",
    ),
    Column(
        "warn_at",
        Instant,
        comment="when the sender is warned that the message is late; empty: never, or it was done",
    ),
    Column("reason_source", Text, comment="source of last_reply: server, relay or operator"),
    PrimaryKeyConstraint("queue_id", "number"),
    CheckConstraint(f"state IN ({literals(State)})", name="state"),
    CheckConstraint(
        "due_at IS NOT NULL OR state NOT IN ('queued', 'sending', 'deferred')",
        name="due_where_the_state_needs_it",
    ),
    CheckConstraint("(worker IS NOT NULL) = (state = 'sending')", name="worker_while_sending"),
    # Retries and mail that was never claimed lie apart, each by `due_at`: a poll takes some of
    # either.
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
    _some("dsn_pending", "state IN ('bounced', 'expired') AND due_at IS NOT NULL", "due_at"),
    _some("held", "state = 'held'", "queue_id"),
    _some("finished", f"state NOT IN ({literals(UNFINISHED)})", "state", "route"),
    comment="the queue: a row is one QMQP request",
    postgresql_with={
        "fillfactor": 80,
        "autovacuum_vacuum_scale_factor": 0.02,
        "autovacuum_analyze_scale_factor": 0.02,
    },
)

attempts = Table(
    "attempts",
    metadata,
    Column("queue_id", Id, nullable=False, comment="the message of the delivery"),
    Column("delivery", Integer, nullable=False, comment="number of the delivery"),
    Column("claim", Integer, nullable=False, comment="number of the claim, from 1"),
    Column(
        "attempt_index",
        Integer,
        nullable=False,
        comment="number of the attempt within the claim, from 1; 0: the worker was lost",
    ),
    Column("worker", Id, nullable=False, comment="the worker"),
    Column("server", Text, comment="the server; empty if the worker was lost"),
    Column("started_at", Instant, nullable=False, comment="when it began to connect"),
    Column("finished_at", Instant, nullable=False, comment="when the attempt ended"),
    Column(
        "outcome",
        Text,
        nullable=False,
        comment="its outcome; docs/inspect.md lists the outcomes",
    ),
    Column(
        "reply",
        Text,
        nullable=False,
        comment="reply of the server, or the reason that the relay gave;"
        " bytes outside printable ASCII as \\xNN",
    ),
    Column(
        "bytes_sent", BigInteger, nullable=False, comment="how many bytes of the request were sent"
    ),
    PrimaryKeyConstraint("queue_id", "delivery", "claim", "attempt_index"),
    CheckConstraint(f"outcome IN ({literals(Outcome)})", name="outcome"),
    Index("attempts_finished_at", "finished_at", postgresql_using="brin"),
    Index(
        "attempts_uncertain",
        "queue_id",
        "delivery",
        postgresql_where=text("outcome IN ('uncertain', 'malformed')"),
        sqlite_where=text("outcome IN ('uncertain', 'malformed')"),
    ),
    comment="attempts, each at one server",
)

workers = Table(
    "workers",
    metadata,
    Column(
        "id",
        Id,
        primary_key=True,
        comment="UUIDv7; deliveries.worker and attempts.worker refer to it",
    ),
    Column("host", Text, nullable=False, comment="host name of its machine"),
    Column("pid", Integer, nullable=False, comment="its process id"),
    Column("started_at", Instant, nullable=False, comment="when it started"),
    Column(
        "lease_expires_at",
        Instant,
        nullable=False,
        comment="end of the lease; the worker renews it",
    ),
    Column("ended_at", Instant, comment="when it stopped, or was expired by another worker"),
    Column("end_reason", Text, comment="stopped or expired"),
    Column("claim_seconds", Integer, comment="seconds from a claim to the due_at of the delivery"),
    Column(
        "routes", Text, comment="the routes that it knows, JSON: a list of servers for each name"
    ),
    Column("version", Text, comment="version of the program that it runs"),
    comment="worker processes and their leases",
)

audit = Table(
    "audit",
    metadata,
    Column("id", Id, primary_key=True, comment="UUIDv7; audit_deliveries.audit_id refers to it"),
    Column("at", Instant, nullable=False, comment="when the operation ran"),
    Column("actor", Text, nullable=False, comment="the operator, as user@host"),
    Column(
        "operation",
        Text,
        nullable=False,
        comment="the operation, such as retry; for pause and resume also the subject",
    ),
    Column("reason", Text, nullable=False, comment="the reason that the operator gave"),
    Column("filter", Text, nullable=False, comment="its filter, as options of the command"),
    Column("matched", Integer, nullable=False, comment="how many deliveries it changed"),
    comment="operations of operators",
)

audit_deliveries = Table(
    "audit_deliveries",
    metadata,
    Column("queue_id", Id, nullable=False, comment="the message of the delivery"),
    Column("delivery", Integer, nullable=False, comment="number of the delivery"),
    Column("audit_id", Id, nullable=False, comment="the row of audit"),
    PrimaryKeyConstraint("queue_id", "delivery", "audit_id"),
    comment="the deliveries that an operation changed",
)

pauses = Table(
    "pauses",
    metadata,
    Column("subject", Text, primary_key=True, comment="route:NAME or server:NAME"),
    Column("since", Instant, nullable=False, comment="when it was paused"),
    Column("actor", Text, nullable=False, comment="the operator, as user@host"),
    Column("reason", Text, nullable=False, comment="the reason that the operator gave"),
    comment="routes and servers that operators have paused",
)

open_circuits = Table(
    "open_circuits",
    metadata,
    Column("worker", Id, nullable=False, comment="the worker"),
    Column("server", Text, nullable=False, comment="the server, as in the settings"),
    Column(
        "why",
        Text,
        nullable=False,
        comment="reply of the server, or the reason that the relay gave, at the last failure",
    ),
    Column("since", Instant, comment="when the circuit opened; empty: before this column"),
    PrimaryKeyConstraint("worker", "server"),
    comment="circuits that are open in a worker; rows of ended workers do not count",
)

dsn_limits = Table(
    "dsn_limits",
    metadata,
    Column("sender", Text, primary_key=True, comment="envelope sender of the original"),
    Column("last_at", Instant, nullable=False, comment="when the last such DSN was generated"),
    comment="senders that got a DSN about mail from an untrusted client in the last minute",
)

segments = Table(
    "segments",
    metadata,
    Column("id", Id, primary_key=True, comment="UUIDv7; also in the name of the file"),
    Column(
        "committed_to",
        BigInteger,
        nullable=False,
        comment="position up to which the messages of the segment have their rows",
    ),
    Column("sealed_at", Instant, comment="when its last message had its row; empty: in use"),
    Column("messages", BigInteger, comment="how many messages it has; empty until it is sealed"),
    Column("least_id", Id, comment="the least queue id in it; empty: not known"),
    Column("greatest_id", Id, comment="the greatest queue id in it"),
    Column(
        "live_bytes",
        BigInteger,
        comment="bytes in it that deliveries needed at the last look; empty: not looked at yet",
    ),
    Column("checked_at", Instant, comment="when a cleaner looked last"),
    Column("sparse_since", Instant, comment="since when little of it is needed"),
    comment="segments of the journal that have files",
)

events = Table(
    "events",
    metadata,
    Column(
        "sequence",
        BigInteger().with_variant(Integer, "sqlite"),
        primary_key=True,
        comment="order of the events; within a delivery it is that in which they happened",
    ),
    Column("id", Text, nullable=False, comment="the id that receivers get, as webhook-id"),
    Column("at", Instant, nullable=False, comment="when it happened"),
    Column("type", Text, nullable=False, comment="its type; docs/webhooks.md lists the types"),
    Column("queue_id", Id, nullable=False, comment="the message"),
    Column("delivery", Integer, nullable=False, comment="number of the delivery"),
    Column("route", Text, nullable=False, comment="route of the delivery then"),
    Column("attempt", Integer, comment="number of the claim; empty: before the first one"),
    Column("server", Text, comment="server of the last attempt"),
    Column("outcome", Text, comment="outcome of the last attempt"),
    Column("reply", Text, comment="reply of the server, or the reason, as in last_reply"),
    Column("reason_source", Text, comment="source of reply: server, relay or operator"),
    Column("next_at", Instant, comment="when the next attempt is due"),
    Index("events_queue_id", "queue_id"),
    Index("events_at", "at", postgresql_using="brin"),
    comment="what became of deliveries, while there is a subscription",
)

subscriptions = Table(
    "subscriptions",
    metadata,
    Column("name", Text, primary_key=True, comment="name of the webhook; plugin:NAME for a plugin"),
    Column("types", Text, comment="the types that it gets, JSON; empty: all"),
    Column("routes", Text, comment="the routes whose events it gets, JSON; empty: all"),
    Column("created_at", Instant, nullable=False, comment="when a worker registered it first"),
    Column("seen_at", Instant, nullable=False, comment="when a worker renewed it last"),
    Column("disabled_at", Instant, comment="since when it gets nothing; empty: it is not disabled"),
    Column("disabled_reason", Text, comment="why it is disabled"),
    Column("failing_since", Instant, comment="since when no event arrives; empty: events arrive"),
    Column("last_error", Text, comment="why the last event did not arrive"),
    Column("succeeded_at", Instant, comment="when an event last arrived, to the minute"),
    comment="who gets events",
)

notifications = Table(
    "notifications",
    metadata,
    Column("queue_id", Id, nullable=False, comment="the message of the event"),
    Column("subscription", Text, nullable=False, comment="name of the subscription"),
    Column("sequence", BigInteger, nullable=False, comment="the event"),
    Column("queued_at", Instant, nullable=False, comment="when it happened, or was replayed"),
    Column("due_at", Instant, nullable=False, comment="the next try, or the end of its claim"),
    Column("tries", Integer, nullable=False, server_default="0", comment="tries that failed"),
    Column("claim", Id, comment="the claim of the worker that delivers it"),
    PrimaryKeyConstraint("queue_id", "subscription", "sequence"),
    Index("notifications_due", "subscription", "due_at", "sequence"),
    comment="events that a subscription has not got yet",
)

spool = Table(
    "spool",
    metadata,
    Column("id", Id, primary_key=True, comment="also written in the spool directory, as spool-id"),
    Column("created_at", Instant, nullable=False, comment="when it was created"),
    Column(
        "mark",
        BigInteger,
        nullable=False,
        server_default="0",
        comment="rises while the relay works; the spool has the highest one, so that it notices"
        " a database that was restored from a backup",
    ),
    comment="the one spool directory that this database knows",
)

users = Table(
    "users",
    metadata,
    Column("name", Text, primary_key=True, comment="the name that logs in, in lower case"),
    Column("password_hash", Text, nullable=False, comment="argon2id, as the reference code has it"),
    Column("role", Text, nullable=False, comment="what it may do: sender, viewer or operator"),
    Column("senders", Text, nullable=False, comment="patterns of the senders it may use, JSON"),
    Column("messages_per_minute", Integer, comment="most messages a minute; empty: no limit"),
    Column("created_at", Instant, nullable=False, comment="when it was added"),
    Column("disabled_at", Instant, comment="when it was disabled; empty while it is not"),
    Column("last_seen_at", Instant, comment="when it last logged in or sent a message"),
    CheckConstraint(f"role IN ({literals(Role)})", name="role"),
    comment="who may log in with a password",
)

rate_refusals = Table(
    "rate_refusals",
    metadata,
    Column("subject", Text, comment="whose rate it was: client, sender or user"),
    Column("what", Text, comment="what was refused: messages, recipients or connections"),
    Column("name", Text, comment="network, address or name; empty: several others"),
    Column("hour", Instant, comment="beginning of the hour"),
    Column("refused", BigInteger, nullable=False, comment="how many were refused in that hour"),
    Column("last_at", Instant, nullable=False, comment="when the last one was refused"),
    PrimaryKeyConstraint("subject", "what", "name", "hour", name="rate_refusals_key"),
    comment="refusals by RELAY_RATE_LIMITS and limits of users, of the last day",
)

# The meaning of the columns of the views, for docs/inspect.md and for the comments on PostgreSQL.
_RECIPIENT_COLUMNS: dict[str, str] = {
    "queue_id": "32 hex digits, as in the 250 reply, in logs and in names of files",
    "queue_uuid": "the same id as in the tables; it sorts by arrival, and indexes find it",
    "position": "order of the RCPT command, from 1",
    "delivery": "number of the QMQP request that has this recipient;"
    " at first the recipients of one message and route share a request",
    "state": "state of the delivery; docs/inspect.md lists the states",
    "sender": "envelope sender; empty: the null sender",
    "recipient": "envelope recipient, local part without SMTP quoting",
    "domain": "part of the recipient after the last @, in lower case",
    "size": "bytes of the stored body, with LF line ends and the Received field of the relay",
    "route": "name of the route; its servers are looked up at each attempt",
    "servers": "unfinished: the servers that it is for, those of its route today, in order",
    "attempts": "how often a worker has claimed the delivery",
    "last_outcome": "outcome of the last attempt; docs/inspect.md lists the outcomes",
    "reason": "why it is in its state: the pause that it waits behind, else last_reply",
    "last_reply": "reply of the server at the last attempt, or the reason that the relay or"
    " an operator gave; bytes outside printable ASCII as \\xNN",
    "server": "server of the last attempt",
    "received_at": "when the message was accepted",
    "next_at": "deferred: the next attempt; queued: when any worker claims it without a hint",
    "expires_at": "an attempt that fails after this is the last",
    "finished_at": "when it became final; empty while it is not",
    "paused_at": "since when it waits behind a pause: of its route, or of all servers of the route",
    "worker": "the worker that is sending it",
    "pending_operation": "operation that was requested while it is being sent",
    "client_address": "address of the SMTP client",
    "auth_user": "the user that logged in to send it; empty: none did",
    "helo": "name that the client gave in HELO or EHLO",
    "protocol": "RFC 3848 keyword, such as ESMTP",
    "header_message_id": "Message-ID of the header",
    "dsn_of": "queue id of the message that this DSN is about; empty for other mail",
    "tls": "protocol and cipher of the SMTP connection; empty: plain text",
}
VIEW_COLUMNS = {
    "mail_queue": _RECIPIENT_COLUMNS,
    "mail_history": _RECIPIENT_COLUMNS,
    "queue_summary": {
        "state": "state of the deliveries",
        "route": "route of the deliveries",
        "deliveries": "how many deliveries",
        "bytes": "sum of the sizes of their messages; empty for finished ones",
        "oldest_at": "when the oldest was received; empty for finished ones",
        "oldest_seconds": "seconds since oldest_at",
        "overdue": "how many are overdue: a worker should have claimed or requeued them by now;"
        " mail behind a pause is not",
        "paused": "how many wait behind a pause",
    },
    "server_health": {
        "server": "host:port, [v6]:port or unix:/path",
        "attempts": "attempts of the last hour",
        "delivered": "attempts with this outcome",
        "deferred": "attempts with this outcome",
        "rejected": "attempts with this outcome",
        "unreachable": "attempts with this outcome",
        "uncertain": "attempts with the outcome uncertain or malformed",
        "interrupted": "attempts with this outcome",
        "bytes_sent": "bytes of requests",
        "last_at": "end of the last attempt",
        "circuit_open_workers": "how many workers have an open circuit to it:"
        " it fails, or does not authorize the relay",
        "circuit_open_reason": "reason of one of these workers",
        "failed_at": "when the first of these circuits opened",
        "paused_at": "when an operator paused it; empty if it is not paused",
        "waiting": "how many deliveries wait for it: queued and deferred ones of its routes,"
        " each counted under every server of the route",
    },
    "mail_attempts": {
        "queue_id": "32 hex digits, as in the 250 reply, in logs and in names of files",
        "queue_uuid": "the same id as in the tables; it sorts by arrival, and indexes find it",
        "delivery": "number of the QMQP request",
        "route": "its route today",
        "claim": "number of the claim, from 1",
        "attempt_index": "number of the attempt within the claim, from 1; 0: the worker was lost",
        "worker": "the worker",
        "server": "the server; empty if the worker was lost",
        "started_at": "when it began to connect",
        "finished_at": "when the attempt ended",
        "seconds": "how long it took",
        "outcome": "its outcome",
        "reply": "reply of the server, or the reason that the relay gave",
        "bytes_sent": "how many bytes of the request were sent",
    },
    "operator_actions": {
        "action_id": "UUIDv7; it sorts by time",
        "acted_at": "when the operation ran",
        "actor": "the operator, as user@host",
        "operation": "the operation, such as retry; for pause and resume also the subject",
        "changed": "how many deliveries it changed; 1 for pause and resume",
        "filter": "its filter, as options of the command",
        "reason": "the reason that the operator gave",
    },
    "mail_actions": {
        "queue_id": "message of the delivery, 32 hex digits",
        "queue_uuid": "the same id as in the tables",
        "delivery": "number of the delivery",
        "action_id": "the row of operator_actions",
        "acted_at": "when the operation ran",
        "actor": "the operator, as user@host",
        "operation": "the operation",
        "reason": "the reason that the operator gave",
    },
    "worker_health": {
        "worker": "its id, as in mail_queue",
        "host": "host name of its machine",
        "pid": "its process id",
        "version": "version of the program that it runs",
        "started_at": "when it started",
        "lease_expires_at": "end of the lease; the worker renews it",
        "ended_at": "when it stopped, or was expired by another worker",
        "end_reason": "stopped or expired",
        "alive": "whether it has not ended and its lease is valid",
        "sending": "how many deliveries it is sending",
    },
    "domain_summary": {
        "domain": "part of the recipient after the last @, in lower case",
        "deliveries": "how many unfinished deliveries have such a recipient",
        "recipients": "how many of their recipients have this domain",
        "oldest_at": "when the oldest was received",
    },
    "reason_summary": {
        "reason": "reason of unfinished mail, with addresses, ids and numbers masked; that of a"
        " pause as it is",
        "deliveries": "how many unfinished deliveries have it",
        "recipients": "how many recipients these have",
        "oldest_at": "when the oldest was received",
    },
    "mail_flow": {
        "minutes": "the last minute, ten minutes, or hour",
        "received": "deliveries of messages that were accepted in this time, also of DSNs",
        "finished": "attempts with the outcome delivered or rejected in this time",
        "waiting": "deliveries that are queued or deferred now",
        "drain_seconds": "how long these take if as many more are finished than received;"
        " empty: they do not become fewer",
    },
    "paused": {
        "subject": "route:NAME or server:NAME",
        "paused_at": "when it was paused",
        "actor": "the operator, as user@host",
        "reason": "the reason that the operator gave",
        "deliveries": "how many deliveries wait behind it; behind that of a server wait those of"
        " routes whose every server is paused",
    },
    "route_servers": {
        "route": "name of the route",
        "position": "order in which the servers are tried, from 1",
        "server": "host:port, [v6]:port or unix:/path",
    },
}
