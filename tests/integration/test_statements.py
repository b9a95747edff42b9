"""Every named statement of every SQL file runs on both databases, against rows of every state.

A statement must exist for both databases, must be named by some code, and must give the same
columns and rows on both. A new parameter needs an example in EXAMPLES, or in
OWN_EXAMPLES if the name means something else in one module.
"""

import ast
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from relay.db.engine import connect, writing
from relay.db.sql import named_statements
from relay.queue.accept import Acceptor, NewMessage, NewRecipient
from relay.queue.states import FINAL, State
from tests.conftest import Databases
from tests.state_guard import unguarded

ROOT = Path(__file__).parents[2]
DATABASES = ("postgresql", "sqlite")
ROOMS = ("relay", "worker", "reception", "smtpd", "qmqpd", "commands", "migrations", "qmqp")
# A time so many seconds after now.
AFTER = {
    "postgresql": "(now() + {} * interval '1 second')",
    "sqlite": "((SELECT now FROM clock) + {} * 1000000)",
}
DUE = (State.QUEUED, State.SENDING, State.DEFERRED, State.BOUNCED, State.EXPIRED)
# The name whose statements run before.
BEFORE = {"create_views": "drop_views", "create_triggers": "drop_triggers"}
# Statements that one database alone needs, as (module, name).
ONE_DATABASE = {("worker.cleaner", "lock"), ("relay.queue.claim", "wait_for_rows")}

IDS = [f"00000000-0000-7000-8000-{n:012x}" for n in range(2 * len(State))]
WORKER = "00000000-0000-7000-8000-0000000000f0"
ACTION = "00000000-0000-7000-8000-0000000000f1"
SEGMENT = "00000000-0000-7000-8000-0000000000f2"
SENDING = IDS[2 * list(State).index(State.SENDING)]


def rows(**columns: Any) -> str:
    """A JSON parameter: a row for each message of IDS."""
    return json.dumps([{"queue_id": queue_id, **columns} for queue_id in IDS])


