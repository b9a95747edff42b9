"""The search of the page: the fields of its address, the filter that they mean, and links to it.

The fields are those of the filter that commands have, so that an address says the same as a
command: `/search?domain=example.org&newer_than=1d` is `list --all --domain example.org --newer-than
1d`. `link_of` translates a command. What must stay true: a field that is not valid is an error that
names it and says what to write; an address that the page makes is read by it again.
"""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlencode

from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.report.filters import Filter, bracketed, parse_moment
from relay.report.masking import ADDRESS_MASK, NUMBER_MASK
from relay.report.queries import COUNT_KEYS
from relay.routes import parse_server
from relay.settings import seconds

# Fields that are one text, with their label and a hint.
TEXTS = {
    "id": ("Queue id", "or its end"),
    "sender": ("Sender", "a@b, * or <>"),
    "recipient": ("Recipient", "a@b or *@b"),
    "header_message_id": ("Message-ID", "<> not needed"),
    "reply": ("Reply", "a part of it"),
    "domain": ("Domain", "of the recipient"),
    "route": ("Route", "its name"),
    "server": ("Server", "host:port"),
    "client": ("Client", "its address"),
    "user": ("User", "who logged in to send"),
    "newer_than": ("Newer than", "30s, 5m, 2h, 5d"),
    "older_than": ("Older than", "30s, 5m, 2h, 5d"),
    "received_from": ("Received from", "2026-11-25 13:00"),
    "received_to": ("Received before", "2026-11-26"),
    "expires_within": ("Expires within", "6h"),
}
LISTS = {"state": tuple(State), "outcome": tuple(Outcome)}  # these may be repeated
FLAGS = ("uncertain", "unfinished", "oldest")
# Fields that are shown at once; the others are behind "More filters".
FIRST = ("id", "sender", "recipient", "header_message_id", "reply")
NAMES = (*TEXTS, *LISTS, *FLAGS, "count_by")

type Values = Sequence[tuple[str, str]]
"""The fields of an address that are not empty, in its order."""


@dataclass(frozen=True, slots=True)
class Search:
    """What an address means. `unfinished`: no finished mail, unless a state or an id is meant.
    `oldest`: the oldest first. `count_by`: a key of COUNT_KEYS, or empty."""

    filter_: Filter
    unfinished: bool = False
    oldest: bool = False
    count_by: str = ""


def values_of(fields: Iterable[tuple[str, str]]) -> Values:
    """The fields that the search knows and that are not empty."""
    stripped = ((name, value.strip()) for name, value in fields if name in NAMES)
    return [(name, value) for name, value in stripped if value]


def parse(values: Values, resolve: Callable[[str], str]) -> Search:
    """The search that the fields mean; raises ValueError, and NoSuchMessage of `resolve`, which
    completes an id."""
    if any("\0" in value for _, value in values):
        raise ValueError("no mail has a zero byte in this field")  # PostgreSQL accepts none
    one = dict(values)
    lists = {name: _known(name, values) for name in LISTS}
    header, sender = one.get("header_message_id"), one.get("sender")
    count_by = one.get("count_by", "")
    if count_by and count_by not in COUNT_KEYS:
        raise ValueError(f"cannot count by {count_by}: choose one of {', '.join(COUNT_KEYS)}")
    filter_ = Filter(
        states=lists["state"],
        outcomes=lists["outcome"],
        sender="" if sender == "<>" else sender,
        id=resolve(one["id"]) if "id" in one else None,
        header_message_id=bracketed(header) if header else None,
        server=_server(one["server"]) if "server" in one else None,
        received_between=_between(one.get("received_from"), one.get("received_to")),
        uncertain="uncertain" in one,
        recipient=one.get("recipient"),
        route=one.get("route"),
        reply=one.get("reply"),
        client=one.get("client"),
        user=one.get("user"),
        domain=one.get("domain"),
        older_than=_length("older_than", one),
        newer_than=_length("newer_than", one),
        expires_within=_length("expires_within", one),
    )
    return Search(filter_, "unfinished" in one, "oldest" in one, count_by)


