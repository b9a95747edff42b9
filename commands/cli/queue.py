"""The commands that look at the queue and change it, all with one set of filters.

Each is a thin function over `commands.ops.show` or `commands.ops.modify`. `filtered` gives a
command the options of `_filter`, so that a filter means the same everywhere. Heavy modules are
imported when a command runs: `--help` and completion answer at once.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commands.errors import explained

if TYPE_CHECKING:
    from relay.report.filters import Filter

queue = typer.Typer(rich_markup_mode=None)


def _states(incomplete: str) -> list[str]:
    from relay.db.schema import State

    return [state for state in State if state.startswith(incomplete)]


def _routes(incomplete: str) -> list[str]:
    from commands.cli.completion import offered

    return offered("route", incomplete)


def _servers(incomplete: str) -> list[str]:
    from commands.cli.completion import offered

    return offered("server", incomplete)


def _filter(
    queue_id: Annotated[
        str | None, typer.Option("--id", help="A queue id, or as much of its end as is unique.")
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            help="queued, sending, deferred ...; may be repeated.", autocompletion=_states
        ),
    ] = None,
    sender: Annotated[
        str | None, typer.Option(help="<> is the null sender. * stands for anything.")
    ] = None,
    recipient: Annotated[
        str | None, typer.Option(help="Capitals count only before the @. * stands for anything.")
    ] = None,
    route: Annotated[
        str | None, typer.Option(help="Name of the route.", autocompletion=_routes)
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Server of the last try: host, host:port, [v6]:port, unix:/path.",
            autocompletion=_servers,
        ),
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(help="Received longer ago than 30s, 5m, 2h, 5d.")
    ] = None,
    header_message_id: Annotated[
        str | None,
        typer.Option("--message-id", help="Message-ID of the header, with or without <>."),
    ] = None,
    reply: Annotated[
        str | None, typer.Option(help="A part of the server's words at the last try.")
    ] = None,
    one: Annotated[str | None, typer.Argument(metavar="ID", help="The same as --id.")] = None,
) -> "Filter":
    """What the options mean; raises BadParameter."""
    from relay.db.schema import State
    from relay.report.filters import Filter, bracketed
    from relay.routes import parse_server
    from relay.settings import seconds

    if unknown := sorted(set(state or ()) - set(State)):
        raise typer.BadParameter(f"no state {', '.join(unknown)}: there are {', '.join(State)}")
    try:
        age = float(str(seconds(older_than))) if older_than else None
    except ValueError as error:
        raise typer.BadParameter(f"--older-than {older_than} {error}") from None
    try:
        server = parse_server(server).name if server and "*" not in server else server
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return Filter(
        tuple(state or ()),
        sender,
        recipient,
        route,
        server,
        age,
        queue_id or one,
        reply,
        bracketed(header_message_id) if header_message_id else None,
    )


def filtered(command: Callable[..., int]) -> Callable[..., None]:
    """Give a command the options of `_filter`; it gets the Filter as its first argument, and
    returns its status."""
    options = inspect.signature(_filter).parameters
    own = list(inspect.signature(command).parameters.values())[1:]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        with explained():
            wanted = _filter(**{name: given.pop(name) for name in options})
            raise typer.Exit(command(wanted, **given))

    both = [*options.values(), *own]
    vars(run)["__signature__"] = inspect.Signature(both)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in both}
    return run


Id = Annotated[
    str, typer.Argument(metavar="ID", help="A queue id, or as much of its end as is unique.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
Watch = Annotated[
    float | None, typer.Option(min=0.2, metavar="SECONDS", help="Again and again, until Ctrl-C.")
]
Reason = Annotated[str, typer.Option(help="Why; kept in the table `actions`.")]
Everything = Annotated[
    bool, typer.Option("--all", help="Every delivery: needed when no filter is given.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be touched, and change nothing.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many deliveries, oldest first.")]
Reroute = Annotated[
    bool, typer.Option("--reroute", help="By today's routes; takes what is queued and held too.")
]
Yes = Annotated[
    bool, typer.Option("--yes", "-y", help="Do not ask before more than one is touched.")
]


@queue.command("list")
@filtered
def list_(
    wanted: "Filter",
    everything: Annotated[bool, typer.Option("--all", help="What is finished as well.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many lines.")] = None,
    watch: Watch = None,
    json_lines: Json = False,
) -> int:
    """List the queue, a line a recipient, oldest first."""
    from commands.ops import show as inspect

    return inspect.watched(
        watch,
        lambda: inspect.list_queue(
            wanted, everything=everything, limit=limit, json_lines=json_lines
        ),
    )


@queue.command()
def show(queue_id: Id, watch: Watch = None, json_lines: Json = False) -> None:
    """Show all that is known about a message. Envelope, deliveries, and every try with the server's
    words."""
    with explained():
        from commands.ops import show as inspect

        raise typer.Exit(
            inspect.watched(watch, lambda: inspect.show_message(queue_id, json_lines=json_lines))
        )


@queue.command()
def why(queue_id: Id, watch: Watch = None, json_lines: Json = False) -> None:
    """Say why a message is not being sent now, and when it will be."""
    with explained():
        from commands.ops import show as inspect

        raise typer.Exit(
            inspect.watched(watch, lambda: inspect.show_why(queue_id, json_lines=json_lines))
        )


@queue.command()
def headers(queue_id: Id) -> None:
    """Print the header of a message that is still in the spool."""
    with explained():
        from commands.ops import show as inspect

        raise typer.Exit(inspect.show_body(queue_id, header_only=True))


@queue.command()
def body(queue_id: Id) -> None:
    """Print a message as it is in the spool, header and all."""
    with explained():
        from commands.ops import show as inspect

        raise typer.Exit(inspect.show_body(queue_id, header_only=False))


@queue.command()
def stats(watch: Watch = None, json_lines: Json = False) -> None:
    """Count the queue by state and by age. Shows workers, servers, rates and the slowest tries,
    too."""
    with explained():
        from commands.ops import show as inspect

        raise typer.Exit(inspect.watched(watch, lambda: inspect.show_stats(json_lines=json_lines)))


@queue.command()
@filtered
def retry(
    wanted: "Filter", everything: Everything = False, dry_run: DryRun = False, yes: Yes = False, reason: Reason = "",
    reroute: Reroute = False, limit: Limit = None, json_lines: Json = False,
) -> int:  # fmt: skip
    """Try what is deferred at once, whatever its time."""
    from commands.ops.modify import ChangeRequest, change

    return change(
        "reroute" if reroute else "retry",
        wanted,
        ChangeRequest(everything, dry_run, yes, reason, json_lines, limit),
    )


def _verb(name: str, words: str) -> None:
    """Add the command for another one of `relay.queue.operations.OPERATIONS`."""

    def command(
        wanted: "Filter", everything: Everything = False, dry_run: DryRun = False, yes: Yes = False,
        reason: Reason = "", limit: Limit = None, json_lines: Json = False,
    ) -> int:  # fmt: skip
        from commands.ops.modify import ChangeRequest, change

        return change(
            name, wanted, ChangeRequest(everything, dry_run, yes, reason, json_lines, limit)
        )

    command.__doc__ = words
    queue.command(name)(filtered(command))


_verb(
    "hold",
    "Keep what is queued or deferred until it is released. What is being sent follows after its try.",
)
_verb("release", "Queue what is held.")
_verb("bounce", "Give up, and tell the sender; --reason is told too.")
_verb("drop", "Give up, and tell nobody.")

Route = Annotated[str | None, typer.Option(help="Name of the route.", autocompletion=_routes)]
Server = Annotated[
    str | None,
    typer.Option(help="A server, as RELAY_QMQP_SERVERS spells it.", autocompletion=_servers),
]


@queue.command()
def pause(
    route: Route = None, server: Server = None, reason: Reason = "", json_lines: Json = False
) -> None:
    """Send nothing by a route or to a server until `resume`. Mail is taken all the same, and
    waits."""
    with explained():
        from commands.ops.modify import pause

        raise typer.Exit(pause(route, server, reason=reason, resume=False, json_lines=json_lines))


@queue.command()
def resume(
    route: Route = None, server: Server = None, reason: Reason = "", json_lines: Json = False
) -> None:
    """Send there again."""
    with explained():
        from commands.ops.modify import pause

        raise typer.Exit(pause(route, server, reason=reason, resume=True, json_lines=json_lines))
