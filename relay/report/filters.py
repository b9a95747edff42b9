"""Which deliveries are meant: one set of filters, for whoever looks at the queue and whoever
changes it.

A `Filter` becomes a condition over the columns of `mail_history`, with everything that people wrote
as parameters.
"""

import re
import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from relay.db.schema import State, words
from relay.ids import dashed


@dataclass(frozen=True, slots=True)
class Filter:
    """Which deliveries are meant; everything that is given must hold.

    `sender` ('' or <>: the null sender) and `recipient` are whole addresses, whose domains are the
    same in capitals, or patterns with `*`, to which all is.
    """

    states: tuple[str, ...] = ()
    sender: str | None = None
    recipient: str | None = None
    route: str | None = None
    server: str | None = None
    older_than: float | None = None  # seconds since it was received
    id: str | None = None  # 32 digits
    reply: str | None = None  # a part of the server's words
    header_message_id: str | None = None

    def where(self) -> tuple[str, dict[str, Any]]:
        """The condition over the columns of `mail_history`, and its parameters."""
        parts: list[str] = []
        given: dict[str, Any] = {}
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
                given[column] = _like(value)
            elif column in ("sender", "recipient"):
                where, more = address_is(column, value)
                parts.append(where)
                given |= more
            else:
                parts.append(f"{column} = :{column}")
                given[column] = value
        if self.reply is not None:
            parts.append("reason @like :reply ESCAPE '\\'")
            given["reply"] = _like(f"*{self.reply}*")
        if self.older_than is not None:
            parts.append("queue_uuid < @id(:oldest)")
            given["oldest"] = id_at(self.older_than)
        if self.id is not None:
            parts.append("queue_uuid = @id(:id)")
            given["id"] = dashed(self.id)
        return " AND ".join(parts) or "1 = 1", given

    def is_history(self) -> bool:
        """Whether it is looked for among finished mail, too: who names a message or a state means
        it, ended or not."""
        return bool(self.states or self.id or self.header_message_id)

    def shown(self) -> str:
        """The filter as an operator would type it; empty for everything."""
        words = [f"--state {state}" for state in self.states]
        for name in (field for field in self.__dataclass_fields__ if field != "states"):
            value = getattr(self, name)
            if value is not None:
                option = name.removeprefix("header_").replace("_", "-")
                words.append(
                    f"--{option} {shlex.quote(f'{value:g}s' if name == 'older_than' else value)}"
                )
        return " ".join(words)


def address_is(column: str, address: str) -> tuple[str, dict[str, str]]:
    """The condition that a column holds this address, and its parameters; the domain's capitals are
    no matter.

    All spellings of a domain stand together in an index on the column's bytes, behind the local
    part and its @.
    """
    if "@" not in address:
        return f"{column} = :{column}", {column: "" if address == "<>" else address}
    local = address[: address.rfind("@")]
    given = {
        column: address,
        f"{column}_from": f"{local}@",
        f"{column}_to": f"{local}A",
    }  # A comes next to @
    among = f"{column} @at_least :{column}_from AND {column} @below :{column}_to"
    return f"{among} AND lower({column}) = lower(:{column})", given


def bracketed(header_message_id: str) -> str:
    """A Message-ID as headers spell it, whether or not it was given with its <>; `*` stands for
    them too."""
    head = "" if header_message_id.startswith(("<", "*")) else "<"
    return head + header_message_id + ("" if header_message_id.endswith((">", "*")) else ">")


def _like(pattern: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", pattern).replace("*", "%")


def id_at(seconds_ago: float) -> str:
    """The smallest id that a message received then could have: ids begin with milliseconds."""
    stamp = int((datetime.now(UTC).timestamp() - seconds_ago) * 1000)
    return dashed(f"{max(stamp, 0):012x}" + "0" * 20)
