"""The commands `qmqp-relay events ...` and `qmqp-relay webhooks ...`: thin functions over
`commands.ops.events`."""

from typing import Annotated

import typer

from commands.cli.command import command
from commands.cli.queue import Json, Local, Reason, length
from commands.cli.usage import GroupedCommands

events = typer.Typer(
    name="events",
    cls=GroupedCommands,
    help="Show what became of mail, as webhooks get it (docs/webhooks.md). Events are recorded"
    " while there is a webhook, or a plugin with an event hook.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
webhooks = typer.Typer(
    name="webhooks",
    cls=GroupedCommands,
    help="List, test and enable the webhooks of RELAY_WEBHOOKS.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _types(incomplete: str) -> list[str]:
    from relay.events.model import EventType

    return [kind for kind in EventType if kind.startswith(incomplete)]


Types = Annotated[
    list[str] | None,
    typer.Option(
        "--type", help="accepted, delivered, bounced ...; may be repeated.", autocompletion=_types
    ),
]
Since = Annotated[str | None, typer.Option(help="Of the last 30s, 5m, 2h, 5d.")]
Id = Annotated[str | None, typer.Option("--id", help="Only those of this message.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the webhook.")]


@command(typer.Typer())
def _show(
    *,
    follow: bool,
    kinds: list[str] | None,
    since: str | None,
    queue_id: str | None,
    limit: int,
    local: bool,
    json_lines: bool,
) -> int:
    from commands.ops.events import event_filter, follow_events, show_events
    from commands.output import local_times

    filter_ = event_filter(kinds, length("--since", since), queue_id)
    with local_times(local):
        if follow:
            return follow_events(filter_, limit=limit, json_lines=json_lines)
        return show_events(filter_, limit=limit, json_lines=json_lines)


@events.callback()
def show(
    context: typer.Context,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")
    ] = False,
    kinds: Types = None,
    since: Since = None,
    queue_id: Id = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many lines, the newest.")] = 100,
    local: Local = False,
    json_lines: Json = False,
) -> None:
    """Show what became of mail, the newest last, as webhooks get it (docs/webhooks.md). Events are
    recorded while there is a webhook, or a plugin with an event hook."""
    if context.invoked_subcommand is None:
        _show(
            follow=follow,
            kinds=kinds,
            since=since,
            queue_id=queue_id,
            limit=limit,
            local=local,
            json_lines=json_lines,
        )


@command(events)
def replay(
    webhook: Annotated[
        str | None, typer.Option(help="Only to this webhook. Without it to all that are enabled.")
    ] = None,
    kinds: Types = None,
    since: Since = None,
    queue_id: Id = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All events. Required without another option.")
    ] = False,
    json_lines: Json = False,
) -> int:
    """Deliver events again, with their old ids, to webhooks that have lost them."""
    from commands.ops.events import event_filter, replay_events

    if not (everything or kinds or since or queue_id):
        raise typer.BadParameter("say which events: --since 2h, --type bounced, --id, or --all")
    filter_ = event_filter(kinds, length("--since", since), queue_id)
    return replay_events(filter_, webhook, json_lines=json_lines)


@command(webhooks, "list")
def list_(json_lines: Json = False) -> int:
    """List webhooks and plugins that get events: what waits, since when, and why."""
    from commands.ops.events import list_webhooks

    return list_webhooks(json_lines=json_lines)


@command(webhooks, "test")
def try_one(name: Name, json_lines: Json = False) -> int:
    """Post an event of the type `test` to a webhook of RELAY_WEBHOOKS, and show the reply."""
    from commands.ops.events import post_test_event

    return post_test_event(name, json_lines=json_lines)


@command(webhooks)
def enable(name: Name, reason: Reason = "", json_lines: Json = False) -> int:
    """Record events again for a webhook that replied 410. What waited is posted now."""
    from commands.ops.events import enable_webhook

    return enable_webhook(name, reason=reason, json_lines=json_lines)
