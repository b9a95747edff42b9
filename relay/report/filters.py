"""The filter of deliveries that every command uses, to list them and to change them.

A `Filter` becomes a condition over the columns of `mail_history`; all values are parameters.
"""

import re
import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from relay.db.schema import words
from relay.ids import dashed
from relay.queue.states import State


@dataclass(frozen=True, slots=True)
class Filter:
    """The deliveries for which all given fields match.

    `sender` ('' or <>: the null sender) and `recipient` are whole addresses, whose domain is
    case-insensitive, or patterns with `*`, which are case-insensitive as a whole.
    """

    states: tuple[str, ...] = ()
    sender: str | None = None
    recipient: str | None = None
    route: str | None = None
    server: str | None = None
    older_than: float | None = None  # seconds since it was received
    id: str | None = None  # 32 digits
    reply: str | None = None  # a part of the last reply
    header_message_id: str | None = None

    def where(self) -> tuple[str, dict[str, Any]]:
        """The condition over the columns of `mail_history`, and its parameters."""
        parts: list[str] = []
        parameters: dict[str, Any] = {}
        if self.states:
            parts.append(
                f"state IN ({words(tuple(map(State, self.states)))})"
            )  # literals: a plan may depend on them
        for column in ("sender", "recipient", "route", "server", "header_message_id"):
            value: str | None = getattr(self, column)
            if value is None:
                continue
            if "*" in value:
                parts.append(f"{column} @like :{column} ESCAPE '\\'")
                parameters[column] = _like(value)
            elif column in ("sender", "recipient"):
                where, more = address_is(column, value)
                parts.append(where)
                parameters |= more
            else:
                parts.append(f"{column} = :{column}")
                parameters[column] = value
        if self.reply is not None:
            parts.append("reason @like :reply ESCAPE '\\'")
            parameters["reply"] = _like(f"*{self.reply}*")
        if self.older_than is not None:
            parts.append("queue_uuid < @id(:oldest)")
            parameters["oldest"] = id_at(self.older_than)
        if self.id is not None:
            parts.append("queue_uuid = @id(:id)")
            parameters["id"] = dashed(self.id)
        return " AND ".join(parts) or "1 = 1", parameters

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
                options.append(
                    f"--{option} {shlex.quote(f'{value:g}s' if name == 'older_than' else value)}"
                )
        return " ".join(options)


def address_is(column: str, address: str) -> tuple[str, dict[str, str]]:
    """The condition that a column is this address, with a case-insensitive domain; its parameters.

    In an index on the column's bytes all spellings of a domain are neighbours, after the local part
    and its @.
    """
    if "@" not in address:
        return f"{column} = :{column}", {column: "" if address == "<>" else address}
    local = address[: address.rfind("@")]
    parameters = {
        column: address,
        f"{column}_from": f"{local}@",
        f"{column}_to": f"{local}A",
    }  # A comes next to @
    among = f"{column} @at_least :{column}_from AND {column} @below :{column}_to"
    return f"{among} AND lower({column}) = lower(:{column})", parameters


def bracketed(header_message_id: str) -> str:
    """A Message-ID with its <>, which may be missing in the argument; `*` matches them too."""
    head = "" if header_message_id.startswith(("<", "*")) else "<"
    return head + header_message_id + ("" if header_message_id.endswith((">", "*")) else ">")


def _like(pattern: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", pattern).replace("*", "%")


def id_at(seconds_ago: float) -> str:
    """The smallest id of a message that was received then: ids begin with milliseconds."""
    stamp = int((datetime.now(UTC).timestamp() - seconds_ago) * 1000)
    return dashed(f"{max(stamp, 0):012x}" + "0" * 20)
