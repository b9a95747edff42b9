"""The filter of deliveries that every command uses, to list them and to change them.

A `Filter` becomes a condition over the columns of `mail_history`. Which fields are given is known
only when a command runs, so this SQL is made in Python and not read from a file; all values are
parameters, except states. `SPELLINGS` is all that differs between the databases in it.

What must stay true: a field that is not given costs nothing; `shown` is what an operator would
type, because the audit keeps it.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from relay.db.schema import literals
from relay.ids import dashed
from relay.queue.states import UNFINISHED, State


class Spelling(NamedTuple):
    """How a database writes what a listing needs."""

    like: str  # LIKE that ignores case
    at_least: str  # >= by bytes, as the indexes of addresses compare
    below: str  # < by bytes
    time: str  # a time of a view as text in the form of RFC 3339
    soon: str  # a time of a view, so many seconds from now


SPELLINGS = {
    "postgresql": Spelling(
        "ILIKE",
        "~>=~",
        "~<~",
        r"""to_char({} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24\:MI\:SS.MS"Z"')""",
        "now() + :{} * interval '1 second'",
    ),
    "sqlite": Spelling(
        "LIKE",
        ">=",
        "<",
        r"replace(replace({}, ' ', 'T'), '+00\:00', 'Z')",
        r"strftime('%Y-%m-%d %H\:%M\:%f', 'now', :{} || ' seconds') || '+00\:00'",
    ),
}
# The column of `mail_history` for each field of a filter that is one text.
_COLUMNS = {
    "sender": "sender",
    "recipient": "recipient",
    "domain": "domain",
    "route": "route",
    "client": "client_address",
    "user": "auth_user",
    "header_message_id": "header_message_id",
    "id": "queue_uuid",
}
_LOWER = ("domain", "client")  # fields whose column is in lower case
UNCERTAIN = "('uncertain', 'malformed')"  # outcomes of an attempt that may have delivered the mail


@dataclass(frozen=True, slots=True)
class Filter:
    """The deliveries for which all given fields match.

    `sender` ('' or <>: the null sender) and `recipient` are whole addresses, whose domain is
    case-insensitive. A text may be a pattern with `*`, which is case-insensitive as a whole.
    `server`: the last attempt was there, or the delivery is unfinished and its route of today has
    it. `uncertain`: one of its attempts may have delivered it.
    """

    states: tuple[str, ...] = ()
    sender: str | None = None
    recipient: str | None = None
    route: str | None = None
    server: str | None = None
    older_than: float | None = None  # seconds since it was received
    id: str | None = None  # 32 digits
    reply: str | None = None  # a part of the last reply, or of the reason of a pause
    header_message_id: str | None = None
    newer_than: float | None = None  # seconds since it was received
    received_between: tuple[datetime, datetime] | None = None  # from the first, before the second
    expires_within: float | None = None  # seconds from now; only unfinished mail expires
    client: str | None = None  # address of the SMTP client
    user: str | None = None  # authenticated user
    outcomes: tuple[str, ...] = ()  # of the last attempt
    domain: str | None = None  # of the recipient
    uncertain: bool = False

    def where(self, database: str) -> tuple[str, dict[str, Any]]:
        """The condition over the columns of `mail_history` for `postgresql` or `sqlite`, and its
        parameters."""
        spelling = SPELLINGS[database]
        parameters = dict[str, Any]()
        parts = ["1 = 1", *self._outcomes(parameters), *self._times(spelling, parameters)]
        for field, column in _COLUMNS.items():
            if (value := getattr(self, field)) is not None:
                parts.append(_text(field, column, value, spelling, parameters))
        if self.reply is not None:  # a pause hides the last reply in `reason`
            likes = [f"{c} {spelling.like} :reply ESCAPE '\\'" for c in ("reason", "last_reply")]
            parts.append(f"({' OR '.join(likes)})")
            parameters["reply"] = like(f"*{self.reply}*")
        if self.server is not None:
            parts.append(_for_server(self.server, spelling))
            parameters["server"] = like(self.server) if "*" in self.server else self.server
        return " AND ".join(parts), parameters

    def _outcomes(self, parameters: dict[str, Any]) -> Iterator[str]:
        if self.states:  # literals: a plan may depend on them
            states = ", ".join(f"'{State(state)}'" for state in self.states)
            yield f"state IN ({states})"
        if self.outcomes:
            named = {f"outcome_{n}": outcome for n, outcome in enumerate(self.outcomes)}
            parameters |= named
            yield f"last_outcome IN ({', '.join(f':{name}' for name in named)})"
        if self.uncertain:
            rows = f"SELECT a.queue_id, a.delivery FROM attempts a WHERE a.outcome IN {UNCERTAIN}"
            yield f"(queue_uuid, delivery) IN ({rows})"

    def _times(self, spelling: Spelling, parameters: dict[str, Any]) -> Iterator[str]:
        if self.older_than is not None:
            yield "queue_uuid < :oldest"
            parameters["oldest"] = id_at(self.older_than)
        if self.newer_than is not None:
            yield "queue_uuid >= :newest"
            parameters["newest"] = id_at(self.newer_than)
        if self.received_between is not None:
            yield "queue_uuid >= :received_from AND queue_uuid < :received_to"
            names = ("received_from", "received_to")
            parameters |= zip(names, map(first_id, self.received_between), strict=True)
        if self.expires_within is not None:
            yield f"finished_at IS NULL AND expires_at < {spelling.soon.format('expires_within')}"
            parameters["expires_within"] = self.expires_within

    def is_history(self) -> bool:
        """Whether it covers finished mail too: a message or a state is meant whether or not it is
        finished."""
        return bool(self.states or self.id or self.header_message_id)

    def shown(self) -> str:
        """The filter as an operator would type it; empty for everything."""
        options = [f"--state {state}" for state in self.states]
        options += [f"--outcome {outcome}" for outcome in self.outcomes]
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            option = name.removeprefix("header_").replace("_", "-")
            if value is None or value is False or name in ("states", "outcomes"):
                continue
            texts = [] if value is True else [value]
            if isinstance(value, float):
                texts = [f"{value:g}s"]
            elif isinstance(value, tuple):
                texts = [moment.isoformat() for moment in value]
            options.append(" ".join([f"--{option}", *map(shlex.quote, texts)]))
        return " ".join(options)


