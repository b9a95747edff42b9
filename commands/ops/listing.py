"""`qmqp-relay list`: the rows that a filter matches, or their number by a key.

Rows are printed as they come from the database. JSON and text with tabs are made by the database,
a table and CSV in Python. What must stay true: every form has the same rows in the same order; only
a table shortens a value.
"""

from dataclasses import dataclass

from commands.errors import DONE, NOTHING_MATCHED, WRONG_USE, CommandError, say
from commands.ops.columns import COLUMNS, LISTED, LOCAL_COLUMNS, columns_of
from commands.ops.database import opened, resolved
from commands.output import Columns, write, write_lines
from relay.report.filters import Filter
from relay.report.queries import COUNT_KEYS, QueueReader
from relay.settings import Settings, load


@dataclass(frozen=True, slots=True)
class ListOptions:
    """What of the list is printed, and how. `everything`: finished mail too. `columns`: these
    columns of the view alone. `form`: table, json, csv or tsv. `local`: a table has local times."""

    everything: bool = False
    limit: int | None = None
    newest: bool = False
    columns: tuple[str, ...] = ()
    form: str = "table"
    local: bool = False


def list_queue(filter_: Filter, options: ListOptions, *, count_by: str | None = None) -> int:
    """Print what matches, a row for each recipient or for each value of a key; the exit status."""
    if count_by is not None and count_by not in COUNT_KEYS:
        keys = ", ".join(COUNT_KEYS)
        raise CommandError(WRONG_USE, f"cannot count by {count_by}: choose one of {keys}")
    with opened(load(Settings)) as engine:
        queue = QueueReader(engine)
        filter_ = resolved(queue, filter_)
        listed = _count(queue, filter_, options, count_by) if count_by else None
        count = _list(queue, filter_, options) if listed is None else listed
    if count:
        return DONE
    everything = options.everything or filter_.is_history()
    if filter_.shown():
        say("no mail matches" if everything else "no unfinished mail matches; try --all")
    else:
        say("no mail is kept" if everything else "the queue is empty")
    return NOTHING_MATCHED


def _list(queue: QueueReader, filter_: Filter, options: ListOptions) -> int:
    """Print the rows; their number."""
    known = queue.columns() if options.columns else ()
    if unknown := [name for name in options.columns if name not in known]:
        text = f"no column {', '.join(unknown)}: choose some of {', '.join(known)}"
        raise CommandError(WRONG_USE, text)
    if options.form in ("json", "tsv"):
        lines = queue.lines(
            filter_,
            limit=options.limit,
            finished=options.everything,
            newest=options.newest,
            objects=options.form == "json",
            columns=options.columns,
        )
        return write_lines(lines, json_lines=options.form == "json")
    whole = "*" if options.form == "csv" else LISTED
    rows = queue.rows(
        filter_,
        limit=options.limit,
        finished=options.everything,
        newest=options.newest,
        columns=", ".join(options.columns) or whole,
    )
    default = LOCAL_COLUMNS if options.local else COLUMNS
    shown = columns_of(*options.columns) if options.columns else default
    return write(rows, shown, form=options.form)


def _count(queue: QueueReader, filter_: Filter, options: ListOptions, key: str) -> int:
    """Print how many there are of each value of the key; the number of values."""
    rows = queue.counted_by(key, filter_, finished=options.everything)
    columns: Columns = columns_of("deliveries", "recipients", "oldest_at", key)
    return write(rows[: options.limit], columns, form=options.form)
