"""What `--help` says of a command beyond its options: its group, examples, and exit statuses.

`USAGES` has an entry for each command, by its words behind `qmqp-relay`. Help is plain text, the
same in a pipe and on a terminal, where its headings are bold. What must stay true: each command has
a group and at least two examples that it understands (`tests/unit/test_usage.py`).
"""

import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from typer.core import TyperCommand, TyperGroup

from commands.terminal import BOLD, in_colour, takes_colours

RUN = "Run the relay"
LOOK = "Look at the queue"
CHANGE = "Change the queue"
CHECK = "Check and repair"
USERS = "Users"
EVENTS = "Events and webhooks"
GROUPS = (RUN, LOOK, CHANGE, CHECK, USERS, EVENTS)
STATUSES = {
    0: "done",
    1: "nothing matched",
    2: "wrong use, or a bad setting",
    3: "a service is out of reach",
    130: "interrupted by Ctrl-C",
}
_HEADING = re.compile(r"^[A-Z][\w ]*:(?=$| [a-z-]+ )", re.M)


class Usage(NamedTuple):
    """The group of a command, examples without the name of the program, and the exit statuses that
    mean something else than in STATUSES. None: the command does not end so."""

    group: str
    examples: tuple[str, ...]
    statuses: Mapping[int, str | None] = {}

    def text(self) -> str:
        """Examples and exit statuses as sections of the help."""
        examples = "\n".join(f"  qmqp-relay {example}" for example in self.examples)
        meanings = {**STATUSES, **self.statuses}
        statuses = "\n".join(
            f"  {status:<3}  {meaning}" for status, meaning in sorted(meanings.items()) if meaning
        )
        return f"Examples:\n{examples}\n\nExit status:\n{statuses}\n"


_SERVICE = {0: "stopped by SIGTERM or Ctrl-C", 1: None, 130: None}
_QUIET = {1: None}
_CHANGED = {1: "nothing matched, or you answered no"}
_USER = {1: "there is no such user, or nothing changed"}

