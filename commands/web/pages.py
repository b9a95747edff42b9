"""The pages: each method answers one request of a visitor from the queue's rows and a template.

What must stay true: templates escape what peers wrote; a fault of our own says only that it is in
the log.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from sqlalchemy import Engine
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse

from commands.ops.show import OUTCOMES, described, report_on, stored_header
from commands.output import ago, csv_lines, cut, due, plain, size, span, stamp
from commands.web import charts, search
from commands.web.access import Visitor
from commands.web.acting import NAMES, SWITCHES, Acting
from commands.web.overview import Overview
from commands.web.text import address, unbroken
from commands.web.timeline import timeline
from relay.db.engine import is_outage
from relay.ids import made_at
from relay.log import get_logger
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.report.filters import like
from relay.report.queries import COUNT_KEYS, NoSuchMessage, QueueReader
from relay.report.rows import Row
from relay.settings import SmtpdSettings, seconds
from relay.spool.store import BodyUnsendable

log = get_logger(__name__)
TEMPLATES = Path(__file__).with_name("templates")
PAGE_ROWS = 50
GROUPS = 200  # of a count
TOTAL_ROWS = 10_000  # recipients that are counted for the totals
ACTIONS = 200
EVER = 1e9  # seconds: longer than any row is kept


@dataclass(frozen=True, slots=True)
class Totals:
    """How many recipients and deliveries match. `partial`: there are more; `since`: only mail that
    was received since then is counted."""

    recipients: int
    deliveries: int
    states: dict[str, int]
    partial: bool
    since: str


class Pages:
    """The pages; one object for each process."""

    def __init__(self, engine: Engine, settings: SmtpdSettings) -> None:
        self._queue = QueueReader(engine)
        self._settings = settings
        self._acting = Acting(engine, settings)
        self.overview = Overview(engine, settings)
        self._templates = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=lambda value: plain(value) if type(value) is str else value,
        )
        self._templates.globals |= {
            "ago": ago,
            "cut": cut,
            "due": due,
            "size": size,
            "span_of": span,
            "stamp": stamp,
            "states": list(State),
            "outcomes": OUTCOMES,
            "link_of": search.link_of,
            "link_of_filter": search.link_of_filter,
            "narrowed": search.narrowed,
        }
        self._templates.filters |= {"unbroken": unbroken, "address": address}

    def queue(self, request: Request, visitor: Visitor) -> Response:
        """The whole queue at a glance."""
        name = request.query_params.get("span", charts.USUAL)
        if name not in charts.SPANS:
            raise HTTPException(400, f"There is no span {name}: {', '.join(charts.SPANS)}.")
        values = self.overview.values(name)
        return self.page("overview.html", visitor, spans=charts.SPANS, **values)

    def listing(self, request: Request, visitor: Visitor) -> Response:
        """Mail that matches, a page at a time, or its number by a key. Without an index a page
        covers a bounded number of messages."""
        fields = search.values_of(request.query_params.multi_items())
        after = request.query_params.get("after", "")
        found: dict[str, Any] = {"rows": [], "groups": [], "fault": ""}
        try:
            asked, last = search.parse(fields, self._queue.resolve), self._last_row(after)
            found |= self._count(asked) if asked.count_by else self._find(asked, fields, last)
        except (NoSuchMessage, ValueError) as error:
            found["fault"] = str(error)
        return self.page(
            "search.html",
            visitor,
            **({"totals": None, "more": "", "until": "", "unshown": 0} | found),
            later=after,
            fields=fields,
            one=_Fields(fields),
            query=urlencode(fields),
            operation_links=_operations(fields),
            **_FORM,
            more_fields=any(name not in (*search.FIRST, "state") for name, _ in fields),
        )

    def _count(self, asked: search.Search) -> dict[str, Any]:
        finished = not asked.unfinished
        groups = self._queue.counted_by(asked.count_by, asked.filter_, finished=finished)
        return {"groups": groups[:GROUPS], "unshown": max(0, len(groups) - GROUPS)}

    def _find(
        self, asked: search.Search, fields: search.Values, last: tuple[str, int] | None
    ) -> dict[str, Any]:
        """A page of rows, and on the first page their totals."""
        finished, newest = not asked.unfinished, not asked.oldest
        horizon = self._queue.horizon(asked.filter_, last) if newest else None
        matching = self._queue.rows(
            asked.filter_,
            finished=finished,
            newest=newest,
            after=last,
            down_to=horizon,
            limit=PAGE_ROWS + 1,
        )
        rows, next_ = list(matching), ""
        until = _received(horizon) if horizon and len(rows) <= PAGE_ROWS else ""
        if len(rows) > PAGE_ROWS:
            next_ = f"{rows[PAGE_ROWS - 1]['queue_id']}.{rows[PAGE_ROWS - 1]['position']}"
        elif horizon:
            next_ = f"{horizon}.0"
        totals = None if last or not rows else self._totals(asked, horizon)
        more = urlencode([*fields, ("after", next_)]) if next_ else ""
        return {"rows": rows[:PAGE_ROWS], "totals": totals, "more": more, "until": until}

    def _totals(self, asked: search.Search, horizon: str | None) -> Totals:
        counted = self._queue.totals(
            asked.filter_, finished=not asked.unfinished, down_to=horizon, most=TOTAL_ROWS
        )
        recipients = sum(row["recipients"] for row in counted)
        return Totals(
            recipients,
            sum(row["deliveries"] for row in counted),
            {row["state"]: row["deliveries"] for row in counted},
            partial=recipients >= TOTAL_ROWS,
            since=_received(horizon) if horizon else "",
        )

    def as_csv(self, request: Request, _visitor: Visitor) -> Response:
        """All rows of a search as CSV, streamed."""
        fields = search.values_of(request.query_params.multi_items())
        try:
            asked = search.parse(fields, self._queue.resolve)
        except (NoSuchMessage, ValueError) as error:
            raise HTTPException(400, str(error)) from None
        rows = self._queue.rows(
            asked.filter_, finished=not asked.unfinished, newest=not asked.oldest
        )
        headers = {"content-disposition": 'attachment; filename="mail.csv"'}
        return StreamingResponse(_batched(csv_lines(rows)), media_type="text/csv", headers=headers)

    def _last_row(self, after: str) -> tuple[str, int] | None:
        """The last row of the page before; raises NoSuchMessage, and ValueError for a link that is
        not ours."""
        if not after:
            return None
        # A position is an integer of 32 bits.
        row = re.fullmatch(r"([0-9a-f]{32})\.([0-9]{1,9})", after)
        if row is None:
            raise ValueError("this link to older mail is not complete")
        return self._queue.resolve(row[1]), int(row[2])

    def message(self, request: Request, visitor: Visitor) -> Response:
        """Everything about one message."""
        try:
            report = report_on(self._queue, self._settings, request.path_params["queue_id"])
        except NoSuchMessage as error:
            raise HTTPException(404, str(error)) from None
        lines = [
            (name, text)
            for name, text in described(report)
            if name not in ("id", "why") and not name.startswith("delivery")
        ]
        operations = self._queue.operations_on(report.message.queue_id)
        return self.page(
            "message.html",
            visitor,
            message=report.message,
            why=report.why,
            lines=lines,
            timeline=timeline(report.message, report.dsns, operations),
            operation_links=_operations([("id", report.message.queue_id)]),
        )

    def header(self, request: Request, visitor: Visitor) -> Response:
        """The header of a stored message."""
        try:
            queue_id = self._queue.resolve(request.path_params["queue_id"])
            lines, cut_short = stored_header(self._queue, self._settings, queue_id)
        except NoSuchMessage as error:
            raise HTTPException(404, str(error)) from None
        except BodyUnsendable:
            raise HTTPException(404, "The spool has this message no longer.") from None
        except OSError:
            raise HTTPException(503, "The spool is not readable where this page runs.") from None
        log.info("header shown", queue_id=queue_id, user=visitor.name)
        return self.page(
            "header.html", visitor, queue_id=queue_id, lines=lines, cut_short=cut_short
        )

    def operators(self, request: Request, visitor: Visitor) -> Response:
        """What operators did, the newest first."""
        actor = request.query_params.get("actor", "").strip()
        newer_than = request.query_params.get("newer_than", "").strip()
        rows, fault = list[Row](), ""
        try:
            age = seconds(newer_than) if newer_than else EVER
            if "\0" in actor:
                raise ValueError("no operator has a zero byte in the name")
            rows = self._queue.read(
                "actions", seconds=min(age, EVER), actor=like(actor or "*"), most=ACTIONS + 1
            )
        except ValueError as error:
            fault = f"{newer_than} {error}" if newer_than else str(error)
        return self.page(
            "operators.html",
            visitor,
            rows=rows[:ACTIONS],
            more=len(rows) > ACTIONS,
            actor=actor,
            newer_than=newer_than,
            fault=fault,
        )

    # Operations

    def preview(self, request: Request, visitor: Visitor) -> Response:
        """What an operation would do."""
        return self._preview(request, visitor, request.query_params.multi_items())

    def _preview(
        self,
        request: Request,
        visitor: Visitor,
        fields: Sequence[tuple[str, str]],
        fault: str = "",
    ) -> Response:
        try:
            preview = self._acting.preview(_operation(request), fields)
        except (NoSuchMessage, ValueError) as error:
            raise HTTPException(400, str(error)) from None
        status = 400 if fault else 200
        return self.page("act.html", visitor, status=status, preview=preview, fault=fault)

    def act(self, request: Request, visitor: Visitor, form: Sequence[tuple[str, str]]) -> Response:
        """Do it, or show the preview again with what is missing."""
        name = _operation(request)
        try:
            texts, back = self._acting.act(name, form, visitor, dict(form))
        except (NoSuchMessage, ValueError) as error:
            return self._preview(request, visitor, form, str(error))
        finally:
            self.overview.expire()
        return self.page("acted.html", visitor, name=name, texts=texts, back=back)

    # Answers

    def failed(self, _request: Request, error: Exception) -> Response:
        """The page for an error. It says of a fault of our own only that it is in the log."""
        status = 500
        text = "This page failed. Read the log of `qmqp-relay web`. No mail is affected."
        if isinstance(error, HTTPException):
            status, text = error.status_code, error.detail
        elif is_outage(error):
            status, text = 503, "The database does not answer in time. Run `qmqp-relay check`."
        return self.page("failed.html", Visitor(), status=status, text=text)

    def page(
        self, template: str, visitor: Visitor, *, status: int = 200, **values: Any
    ) -> Response:
        """A template as a response."""
        text = self._templates.get_template(template).render(
            page=template.removesuffix(".html"), status=status, visitor=visitor, **values
        )
        return HTMLResponse(text, status)


class _Fields(dict[str, str]):
    """The last value of each field; empty for one that is missing."""

    def __missing__(self, name: str) -> str:
        return ""


_FORM: dict[str, Any] = {
    "texts": search.TEXTS,
    "first": search.FIRST,
    "flags": search.FLAGS,
    "labels": {name: label for name, (label, _) in search.TEXTS.items()}
    | {
        "state": "State",
        "outcome": "Last outcome",
        "uncertain": "possibly delivered",
        "unfinished": "unfinished",
        "oldest": "oldest first",
        "count_by": "Counted by",
    },
    "outcome_names": list(Outcome),
    "count_keys": list(COUNT_KEYS),
}


def _operation(request: Request) -> str:
    """The operation that the path names."""
    return request.url.path.rpartition("/")[2]


def _operations(fields: search.Values) -> list[tuple[str, str]]:
    """The links to the previews of the operations on the result of a search."""
    meant = [(name, value) for name, value in fields if name not in ("count_by", "oldest")]
    return [
        (name, search.address_of(meant, f"/act/{name}")) for name in NAMES if name not in SWITCHES
    ]


def _batched(lines: Iterator[str]) -> Iterator[str]:
    """Lines in texts of some kilobytes."""
    text = ""
    for line in lines:
        text += line
        if len(text) > 1 << 14:
            yield text
            text = ""
    yield text


def _received(queue_id: str) -> str:
    """The time in a queue id (UUIDv7: its first 48 bits are milliseconds)."""
    return stamp(datetime.fromtimestamp(made_at(queue_id), UTC))
