"""`qmqp-relay actions`: what operators did, the newest first.

The rows are those of the audit: an operation, who ran it and why, with its filter and the number of
deliveries that it changed. With an id they are those of one message, with the pauses of its routes
and servers while it was unfinished. What must stay true: reading changes nothing.
"""

from functools import partial

from commands.errors import DONE, NOTHING_MATCHED, say
from commands.ops.database import opened
from commands.output import Columns, stamp, write
from relay.report.filters import like
from relay.report.queries import QueueReader
from relay.report.rows import Row
from relay.settings import Settings, load

EVER = 1e9  # seconds: longer than any row is kept
MOST = 1000  # rows, unless a limit is given


def _columns(*names: str) -> Columns:
    return {
        "AT": lambda row: stamp(row["acted_at"]),
        "BY": lambda row: str(row["actor"]),
        "OPERATION": lambda row: str(row["operation"]),
        **{name.upper(): partial(_text, name) for name in names},
    }


def _text(name: str, row: Row) -> str:
    return str(row[name] or "")


def show_actions(
    queue_id: str | None,
    *,
    newer_than: float | None,
    actor: str | None,
    limit: int | None,
    form: str,
) -> int:
    """Print the operations of the last seconds, of operators whose name matches; the exit
    status."""
    with opened(load(Settings)) as engine:
        queue = QueueReader(engine)
        if queue_id is None:
            rows = queue.read(
                "actions",
                seconds=EVER if newer_than is None else newer_than,
                actor=like(actor or "*"),
                most=limit or MOST,
            )
            columns = _columns("changed", "filter", "reason")
        else:
            rows = _of_message(queue, queue_id)[: limit or MOST]
            columns = _columns("delivery", "reason")
    if write(rows, columns, form=form):
        return DONE
    say("no operation matches" if newer_than or actor else "no operation is recorded")
    return NOTHING_MATCHED


def _of_message(queue: QueueReader, queue_id: str) -> list[Row]:
    return list(reversed(queue.operations_on(queue.resolve(queue_id))))