EXAMPLES: dict[str, Any] = {
    "action": ACTION,
    "announced": 7,
    "age": 3.0,
    "count": 7,
    "end": 8192,
    "hold_reason": None,
    "hold_source": None,
    "live": 5,
    "sparse": True,
    "patience": "1s",
    "oldest": IDS[0],
    "records": json.dumps([{"id": queue_id, "position": 5000} for queue_id in IDS]),
    "moves": json.dumps([{"id": IDS[0], "old_segment": SEGMENT, "old_position": 1, "position": 2}]),
    "segment": SEGMENT,
    "start": 4096,
    "address": "A@example.com",
    "address_from": "a@",
    "address_to": "aA",
    "after": IDS[-1],
    "actor": "me@example.com",
    "bound": "ffffffff-0000-7000-8000-000000000000",
    "child": 9,
    "circuits": json.dumps({"192.0.2.1:628": "refused"}),
    "claim_seconds": 1000,
    "completions": rows(
        worker=WORKER,
        number=1,
        claim=1,
        state="deferred",
        delay=5.0,
        deferrals=1,
        outcome="deferred",
        reply="Zlater",
        server="192.0.2.1:628",
        waiting_for=None,
    ),
    "delay": 10.0,
    "digits": SENDING[-12:],
    "deliveries": rows(number=9, route="default"),
    "error": "connection refused",
    "far": 1000.0,
    "finished": rows(sequence=1, claim=WORKER, report="done", delay=5.0),
    "files": json.dumps(IDS),
    "filter": "--state held",
    "free": 100,
    "fresh": 50,
    "gather": 30,
    "grace": 5.0,
    "greatest": IDS[-1],
    "held": rows(number=1, claim=9),
    "hold": False,
    "host": "host",
    "id": SENDING,
    "ids": json.dumps(IDS),
    "jitter": 0.5,
    "key": 1,
    "keys": rows(number=1),
    "late": 60.0,
    "lease": 60.0,
    "least": IDS[0],
    "lifetime": 1000.0,
    "limit": 60.0,
    "limits": 60.0,
    "long": 180.0,
    "longest": 3600.0,
    "mark": 5,
    "matched": 3,
    "messages_per_minute": 60,
    "messages": json.dumps(
        [
            {
                "id": "00000000-0000-7000-8000-0000000000ff",
                "sender": "a@example.com",
                "size": 9,
                "client_address": "192.0.2.1",
                "helo": "x",
                "protocol": "ESMTP",
                "client_trusted": True,
                "position": 5000,
            }
        ]
    ),
    "most": 100,
    "sends_dsns": True,
    "user": "ann",
    "names": json.dumps(["ann", "bob"]),
    "number": 1,
    "numbers": json.dumps([1]),
    "parent": 1,
    "password_hash": "$argon2id$",
    "pid": 1,
    "poison": 4,
    "positions": json.dumps([1, 2]),
    "put_off": json.dumps(IDS[:1]),
    "reason": "because",
    "recipients": rows(position=9, address="c@example.org", delivery=1),
    "reply": "Dno such user",
    "refusals": json.dumps(
        [{"subject": "client", "what": "messages", "name": "192.0.2.1", "refused": 2}]
    ),
    "retention": 0.0,
    "retries": 50,
    "role": "sender",
    "roles": json.dumps(["sender", "viewer"]),
    "root": 1,
    "route": "default",
    "routes": json.dumps(["default", "other"]),
    "sender": "a@example.com",
    "senders": json.dumps(["*@example.com"]),
    "seconds": 3600,
    "server": "192.0.2.1:628",
    "since": IDS[0],
    "skip": 3,
    "soon": 100_000_000.0,
    "slack": 60.0,
    "step": 300,
    "subject": "route:default",
    "attempts": rows(
        worker=WORKER,
        delivery=1,
        claim=9,
        attempt_index=1,
        server="192.0.2.1:628",
        outcome="deferred",
        reply="Zlater",
        bytes_sent=9,
        started_ago=2.0,
        finished_ago=1.0,
    ),
    "under_1d": IDS[1],
    "under_1h": IDS[3],
    "under_20m": IDS[4],
    "under_4h": IDS[2],
    "under_5m": IDS[5],
    "until": "never",
    "version": "1.2.3",
    "operation": "hold",
    "warned": True,
    "very_late": 3600.0,
    "view": "mail_queue",
    "why": "a reason",
    "scanned": 64,
    "seen": "never",
    "sequences": json.dumps([1, 2, 3]),
    "subscription": "billing",
    "subscriptions": json.dumps([{"name": "billing", "types": ["held"], "routes": None}]),
    "token": WORKER,
    "types": json.dumps(["accepted"]),
    "withheld": "rate",
    "worker": WORKER,
    "workers": json.dumps([WORKER]),
}
# Statements whose rows are text of the database's own.
OWN_TEXT = {("relay.report.queries", "view_definition"), ("relay.events.subscriptions", "seen")}
# By module, where a name means something else than elsewhere.
OWN_EXAMPLES: dict[str, dict[str, Any]] = {
    "relay.dsn.generator": {"id": IDS[2 * list(State).index(State.BOUNCED)]},
    "relay.events.outbox": {"after": 2, "queue_id": None},
    "relay.queue.claim": {"id": IDS[2 * list(State).index(State.SPLIT)]},
    "relay.report.queries": {"actor": "m%"},
    "relay.report.problems": {"least": 1, "slack": 0.0},
    "relay.spool.segments": {"segment": "00000000-0000-7000-8000-0000000000f3"},
    "relay.users": {"user": "bob"},
    "relay.queue.split": {"id": IDS[2 * list(State).index(State.HELD)]},
}


def _files() -> dict[str, set[str]]:
    """The modules that have SQL files, each with its databases."""
    found: dict[str, set[str]] = {}
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.sql"):
            subject, database, _ = file.name.rsplit(".", 2)
            module = ".".join((*file.parent.relative_to(ROOT).parts, subject))
            found.setdefault(module, set()).add(database)
    return found


FILES = _files()
NAMES = {
    (module, name): [d for d in sorted(FILES[module]) if name in named_statements(module, d)]
    for module in FILES
    for name in sorted({n for d in FILES[module] for n in named_statements(module, d)})
}
STATEMENTS = [pytest.param(module, name, id=f"{module}:{name}") for module, name in sorted(NAMES)]


