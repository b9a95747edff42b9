"""The filter of deliveries that every command uses, to list them and to change them.

A `Filter` becomes a condition over the columns of `mail_history`. Which fields are given is known
only when a command runs, so this SQL is made in Python and not read from a file; all values are
parameters. `SPELLINGS` is all that differs between the databases in it.
"""

import re
import shlex
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


SPELLINGS = {
    "postgresql": Spelling(
        "ILIKE",
        "~>=~",
        "~<~",
        r"""to_char({} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24\:MI\:SS.MS"+00\:00"')""",
    ),
    "sqlite": Spelling("LIKE", ">=", "<", "replace({}, ' ', 'T')"),
}
# The column of `mail_history` for each field of a filter that is one text.
_COLUMNS = {
    "sender": "sender",
    "recipient": "recipient",
    "route": "route",
    "header_message_id": "header_message_id",
    "id": "queue_uuid",
    "reply": "reason",
}


@dataclass(frozen=True, slots=True)
class Filter:
    """The deliveries for which all given fields match.

    `sender` ('' or <>: the null sender) and `recipient` are whole addresses, whose domain is
    case-insensitive, or patterns with `*`, which are case-insensitive as a whole. `server`: the
    last attempt was there, or the delivery is unfinished and its route of today has it.
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

    def where(self, database: str) -> tuple[str, dict[str, Any]]:
        """The condition over the columns of `mail_history` for `postgresql` or `sqlite`, and its
        parameters."""
        spelling = SPELLINGS[database]
        parts, parameters = ["1 = 1"], dict[str, Any]()
        if self.states:  # literals: a plan may depend on them
            states = ", ".join(f"'{State(state)}'" for state in self.states)
            parts.append(f"state IN ({states})")
        if self.older_than is not None:
            parts.append("queue_uuid < :oldest")
            parameters["oldest"] = id_at(self.older_than)
        for field, column in _COLUMNS.items():
            value: str | None = getattr(self, field)
            if value is None:
                continue
            if field == "reply":  # a pause hides the last reply in `reason`
                likes = [f"{c} {spelling.like} :reply ESCAPE '\\'" for c in (column, "last_reply")]
                part, value = f"({' OR '.join(likes)})", _like(f"*{value}*")
            elif "*" in value:
                part, value = f"{column} {spelling.like} :{field} ESCAPE '\\'", _like(value)
            elif field in ("sender", "recipient"):
                part = (
                    f"{column} {spelling.at_least} :{field}_from"
                    f" AND {column} {spelling.below} :{field}_to"
                    f" AND lower({column}) = lower(:{field})"
                )
                value, parameters[f"{field}_from"], parameters[f"{field}_to"] = spelled(value)
            else:
                part = f"{column} = :{field}"
            parts.append(part)
            parameters[field] = dashed(value) if field == "id" else value
        if self.server is not None:
            parts.append(_for_server(self.server, spelling))
            parameters["server"] = _like(self.server) if "*" in self.server else self.server
        return " AND ".join(parts), parameters

    def is_history(self) -> bool:
        """Whether it covers finished mail too: a message or a state is meant whether or not it is
        finished."""
        return bool(self.states or self.id or self.header_message_id)

    def shown(self) -> str:
        """The filter as an operator would type it; empty for everything."""
        options = [f"--state {state}" for state in self.states]
        for name in (field for field in self.__dataclass_fields__ if field != "states"):
            value = getattr(self, name)
            if value is not None:
                option = name.removeprefix("header_").replace("_", "-")
                text = f"{value:g}s" if name == "older_than" else value
                options.append(f"--{option} {shlex.quote(text)}")
        return " ".join(options)


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


def _for_server(server: str, spelling: Spelling) -> str:
    """The condition for mail that was last tried at a server, or that would go there."""
    matches = f"{spelling.like} :server ESCAPE '\\'" if "*" in server else "= :server"
    routes = f"SELECT s.route FROM route_servers s WHERE s.server {matches}"
    return f"(server {matches} OR (state IN ({literals(UNFINISHED)}) AND route IN ({routes})))"


def _like(pattern: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", pattern).replace("*", "%")


def id_at(seconds_ago: float) -> str:
    """The smallest id of a message that was received then: ids begin with milliseconds."""
    stamp = int((datetime.now(UTC).timestamp() - seconds_ago) * 1000)
    return dashed(f"{max(stamp, 0):012x}" + "0" * 20)