USAGES: Mapping[str, Usage] = {
    "up": Usage(RUN, ("up", "up --demo"), _SERVICE),
    "smtpd": Usage(
        RUN, ("smtpd", "smtpd  # RELAY_SMTP_LISTEN=0.0.0.0:25 in the environment"), _SERVICE
    ),
    "worker": Usage(
        RUN,
        ("worker", "worker  # RELAY_QMQP_SERVERS=10.0.0.7 in the environment"),
        _SERVICE | {1: "a defect, see the log"},
    ),
    "migrate": Usage(RUN, ("migrate", "migrate --wait 60"), _QUIET),
    "web": Usage(
        RUN, ("web", "web  # RELAY_WEB_LISTEN=127.0.0.1:8080 in the environment"), _SERVICE
    ),
    "sink": Usage(
        RUN,
        ("sink --dump /tmp/sink", "sink --listen 0.0.0.0:628 --delay 0.5"),
        _SERVICE | {3: None},
    ),
    "demo": Usage(
        RUN,
        ("demo", "demo && echo it works"),
        {
            0: "each message reached its expected state",
            1: "a message did not",
            2: "wrong use",
            3: None,
        },
    ),
    "list": Usage(
        LOOK,
        (
            "list --state deferred --older-than 2h",
            "list --all --recipient '*@example.org' --json",
            "list --count-by reason",
        ),
    ),
    "show": Usage(LOOK, ("show 5cfd12672a2e", "show 5cfd12672a2e --json --local")),
    "why": Usage(LOOK, ("why 5cfd12672a2e", "why 5cfd12672a2e --watch 2")),
    "headers": Usage(LOOK, ("headers 5cfd12672a2e", "headers 5cfd12672a2e | grep -i ^subject:")),
    "body": Usage(LOOK, ("body 5cfd12672a2e", "body 5cfd12672a2e >message.eml")),
    "stats": Usage(LOOK, ("stats --watch 2", "stats --json"), _QUIET),
    "problems": Usage(
        LOOK,
        ("problems", "problems --nagios"),
        {
            0: "there is no problem",
            1: "there is a problem; with --nagios: a warning",
            2: "wrong use, or a bad setting; with --nagios: a critical problem",
            3: "a service is out of reach; with --nagios: unknown",
        },
    ),
    "actions": Usage(LOOK, ("actions --newer-than 1d", "actions 5cfd12672a2e --format csv")),
    "retry": Usage(
        CHANGE,
        ("retry 5cfd12672a2e", "retry --server 10.0.0.7 --yes --reason 'repaired'"),
        _CHANGED,
    ),
    "hold": Usage(
        CHANGE,
        ("hold --sender '*@example.com' --dry-run", "hold 5cfd12672a2e --reason 'ticket 812'"),
        _CHANGED,
    ),
    "release": Usage(CHANGE, ("release 5cfd12672a2e", "release --older-than 30m --yes"), _CHANGED),
    "bounce": Usage(
        CHANGE,
        (
            "bounce 5cfd12672a2e --reason 'that mailbox has moved'",
            "bounce --domain old.example --yes",
        ),
        _CHANGED,
    ),
    "drop": Usage(
        CHANGE,
        ("drop --state held --dry-run", "drop --sender '<>' --recipient spam@example.org --yes"),
        _CHANGED,
    ),
    "pause": Usage(
        CHANGE,
        ("pause --server 10.0.0.7 --reason 'new disk'", "pause --route lists"),
        {1: "it is paused already"},
    ),
    "resume": Usage(
        CHANGE, ("resume --server 10.0.0.7", "resume --route lists"), {1: "it is not paused"}
    ),
    "check": Usage(
        CHECK,
        ("check", "check --json"),
        {1: None, 2: "something must be corrected", 130: None},
    ),
    "probe": Usage(
        CHECK,
        ("probe 10.0.0.7", "probe unix:/run/qmqp.sock --timeout 2"),
        {
            0: "the server accepts this client",
            1: "it does not, or that is unknown",
            3: "it is out of reach",
        },
    ),
    "plugins": Usage(
        CHECK,
        ("plugins", "plugins --json"),
        {1: "there is no plugin", 2: "a plugin cannot be used"},
    ),
    "fsck": Usage(
        CHECK,
        ("fsck", "fsck --repair", "fsck --rebuild --since 2h", "fsck --discard SEGMENT"),
        {0: "no inconsistency is left", 1: "one is left, or you answered no"},
    ),
    "user add": Usage(
        USERS,
        (
            "user add shop --sender '*@shop.example.org' --messages-per-minute 60",
            "user add ann --role operator --password-file ann.password",
        ),
        {1: "there is such a user already"},
    ),
    "user set": Usage(
        USERS,
        ("user set shop --messages-per-minute 600", "user set ann --role viewer --sender '*'"),
        _USER,
    ),
    "user passwd": Usage(USERS, ("user passwd shop", "user passwd shop --password-file -"), _USER),
    "user disable": Usage(
        USERS, ("user disable shop", "user disable shop --reason 'sends spam'"), _USER
    ),
    "user enable": Usage(
        USERS, ("user enable shop", "user enable shop --reason 'was cleaned'"), _USER
    ),
    "user remove": Usage(
        USERS, ("user remove shop", "user remove shop --reason 'switched off'"), _USER
    ),
    "user list": Usage(USERS, ("user list", "user list --json"), {1: "there are no users"}),
    "events": Usage(
        EVENTS,
        ("events --type bounced --since 1d", "events --follow --json"),
        {1: "no event matches"},
    ),
    "events replay": Usage(
        EVENTS,
        ("events replay --since 2h", "events replay --webhook shop --id 5cfd12672a2e"),
        {1: "no event matches"},
    ),
    "webhooks list": Usage(
        EVENTS, ("webhooks list", "webhooks list --json"), {1: "there is no webhook"}
    ),
    "webhooks test": Usage(
        EVENTS,
        ("webhooks test shop", "webhooks test shop --json"),
        {3: "it did not take the event"},
    ),
    "webhooks enable": Usage(
        EVENTS,
        ("webhooks enable shop", "webhooks enable shop --reason 'they repaired it'"),
        {1: "there is no such webhook, or it is not disabled"},
    ),
}


class DescribedCommand(TyperCommand):
    """A command whose help ends in its examples and exit statuses."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _describe(ctx, formatter)

    def get_help(self, ctx: Any) -> str:
        return _with_bold_headings(super().get_help(ctx))


class GroupedCommands(TyperGroup):
    """Commands that are listed by their groups."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        by_group: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for name, command in self.commands.items():
            words = f"{ctx.command_path} {name}".partition(" ")[2]
            group = next(
                usage.group
                for path, usage in USAGES.items()
                if path == words or path.startswith(f"{words} ")
            )
            by_group[group].append((name, command.get_short_help_str(formatter.width - 16)))
        for group, rows in by_group.items():
            if rows:
                with formatter.section(group):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _describe(ctx, formatter)

    def get_help(self, ctx: Any) -> str:
        return _with_bold_headings(super().get_help(ctx))


def _describe(ctx: Any, formatter: Any) -> None:
    if usage := USAGES.get(ctx.command_path.partition(" ")[2]):
        formatter.write_paragraph()
        formatter.write(usage.text())


def _with_bold_headings(text: str) -> str:
    if not takes_colours(sys.stdout):
        return text
    return _HEADING.sub(lambda heading: in_colour(heading[0], BOLD), text)
