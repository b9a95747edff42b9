"""The commands that change and list users, around `relay.users`.

What must stay true: a password comes from a prompt or a file and is printed nowhere; every change
is recorded with its actor and reason.
"""

import getpass
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import typer

from commands.errors import DONE, NOTHING_MATCHED, WRONG_USE, CommandError, say
from commands.ops.database import opened
from commands.ops.modify import actor
from commands.output import Columns, ago, as_json, write
from relay import passwords
from relay.report.rows import Row
from relay.settings import Settings, load
from relay.users import Role, User, Users, sender_pattern, user_name

_COLUMNS: Columns = {
    "NAME": lambda row: str(row["name"]),
    "ROLE": lambda row: str(row["role"]),
    "LIMIT": lambda row: f"{row['messages_per_minute'] or ''}",
    "CREATED": lambda row: ago(row["created_at"]),
    "SEEN": lambda row: ago(row["last_seen_at"]),
    "DISABLED": lambda row: ago(row["disabled_at"]),
    "SENDERS": lambda row: str(row["senders"]),
}
_PAST = {"disable": "disabled", "enable": "enabled", "remove": "removed"}


def add(
    name: str,
    *,
    role: str,
    senders: Iterable[str],
    messages_per_minute: int | None,
    password_file: Path | None,
    reason: str,
    json_lines: bool,
) -> int:
    """Add a user; the exit status."""
    name, user_role, patterns = _stored(name), _role(role), _patterns(senders)
    with opened(load(Settings)) as engine:
        users = Users(engine)
        if users.find([name]):
            raise CommandError(
                NOTHING_MATCHED,
                f"there is a user {name} already: `qmqp-relay user passwd {name}` changes its"
                " password",
            )
        done = users.add(
            name,
            _new_hash(name, password_file),
            role=user_role,
            senders=patterns,
            messages_per_minute=messages_per_minute,
            actor=actor(),
            reason=reason,
        )
    return _report("add", name, "added", done=done, json_lines=json_lines)


def change(
    name: str,
    *,
    role: str | None,
    senders: Iterable[str],
    messages_per_minute: int | None,
    reason: str,
    json_lines: bool,
) -> int:
    """Change what a user may do; the exit status."""
    name, patterns = _stored(name), _patterns(senders)
    new_role = None if role is None else _role(role)
    if new_role is None and not patterns and messages_per_minute is None:
        raise CommandError(
            WRONG_USE, "nothing to change: add --role, --sender or --messages-per-minute"
        )
    with opened(load(Settings)) as engine:
        users = Users(engine)
        if not users.find([name]):
            raise _no_user(name)
        done = users.change(
            name,
            role=new_role,
            senders=patterns,
            messages_per_minute=messages_per_minute,
            actor=actor(),
            reason=reason,
        )
    return _report("set", name, "changed", done=done, json_lines=json_lines)


def set_password(name: str, password_file: Path | None, *, reason: str, json_lines: bool) -> int:
    """Change the password of a user; the exit status."""
    with opened(load(Settings)) as engine:
        users, name = Users(engine), _stored(name)
        if not users.find([name]):
            raise _no_user(name)
        new_hash = _new_hash(name, password_file)
        done = users.set_password(name, new_hash, actor=actor(), reason=reason)
    return _report("passwd", name, "has a new password", done=done, json_lines=json_lines)


def switch(verb: str, name: str, *, reason: str, json_lines: bool) -> int:
    """Disable, enable or remove a user; the exit status."""
    with opened(load(Settings)) as engine:
        users, name = Users(engine), _stored(name)
        if not users.find([name]):
            raise _no_user(name)
        operation = {"disable": users.disable, "enable": users.enable, "remove": users.remove}[verb]
        done = operation(name, actor=actor(), reason=reason)
    return _report(verb, name, _PAST[verb], done=done, json_lines=json_lines)


def list_users(*, json_lines: bool) -> int:
    """Print the users; the exit status."""
    with opened(load(Settings)) as engine:
        users = Users(engine).all()
    rows: Iterable[Row] = map(_row, users)
    if not json_lines:
        rows = ({**row, "senders": " ".join(row["senders"])} for row in rows)
    if write(rows, _COLUMNS, json_lines=json_lines):
        return DONE
    say("there are no users; `qmqp-relay user add NAME` adds one")
    return NOTHING_MATCHED


def _row(user: User) -> Row:
    """A user without the hash of its password."""
    names = [field.name for field in fields(user) if field.repr]
    return {name: getattr(user, name) for name in names}


def _report(verb: str, name: str, after: str, *, done: bool, json_lines: bool) -> int:
    if json_lines:
        typer.echo(as_json({"verb": verb, "user": name, "done": done}))
    elif done:
        typer.echo(f"user {name} {after}")
    else:
        # Only the state before, or another operator, can have changed it meanwhile.
        say(f"user {name} is not changed: it is {after} already")
    return DONE if done else NOTHING_MATCHED


def _stored(name: str) -> str:
    try:
        return user_name(name)
    except ValueError as error:
        raise CommandError(WRONG_USE, str(error)) from None


def _role(text: str) -> Role:
    if text not in list(Role):
        raise CommandError(WRONG_USE, f"no role {text}: choose one of {', '.join(Role)}")
    return Role(text)


def _patterns(senders: Iterable[str]) -> list[str]:
    try:
        return [sender_pattern(text) for text in senders]
    except ValueError as error:
        raise CommandError(WRONG_USE, str(error)) from None


def _no_user(name: str) -> CommandError:
    return CommandError(
        NOTHING_MATCHED, f"there is no user {name}; `qmqp-relay user list` shows the users"
    )


def _new_hash(name: str, file: Path | None) -> str:
    try:
        return passwords.hash_new(_new_password(name, file))
    except ValueError as error:
        raise CommandError(WRONG_USE, str(error)) from None


def _new_password(name: str, file: Path | None) -> str:
    """The password of a file, or one that is typed twice; raises CommandError."""
    if file is not None:
        return _password_in(file)
    if not _has_terminal():
        raise CommandError(
            WRONG_USE,
            "no terminal to ask for the password: add --password-file FILE (- is standard input)",
        )
    first = getpass.getpass(f"Password for {name}: ")
    if getpass.getpass("Again: ") != first:
        raise CommandError(WRONG_USE, "the two passwords differ; nothing is changed")
    return first


def _has_terminal() -> bool:
    return sys.stdin.isatty()


def _password_in(file: Path) -> str:
    """The only line of a file, or of standard input."""
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        text = data.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise CommandError(WRONG_USE, f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CommandError(WRONG_USE, f"{file} is not UTF-8 text") from None
    if "\n" in text:
        raise CommandError(WRONG_USE, f"{file} has several lines: write the password alone")
    return text