def test_there_are_statements() -> None:
    assert len(STATEMENTS) > 20
    assert all(databases == set(DATABASES) for databases in FILES.values()), FILES


@pytest.mark.parametrize(("module", "name"), STATEMENTS)
def test_a_statement_exists_for_both_databases(module: str, name: str) -> None:
    assert (len(NAMES[module, name]) == 1) == ((module, name) in ONE_DATABASE)


def test_every_statement_is_named_by_code() -> None:
    texts: set[str] = set()
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            tree = ast.walk(ast.parse(file.read_text()))
            texts |= {str(node.value) for node in tree if isinstance(node, ast.Constant)}
    assert sorted(f"{m}:{name}" for m, name in NAMES if name not in texts) == []


def _outside_materialized(statement: str) -> str:
    """The statement without what stands within the parentheses of AS MATERIALIZED."""
    first, *queries = statement.split("AS MATERIALIZED (")
    for query in queries:
        depth, end = 1, 0
        while depth:
            depth += {"(": 1, ")": -1}.get(query[end], 0)
            end += 1
        first += query[end:]
    return first


def test_a_limit_of_changes_is_that_of_a_materialized_query() -> None:
    """PostgreSQL may run another subquery for each row, and then changes more than LIMIT says."""
    loose = [
        f"{module}:{name}"
        for module, name in NAMES
        for statement in named_statements(module, "postgresql").get(name, ())
        if re.search(r"^\s*(UPDATE|DELETE)\b", statement.text, re.MULTILINE)
        and "LIMIT" in _outside_materialized(statement.text)
    ]
    assert loose == []


@pytest.fixture(scope="module")
def engines(
    sqlite_template: Path,
    tmp_path_factory: pytest.TempPathFactory,
    postgres_databases: Databases,
) -> Iterator[dict[str, Engine]]:
    """Both databases with the same rows: each state, never claimed and claimed before, overdue and
    not."""
    directory = tmp_path_factory.mktemp("statements")
    for file in sqlite_template.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    name = postgres_databases.create()
    urls = {
        "sqlite": f"sqlite:///{directory}/relay.db",
        "postgresql": postgres_databases.url(name),
    }
    with ExitStack() as stack:
        stack.callback(postgres_databases.drop, name)
        filled = {database: connect(url, hot=True) for database, url in urls.items()}
        for database, engine in filled.items():
            stack.callback(engine.dispose)
            with writing(engine) as connection, unguarded(connection):
                _fill(engine, connection, AFTER[database])
        yield filled


