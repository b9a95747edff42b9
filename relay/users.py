"""Users: who may log in with a password, and what each of them may do.

A user is a row: its role, the senders that it may use, and how many messages it may send in a
minute. The role `sender` sends mail by SMTP, `viewer` reads the page, `operator` also acts there;
one user has one role, so that a password that stands in the settings of an application opens no
page.

What must stay true: a change and its row in `audit` are one transaction; a name is lower case and
is compared in lower case; the hash of a password is in no output.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Engine

from relay.db.engine import reading, writing
from relay.db.sql import Queries
from relay.queue.audit import AuditEntry
from relay.report.queries import as_rows

_NAME = re.compile(r"[a-z0-9_][a-z0-9._@+-]{0,127}")
_PATTERN = re.compile(r"\*|[!-~]{1,500}@[!-?A-~]{1,255}")
ANY_SENDER = "*"


class Role(StrEnum):
    """What a user may do."""

    SENDER = "sender"
    VIEWER = "viewer"
    OPERATOR = "operator"


PAGE_ROLES = (Role.VIEWER, Role.OPERATOR)
"""Roles that open the page."""


@dataclass(frozen=True, slots=True)
class User:
    """A row of `users`. `senders` are patterns; `messages_per_minute` is None without a limit;
    `password_hash` is empty where it was not read."""

    name: str
    role: Role
    senders: tuple[str, ...]
    messages_per_minute: int | None
    created_at: datetime
    disabled_at: datetime | None
    last_seen_at: datetime | None
    password_hash: str = field(default="", repr=False)


def user_name(text: str) -> str:
    """The name of a user as it is stored; raises ValueError that says what to write."""
    name = text.lower()
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{text!r} is not a user's name: write up to 128 letters, digits and . _ @ + -,"
            " with a letter, a digit or _ first"
        )
    return name


def sender_pattern(text: str) -> str:
    """A pattern of `senders`; raises ValueError that says what to write."""
    if not _PATTERN.fullmatch(text):
        raise ValueError(
            f"{text!r} is not a pattern of senders: write ann@example.org, *@example.org, or * for"
            " every sender"
        )
    return text


class Users:
    """The table of users. `actor` and `reason` of a change go into `audit`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queries = Queries(engine, __name__)

    def add(
        self,
        name: str,
        password_hash: str,
        *,
        role: Role = Role.SENDER,
        senders: Iterable[str] = (ANY_SENDER,),
        messages_per_minute: int | None = None,
        actor: str,
        reason: str = "",
    ) -> bool:
        """Add a user; False if there is one of that name."""
        senders = list(senders)
        shown = _options(role, senders, messages_per_minute)
        entry = AuditEntry(self._engine, actor, f"user add {name}", reason, shown)
        return self._change(
            entry,
            "add",
            user=name,
            password_hash=password_hash,
            role=role,
            senders=json.dumps(senders),
            messages_per_minute=messages_per_minute,
        )

    def change(
        self,
        name: str,
        *,
        role: Role | None = None,
        senders: Iterable[str] = (),
        messages_per_minute: int | None = None,
        actor: str,
        reason: str = "",
    ) -> bool:
        """Change what a user may do; False if there is no such user. None and no senders keep what
        it has, and a limit of 0 ends its limit."""
        senders = list(senders)
        shown = _options(role, senders, messages_per_minute)
        entry = AuditEntry(self._engine, actor, f"user set {name}", reason, shown)
        return self._change(
            entry,
            "change",
            user=name,
            role=role,
            senders=json.dumps(senders) if senders else None,
            messages_per_minute=messages_per_minute,
        )

    def set_password(self, name: str, password_hash: str, *, actor: str, reason: str = "") -> bool:
        """Change a password; False if there is no such user."""
        entry = AuditEntry(self._engine, actor, f"user passwd {name}", reason)
        return self._change(entry, "set_password", user=name, password_hash=password_hash)

    def disable(self, name: str, *, actor: str, reason: str = "") -> bool:
        """Refuse a user until `enable`; False if it does not exist, or is disabled already."""
        entry = AuditEntry(self._engine, actor, f"user disable {name}", reason)
        return self._change(entry, "disable", user=name)

    def enable(self, name: str, *, actor: str, reason: str = "") -> bool:
        """Take a user again; False if it does not exist, or is not disabled."""
        entry = AuditEntry(self._engine, actor, f"user enable {name}", reason)
        return self._change(entry, "enable", user=name)

    def remove(self, name: str, *, actor: str, reason: str = "") -> bool:
        """Remove a user; False if it does not exist. Its messages keep its name."""
        entry = AuditEntry(self._engine, actor, f"user remove {name}", reason)
        return self._change(entry, "remove", user=name)

    def all(self) -> list[User]:
        """Every user, by name, without the hash."""
        with reading(self._engine) as connection:
            return self._users(connection, "all")

    def find(self, names: Iterable[str]) -> dict[str, User]:
        """Those of these users that exist, by name."""
        with reading(self._engine) as connection:
            found = self._users(connection, "find", names=json.dumps(list(names)))
        return {user.name: user for user in found}

    def exist(self, roles: Iterable[Role]) -> bool:
        """Whether there is a user in one of these roles, disabled or not."""
        with reading(self._engine) as connection:
            rows = self._queries.run(connection, "any_in_roles", roles=json.dumps(list(roles)))
            return rows.first() is not None

    def note_seen(self, names: Iterable[str]) -> None:
        """Record that these users have just been active."""
        with writing(self._engine) as connection:
            self._queries.run(connection, "note_seen", names=json.dumps(sorted(names)))

    def _change(self, entry: AuditEntry, statement: str, **parameters: Any) -> bool:
        with writing(self._engine) as connection:
            done = bool(self._queries.run(connection, statement, **parameters).rowcount)
            if done:
                entry.note(connection, 0)
        return done

    def _users(self, connection: Connection, statement: str, **parameters: Any) -> list[User]:
        rows = as_rows(self._queries.run(connection, statement, **parameters))
        return [
            User(**row | {"role": Role(row["role"]), "senders": tuple(json.loads(row["senders"]))})
            for row in rows
        ]


def _options(role: Role | None, senders: Iterable[str], messages_per_minute: int | None) -> str:
    """The options of a command that says this."""
    shown = [f"--role {role}"] if role is not None else []
    shown += [f"--sender {pattern}" for pattern in senders]
    if messages_per_minute is not None:
        shown.append(f"--messages-per-minute {messages_per_minute}")
    return " ".join(shown)