def _text(
    field: str, column: str, value: str, spelling: Spelling, parameters: dict[str, Any]
) -> str:
    """The condition for a field that is one text; its parameters are added."""
    parameters[field] = value
    if "*" in value:
        parameters[field] = like(value)
        return f"{column} {spelling.like} :{field} ESCAPE '\\'"
    if field in ("sender", "recipient"):
        whole, least, beyond = spelled(value)
        parameters |= {field: whole, f"{field}_from": least, f"{field}_to": beyond}
        return (
            f"{column} {spelling.at_least} :{field}_from"
            f" AND {column} {spelling.below} :{field}_to"
            f" AND lower({column}) = lower(:{field})"
        )
    if field == "id":
        parameters[field] = dashed(value)
    elif field in _LOWER:
        parameters[field] = value.lower()
    return f"{column} = :{field}"


def spelled(address: str) -> tuple[str, str, str]:
    """The address, and between which texts an index on its bytes has all spellings of its domain.

    They are neighbours after the local part and its @, next to which comes A. An address without @
    has one spelling.
    """
    if "@" not in address:
        address = "" if address == "<>" else address
        return address, address, f"{address}\x01"
    local = address[: address.rfind("@")]
    return address, f"{local}@", f"{local}A"


def bracketed(header_message_id: str) -> str:
    """A Message-ID with its <>, which may be missing in the argument; `*` matches them too."""
    head = "" if header_message_id.startswith(("<", "*")) else "<"
    return head + header_message_id + ("" if header_message_id.endswith((">", "*")) else ">")


def parse_moment(text: str) -> datetime:
    """A time in the form of ISO 8601; one without a zone is in UTC. Raises ValueError that says
    what to write."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        hint = "write 2026-11-25, '2026-11-25 13:00' or 2026-11-25T13:00:00+01:00"
        raise ValueError(f"{text} is no time: {hint}") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _for_server(server: str, spelling: Spelling) -> str:
    """The condition for mail that was last tried at a server, or that would go there."""
    matches = f"{spelling.like} :server ESCAPE '\\'" if "*" in server else "= :server"
    routes = f"SELECT s.route FROM route_servers s WHERE s.server {matches}"
    return f"(server {matches} OR (state IN ({literals(UNFINISHED)}) AND route IN ({routes})))"


def like(pattern: str) -> str:
    """A pattern with `*` as LIKE takes it, escaped by a backslash."""
    return re.sub(r"([\\%_])", r"\\\1", pattern).replace("*", "%")


def id_at(seconds_ago: float) -> str:
    """The smallest id of a message that was received so many seconds ago."""
    return _id_of(datetime.now(UTC).timestamp() - seconds_ago)


def first_id(moment: datetime) -> str:
    """The smallest id of a message that was received then."""
    return _id_of(moment.timestamp())


def _id_of(seconds: float) -> str:
    """The smallest id of that time, in seconds since 1970: ids begin with milliseconds."""
    stamp = int(seconds * 1000)
    return dashed(f"{max(stamp, 0):012x}" + "0" * 20)