def _fill(engine: Engine, connection: Connection, after: str) -> None:
    def run(sql: str, **values: Any) -> None:
        timed = re.sub(r"\bafter\(([-\d]+)\)", lambda match: after.format(match[1]), sql)
        connection.execute(text(timed), values)

    run(
        "INSERT INTO workers (id, host, pid, started_at, lease_expires_at, claim_seconds)"
        # No lease expires while the tests run, however long that takes.
        " VALUES (:worker, 'host', 1, after(-99), after(100000), 1000000)",
        worker=WORKER,
    )
    run("INSERT INTO pauses VALUES ('route:other', after(0), 'me', 'why')")
    run("INSERT INTO open_circuits VALUES (:worker, 'mx:628', 'why', after(-60))", worker=WORKER)
    run("INSERT INTO spool (id, created_at) VALUES (:id, after(-100))", id=SEGMENT)
    run("INSERT INTO segments (id, committed_to) VALUES (:id, 4096)", id=SEGMENT)
    for user, disabled in (("ann", "after(-9)"), ("bob", "NULL")):
        run(
            "INSERT INTO users VALUES (:user, '$argon2id$', 'sender', '[\"*\"]', NULL,"
            f" after(-99), {disabled}, NULL)",
            user=user,
        )
    for hours, count in ((1, 4), (2, 5), (30, 6)):
        run(
            "INSERT INTO rate_refusals VALUES ('client', 'messages', '192.0.2.1',"
            f" after(-{3600 * hours}), {count}, after(-{3600 * hours}))"
        )
    run("INSERT INTO dsn_limits VALUES ('a@example.com', after(-100))")
    run(
        "INSERT INTO subscriptions (name, routes, created_at, seen_at)"
        " VALUES ('billing', '[\"other\"]', after(-99), after(-9))"
    )
    run(
        "INSERT INTO audit VALUES (:action, after(0), 'me', 'hold', 'why', '--all', 1)",
        action=ACTION,
    )
    run("INSERT INTO audit_deliveries VALUES (:id, 1, :action)", id=IDS[0], action=ACTION)
    recipients = [NewRecipient("b@example.org"), NewRecipient("c@example.org", route="other")]
    sender = ("192.0.2.1", "client.example.com", "ESMTP")
    Acceptor(engine, lifetime=100_000.0, grace=5.0).insert(
        connection,
        [
            NewMessage(queue_id.replace("-", ""), "a@example.com", 100, recipients, *sender)
            for queue_id in IDS
        ],
    )
    run("DELETE FROM notifications WHERE queue_id > :id", id=IDS[5])
    run("UPDATE notifications SET due_at = after(-5), queued_at = after(-7200)")
    for queue_id, (state, claimed) in zip(IDS, product(State, (False, True)), strict=True):
        due = "after(-50)" if claimed else "after(50000)"
        run(
            f"""UPDATE deliveries SET state = :state, claim_count = :claims,
                due_at = {due if state in DUE else "NULL"},
                finished_at = {"after(-9)" if state in FINAL else "NULL"},
                worker = :worker, waiting_for = :waiting_for, last_outcome = :outcome,
                last_reply = 'its words', reason_source = 'server'
            WHERE queue_id = :id AND number = 1""",
            id=queue_id,
            state=state,
            claims=int(claimed),
            worker=WORKER if state is State.SENDING else None,
            waiting_for="route:default" if state is State.DEFERRED else None,
            outcome="deferred" if claimed else None,
        )
        if claimed:
            run(
                "INSERT INTO attempts VALUES"
                " (:id, 1, 1, 1, :worker, 'mx:628', after(-2), after(-1), 'deferred', 'x', 9)",
                id=queue_id,
                worker=WORKER,
            )


@pytest.mark.parametrize(("module", "name"), STATEMENTS)
def test_a_statement_gives_the_same_on_both_databases(
    engines: dict[str, Engine], module: str, name: str
) -> None:
    results = {}
    for database in NAMES[module, name]:
        writer = engines[database].execution_options(relay_writing=True)
        with writer.connect() as connection:
            results[database] = _run(connection, module, name, database)
            connection.rollback()
    if (module, name) in OWN_TEXT:
        results = {database: columns for database, (columns, _) in results.items()}
    first, *others = results.values()
    assert all(other == first for other in others)


def _run(connection: Connection, module: str, name: str, database: str) -> Any:
    """Run the statements of a name; the result of the last one: columns and rows, or their
    number."""
    examples = EXAMPLES | OWN_EXAMPLES.get(module, {})
    result: Any = None
    statements = named_statements(module, database)
    for statement in statements.get(BEFORE.get(name, ""), ()) + statements[name]:
        wanted = set(statement.compile().params)
        assert wanted <= set(examples), f"EXAMPLES lacks {sorted(wanted - set(examples))}"
        result = connection.execute(statement, examples)
    if not result.returns_rows:
        return result.rowcount
    return list(result.keys()), sorted([_comparable(value) for value in row] for row in result)


def _comparable(value: Any) -> str:
    """A value as both databases have it: SQLite has no dates, booleans and arrays, and fractions
    depend on the time of the run."""
    if isinstance(value, datetime) or (isinstance(value, int) and value > 10**14):
        return "a time"
    if isinstance(value, float | Decimal):
        return "a number"
    if isinstance(value, list):
        return json.dumps(value, separators=(",", ":"))
    text = str(int(value) if isinstance(value, bool) else value)
    return "a time" if re.match(r"\d{4}-\d\d-\d\d[ T]\d\d:", text) else text