def _known(name: str, values: Values) -> tuple[str, ...]:
    given = tuple(dict.fromkeys(value for field, value in values if field == name))
    if unknown := [value for value in given if value not in LISTS[name]]:
        choice = ", ".join(LISTS[name])
        raise ValueError(f"there is no {name} {', '.join(unknown)}: choose one of {choice}")
    return given


def _server(text: str) -> str:
    return text if "*" in text else parse_server(text).name


def _length(name: str, one: Mapping[str, str]) -> float | None:
    if (text := one.get(name)) is None:
        return None
    try:
        return seconds(text)
    except ValueError as error:
        raise ValueError(f"{TEXTS[name][0]}: {text} {error}") from None


def _between(begin: str | None, end: str | None) -> tuple[datetime, datetime] | None:
    """Two moments, of which one may be missing."""
    if begin is None and end is None:
        return None
    first = parse_moment(begin) if begin else datetime(1970, 1, 1, tzinfo=UTC)
    return first, parse_moment(end) if end else datetime.now(UTC) + timedelta(days=1)


# Links


def address_of(values: Values, path: str = "/search") -> str:
    """The address of a search."""
    return f"{path}?{urlencode(values)}" if values else path


def link_of(command: str) -> str:
    """The page that shows what a command prints: `qmqp-relay list --state held` is
    `/search?state=held`. Empty if no page does."""
    words = shlex.split(command)
    if words[:1] != ["qmqp-relay"] or len(words) < 2:
        return ""
    name, rest = words[1], words[2:]
    if name in ("show", "why") and rest:
        return f"/message/{rest[0]}"
    if name in ("pause", "resume") and len(rest) == 2:
        return f"/act/{name}?{urlencode({rest[0].removeprefix('--'): rest[1]})}"
    if name == "probe" and rest:
        return address_of([("server", rest[0]), ("unfinished", "1")])
    return _link_of_list(rest) if name == "list" else ""


def link_of_filter(options: str) -> str:
    """The search that a recorded filter means; empty without a filter."""
    try:
        words = shlex.split(options)
    except ValueError:  # a filter of an earlier version
        return ""
    return _link_of_list(["--all", *words]) if words and words[0].startswith("--") else ""


def _link_of_list(words: Sequence[str]) -> str:
    values = list[tuple[str, str]]()
    finished, rest = False, list(words)
    while rest:
        option = rest.pop(0)
        name = option.removeprefix("--").replace("-", "_")
        if option in ("--all", "--newest"):
            finished |= option == "--all"
        elif option == "--uncertain":
            values.append((name, "1"))
        elif option == "--received-between" and len(rest) > 1:
            values += [("received_from", rest.pop(0)), ("received_to", rest.pop(0))]
        elif not option.startswith("--"):
            values.append(("id", option))
        elif not rest:
            return ""
        elif option in ("--limit", "--columns", "--format"):
            rest.pop(0)
        else:
            name = "header_message_id" if name == "message_id" else name
            if name not in NAMES:
                return ""
            values.append((name, rest.pop(0)))
    history = any(name in ("id", "state", "header_message_id") for name, _ in values)
    if not finished and not history:
        values.append(("unfinished", "1"))
    if "--newest" not in words and not finished:
        values.append(("oldest", "1"))
    return address_of(values)


def narrowed(values: Values, key: str, value: str) -> str:
    """The address of the same search with one more field: the group of a count."""
    name = "reply" if key == "reason" else key
    kept = [(field, text) for field, text in values if field not in (name, "count_by")]
    return address_of([*kept, (name, _pattern(value) if key == "reason" else value or "<>")])


def _pattern(reason: str) -> str:
    """A masked reason as a pattern that matches what was masked."""
    masks = "|".join(map(re.escape, (ADDRESS_MASK, NUMBER_MASK)))
    words = [re.sub(rf"^(?:{masks})$", "*", word) for word in reason.split(" ")]
    return " ".join(words).strip("* ")


def message_address(queue_id: str) -> str:
    """The page of a message."""
    return f"/message/{quote(queue_id, safe='')}"
