"""The commands `qmqp-relay user ...`: thin functions over `commands.ops.users`.

A password is typed at a prompt or read from a file, and never an argument, because every user of
the machine can read the arguments of a process.
"""

from pathlib import Path
from typing import Annotated

import typer

from commands.cli.command import command
from commands.cli.queue import Json, Reason
from commands.cli.usage import GroupedCommands

users = typer.Typer(
    name="user",
    cls=GroupedCommands,
    help="Add, change and list users. They log in to send mail by SMTP, or to the page.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Name = Annotated[str, typer.Argument(metavar="NAME", help="The name that logs in, such as ann.")]
PasswordFile = Annotated[
    Path | None,
    typer.Option(
        allow_dash=True,
        help="Read the password from this file, or from standard input (-), and ask for none.",
    ),
]


@command(users)
def add(
    name: Name,
    role: Annotated[
        str, typer.Option(help="sender (sends mail), viewer (reads the page) or operator.")
    ] = "sender",
    sender: Annotated[
        list[str] | None,
        typer.Option(help="Senders it may use: ann@example.org, *@example.org; may be repeated."),
    ] = None,
    messages_per_minute: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Most messages in a minute.")
    ] = None,
    password_file: PasswordFile = None,
    reason: Reason = "",
    json_lines: Json = False,
) -> int:
    """Add a user. Asks for its password, or reads it from --password-file."""
    from commands.ops.users import add

    return add(
        name,
        role=role,
        senders=sender or ["*"],
        messages_per_minute=messages_per_minute,
        password_file=password_file,
        reason=reason,
        json_lines=json_lines,
    )


@command(users, "set")
def set_(
    name: Name,
    role: Annotated[str | None, typer.Option(help="sender, viewer or operator.")] = None,
    sender: Annotated[
        list[str] | None,
        typer.Option(help="Senders it may use, instead of those before; may be repeated."),
    ] = None,
    messages_per_minute: Annotated[
        int | None, typer.Option(min=0, max=100_000, help="Most messages in a minute; 0: any.")
    ] = None,
    reason: Reason = "",
    json_lines: Json = False,
) -> int:
    """Change what a user may do. Its open sessions follow within seconds."""
    from commands.ops.users import change

    return change(
        name,
        role=role,
        senders=sender or [],
        messages_per_minute=messages_per_minute,
        reason=reason,
        json_lines=json_lines,
    )


@command(users)
def passwd(
    name: Name, password_file: PasswordFile = None, reason: Reason = "", json_lines: Json = False
) -> int:
    """Change the password of a user. Sessions with the old one end within seconds."""
    from commands.ops.users import set_password

    return set_password(name, password_file, reason=reason, json_lines=json_lines)


@command(users)
def disable(name: Name, reason: Reason = "", json_lines: Json = False) -> int:
    """Refuse a user until `enable`. Its open sessions end within seconds."""
    from commands.ops.users import switch

    return switch("disable", name, reason=reason, json_lines=json_lines)


@command(users)
def enable(name: Name, reason: Reason = "", json_lines: Json = False) -> int:
    """Let a disabled user log in again."""
    from commands.ops.users import switch

    return switch("enable", name, reason=reason, json_lines=json_lines)


@command(users)
def remove(name: Name, reason: Reason = "", json_lines: Json = False) -> int:
    """Remove a user. Its messages keep its name."""
    from commands.ops.users import switch

    return switch("remove", name, reason=reason, json_lines=json_lines)


@command(users, "list")
def list_(json_lines: Json = False) -> int:
    """List the users with their roles and limits, and when each was last seen."""
    from commands.ops.users import list_users

    return list_users(json_lines=json_lines)
