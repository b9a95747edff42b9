"""The commands that read and change the queue, all with the same filters.

A command is a thin function over `commands.ops.show` or `commands.ops.modify`. `filtered` gives it
the options of `_filter`, so that a filter means the same in every command. Heavy modules are
imported when a command runs, so that `--help` and completion answer at once.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commands.cli.command import command

if TYPE_CHECKING:
    from relay.report.filters import Filter

queue = typer.Typer(rich_markup_mode=None)
FORMS = ("table", "json", "csv", "tsv")


def _states(incomplete: str) -> list[str]:
    from relay.queue.states import State

    return [state for state in State if state.startswith(incomplete)]


def _outcomes(incomplete: str) -> list[str]:
    from relay.queue.outcome import Outcome

    return [outcome for outcome in Outcome if outcome.startswith(incomplete)]


def _count_keys(incomplete: str) -> list[str]:
    from relay.report.queries import COUNT_KEYS

    return [key for key in COUNT_KEYS if key.startswith(incomplete)]


def _names(kind: str) -> Callable[[str], list[str]]:
    def names(incomplete: str) -> list[str]:
        from commands.cli.completion import offered

        return offered(kind, incomplete)

    return names


Route = Annotated[
    str | None, typer.Option(help="Name of the route.", autocompletion=_names("route"))
]
_ID_HELP = "A queue id, or its last digits if they are unique."


def _filter(
    queue_id: Annotated[str | None, typer.Option("--id", help=_ID_HELP)] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            help="queued, sending, deferred ...; may be repeated.", autocompletion=_states
        ),
    ] = None,
    sender: Annotated[
        str | None, typer.Option(help="<> is the null sender. * matches anything.")
    ] = None,
    recipient: Annotated[
        str | None,
        typer.Option(help="Only the part before the @ is case-sensitive. * matches anything."),
    ] = None,
    route: Route = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="It was last tried there, or would go there: host, host:port, [v6]:port,"
            " unix:/path.",
            autocompletion=_names("server"),
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
        str | None,
        typer.Option(help="A part of the last reply, or of the reason of a pause."),
    ] = None,
    newer_than: Annotated[
        str | None, typer.Option(help="Received less long ago than 30s, 5m, 2h, 5d.")
    ] = None,
    received_between: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="FROM TO",
            help="Received in that time: 2026-11-25, '2026-11-25 13:00', in UTC or with its zone.",
        ),
    ] = None,
    expires_within: Annotated[
        str | None, typer.Option(help="Unfinished, and expires in less than 30s, 5m, 2h, 5d.")
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="Address of the SMTP client. * matches anything.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="User that the client logged in as.")] = None,
    outcome: Annotated[
        list[str] | None,
        typer.Option(
            help="Outcome of the last attempt: deferred, rejected ...; may be repeated.",
            autocompletion=_outcomes,
        ),
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help="Domain of the recipient. * matches anything.")
    ] = None,
    uncertain: Annotated[
        bool, typer.Option("--uncertain", help="An attempt may have delivered it already.")
    ] = False,
    positional_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="The same as --id.")
    ] = None,
) -> "Filter":
    """The filter that the options mean; raises BadParameter."""
    from relay.queue.outcome import Outcome
    from relay.queue.states import State
    from relay.report.filters import Filter, bracketed
    from relay.routes import parse_server

    try:
        server = parse_server(server).name if server and "*" not in server else server
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return Filter(
        states=_known("state", state, State),
        sender=sender,
        recipient=recipient,
        route=route,
        server=server,
        older_than=length("--older-than", older_than),
        id=queue_id or positional_id,
        reply=reply,
        header_message_id=bracketed(header_message_id) if header_message_id else None,
        newer_than=length("--newer-than", newer_than),
        received_between=_moments(received_between) if received_between else None,
        expires_within=length("--expires-within", expires_within),
        client=client,
        user=user,
        outcomes=_known("outcome", outcome, Outcome),
        domain=domain,
        uncertain=uncertain,
    )


def form_of(given: str | None, *, json_lines: bool) -> str:
    """The form of the output: what is asked for, else a table on a terminal and text with tabs in
    a pipe; raises BadParameter."""
    if given not in (None, *FORMS):
        raise typer.BadParameter(f"no format {given}: choose one of {', '.join(FORMS)}")
    return given or ("json" if json_lines else "table" if sys.stdout.isatty() else "tsv")


def _known(what: str, given: list[str] | None, names: Iterable[str]) -> tuple[str, ...]:
    """The given names, which must all be known; raises BadParameter."""
    if unknown := sorted(set(given or ()) - set(names)):
        choice = ", ".join(names)
        raise typer.BadParameter(f"no {what} {', '.join(unknown)}: choose one of {choice}")
    return tuple(given or ())


def length(option: str, text: str | None) -> float | None:
    """A length of time such as 5m, in seconds; raises BadParameter."""
    from relay.settings import seconds

    try:
        return seconds(text) if text else None
    except ValueError as error:
        raise typer.BadParameter(f"{option} {text} {error}") from None


def _moments(texts: tuple[str, str]) -> tuple[datetime, datetime]:
    """Two times; raises BadParameter."""
    from relay.report.filters import parse_moment

    try:
        return parse_moment(texts[0]), parse_moment(texts[1])
    except ValueError as error:
        raise typer.BadParameter(f"--received-between: {error}") from None


def filtered(function: Callable[..., int], *omitted: str) -> Callable[..., int]:
    """Give a command the options of `_filter`, and its own without the omitted ones. The function
    gets the Filter as its first argument."""
    options = inspect.signature(_filter).parameters
    own = list(inspect.signature(function).parameters.values())[1:]
    parameters = [*options.values(), *(one for one in own if one.name not in omitted)]

    @functools.wraps(function)
    def run(**values: Any) -> int:
        filter_ = _filter(**{name: values.pop(name) for name in options})
        return function(filter_, **values)

    vars(run)["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


Id = Annotated[str, typer.Argument(metavar="ID", help=_ID_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for each line.")]
Format = Annotated[
    str | None,
    typer.Option("--format", help="table, json, csv or tsv.", autocompletion=lambda: list(FORMS)),
]
Watch = Annotated[
    float | None,
    typer.Option(min=0.2, metavar="SECONDS", help="Repeat at this interval until Ctrl-C."),
]
Local = Annotated[
    bool,
    typer.Option(
        "--local",
        help="Times in the zone of this machine, also for the ages of a table; else UTC.",
    ),
]
Reason = Annotated[
    str, typer.Option(help="Why you do it. It is recorded with your name and the time.")
]
Everything = Annotated[
    bool, typer.Option("--all", help="Change all deliveries. Required if there is no filter.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show which deliveries would change, and change nothing.")
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="At most this many deliveries: the oldest, or with --newest those."),
]
Newest = Annotated[
    bool, typer.Option("--newest", help="The newest first, or the newest that --limit allows.")
]
Reroute = Annotated[
    bool,
    typer.Option("--reroute", help="Use the current routes; also for queued and held deliveries."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for a confirmation.")]


@command(queue, "list")
@filtered
def list_(
    filter_: "Filter",
    everything: Annotated[
        bool, typer.Option("--all", help="Also deliveries that are finished.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many lines.")] = None,
    newest: Newest = False,
    count_by: Annotated[
        str | None,
        typer.Option(
            help="Count by reason, sender, domain, server, route or client. Addresses, ids and"
            " numbers in reasons are masked.",
            autocompletion=_count_keys,
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Only these columns of the view: queue_id,state,reason")
    ] = None,
    form: Format = None,
    watch: Watch = None,
    local: Local = False,
    json_lines: Json = False,
) -> int:
    """List the queue, a line for each recipient, oldest first."""
    from commands.ops.listing import ListOptions, list_queue
    from commands.ops.watch import watched
    from commands.output import local_times

    options = ListOptions(
        everything=everything,
        limit=limit,
        newest=newest,
        columns=tuple(columns.replace(",", " ").split()) if columns else (),
        form=form_of(form, json_lines=json_lines),
        local=local,
    )
    with local_times(local):
        return watched(watch, lambda: list_queue(filter_, options, count_by=count_by))


@command(queue)
def show(queue_id: Id, watch: Watch = None, local: Local = False, json_lines: Json = False) -> int:
    """Show everything about a message. Prints envelope, deliveries, and every attempt with its
    reply."""
    from commands.ops.show import show_message
    from commands.ops.watch import watched
    from commands.output import local_times

    with local_times(local):
        return watched(watch, lambda: show_message(queue_id, json_lines=json_lines))


@command(queue)
def why(queue_id: Id, watch: Watch = None, local: Local = False, json_lines: Json = False) -> int:
    """Say why a message is not being sent now, and when it will be."""
    from commands.ops.show import show_why
    from commands.ops.watch import watched
    from commands.output import local_times

    with local_times(local):
        return watched(watch, lambda: show_why(queue_id, json_lines=json_lines))


@command(queue)
def headers(queue_id: Id) -> int:
    """Print the header of a message that is still in the spool."""
    from commands.ops.show import show_body

    return show_body(queue_id, header_only=True)


@command(queue)
def body(queue_id: Id) -> int:
    """Print a message that is still in the spool: header and body."""
    from commands.ops.show import show_body

    return show_body(queue_id, header_only=False)


@command(queue)
def stats(watch: Watch = None, local: Local = False, json_lines: Json = False) -> int:
    """Count the queue by state and age. Also prints workers, servers, rates and slow attempts."""
    from commands.ops.show import show_stats
    from commands.ops.watch import watched
    from commands.output import local_times

    with local_times(local):
        return watched(watch, lambda: show_stats(json_lines=json_lines))


@command(queue)
def problems(
    nagios: Annotated[
        bool, typer.Option("--nagios", help="One line, and the exit statuses of Nagios.")
    ] = False,
    form: Format = None,
    watch: Watch = None,
    local: Local = False,
    json_lines: Json = False,
) -> int:
    """Show what is wrong now, and the next command to type. Exits with status 1 if anything is."""
    from commands.ops.problems import show_problems
    from commands.ops.watch import watched
    from commands.output import local_times

    shown = form_of(form, json_lines=json_lines)
    with local_times(local):
        return watched(watch, lambda: show_problems(form=shown, nagios=nagios))


@command(queue)
def actions(
    queue_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Only those on this message.")
    ] = None,
    newer_than: Annotated[str | None, typer.Option(help="In the last 30s, 5m, 2h, 5d.")] = None,
    actor: Annotated[
        str | None, typer.Option(help="Only of this operator: user@host. * matches anything.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many lines.")] = None,
    form: Format = None,
    local: Local = False,
    json_lines: Json = False,
) -> int:
    """Show what operators did: who, when, why, and to how many deliveries. Newest first."""
    from commands.ops.actions import show_actions
    from commands.output import local_times

    with local_times(local):
        return show_actions(
            queue_id,
            newer_than=length("--newer-than", newer_than),
            actor=actor,
            limit=limit,
            form=form_of(form, json_lines=json_lines),
        )


def _operation(name: str, help_: str, *omitted: str) -> None:
    """Add the command for an operation of `relay.queue.operations`, without the omitted options."""

    def run(
        filter_: "Filter",
        everything: Everything = False,
        dry_run: DryRun = False,
        yes: Yes = False,
        reason: Reason = "",
        reroute: Reroute = False,
        limit: Limit = None,
        newest: Newest = False,
        json_lines: Json = False,
    ) -> int:
        from commands.ops.modify import change

        return change(
            "reroute" if reroute else name,
            filter_,
            everything=everything,
            dry_run=dry_run,
            yes=yes,
            reason=reason,
            limit=limit,
            newest=newest,
            json_lines=json_lines,
        )

    run.__doc__ = help_
    command(queue, name)(filtered(run, *omitted))


_operation("retry", "Retry deferred deliveries now, before they are due.")
for _name, _help in {
    "hold": "Keep queued and deferred deliveries until they are released. A delivery that is being"
    " sent is held after this attempt.",
    "release": "Make held deliveries queued again.",
    "bounce": "Give up deliveries, and tell the senders. The text of --reason is sent too.",
    "drop": "Give up deliveries without telling the senders.",
}.items():
    _operation(_name, _help, "reroute")

Server = Annotated[
    str | None,
    typer.Option(help="A server, as in RELAY_QMQP_SERVERS.", autocompletion=_names("server")),
]


@command(queue)
def pause(
    route: Route = None, server: Server = None, reason: Reason = "", json_lines: Json = False
) -> int:
    """Send nothing on a route or to a server until `resume`. Mail is still accepted, and waits."""
    from commands.ops.modify import pause

    return pause(route, server, reason=reason, resume=False, json_lines=json_lines)


@command(queue)
def resume(
    route: Route = None, server: Server = None, reason: Reason = "", json_lines: Json = False
) -> int:
    """Send on a paused route, or to a paused server, again."""
    from commands.ops.modify import pause

    return pause(route, server, reason=reason, resume=True, json_lines=json_lines)
