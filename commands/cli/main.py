"""The command line `qmqp-relay COMMAND`. The commands for the queue are in `commands.cli.queue`,
those for users in `commands.cli.users`, those for events in `commands.cli.events`.

A command is a thin function: it reads its settings, calls the module that does the work, and
returns an exit status. `commands.cli.command` turns errors into sentences. Heavy modules are
imported inside the commands, so that `--help` and completion answer at once (`commands.cli.start`).
"""

import os
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Annotated

import typer

from commands.cli.command import command
from commands.cli.events import events, webhooks
from commands.cli.queue import Json, Yes, queue
from commands.cli.usage import DescribedCommand, GroupedCommands
from commands.cli.users import users
from commands.errors import DONE

main = typer.Typer(
    name="qmqp-relay",
    cls=GroupedCommands,
    help="Accept mail over SMTP, store it durably, and deliver it to QMQP servers. Settings are the"
    " environment variables RELAY_*.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from relay.version import running_version

        typer.echo(f"qmqp-relay {running_version()}")
        raise typer.Exit


@main.callback()
def private_files(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version, and exit."
        ),
    ] = False,
) -> None:
    # Libraries create files too, for example the database, and STATE_DIR may have any mode. The
    # files hold envelopes, bodies and replies, which other users must not read. Child processes
    # inherit the mask.
    os.umask(0o077)


@command(main)
def up(
    demo: Annotated[
        bool, typer.Option("--demo", help="Deliver to a test server on this machine.")
    ] = False,
) -> int:
    """Run the whole relay on this machine, in the foreground. Its files are in RELAY_STATE_DIR."""
    from commands.standalone.up import run

    return run(demo=demo)


@command(main, warn=False)  # its log has the warnings
def smtpd() -> int:
    """Run the SMTP server."""
    from commands.services import smtpd

    return smtpd()


@command(main, warn=False)
def worker() -> int:
    """Run a delivery worker, as `celery -A worker.app worker` does."""
    from commands.services import worker

    return worker()


@command(main)
def migrate(
    wait: Annotated[
        float, typer.Option(help="Wait this many seconds for a database that is out of reach.")
    ] = 0.0,
) -> int:
    """Create or upgrade the tables of the database. Waits for a migration that already runs."""
    from relay.db.engine import migrate
    from relay.log import configure
    from relay.redaction import redacted
    from relay.settings import Settings, load

    settings = load(Settings)
    configure(settings)
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    revision = migrate(settings.database_url, wait)
    typer.echo(f"{redacted(settings.database_url)} is at revision {revision}")
    return DONE


@command(main)
def sink(
    listen: Annotated[str, typer.Option(help="host:port or unix:/path.")] = "127.0.0.1:6280",
    dump: Annotated[Path | None, typer.Option(help="Keep every message in this directory.")] = None,
    preset: Annotated[
        str, typer.Option(help="Reply to a bad request as strict, qmail or postfix does.")
    ] = "strict",
    delay: Annotated[
        float, typer.Option(help="Accept every message, after this many seconds.")
    ] = 0.0,
) -> int:
    """Run a QMQP server for tests. The recipient's address decides whether it accepts, defers,
    rejects or breaks off."""
    import asyncio

    from qmqp.sink import PRESETS, Answer, MagicRecipients, Rule, Sink
    from relay.routes import parse_server

    try:
        server = parse_server(listen)
        rule = Rule(Answer(delay=delay)) if delay else MagicRecipients()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if preset not in PRESETS:
        raise typer.BadParameter(f"no preset {preset}: choose one of {', '.join(PRESETS)}")

    async def serve() -> None:
        await Sink([rule], dump, preset).start(server.host or "", server.port, path=server.path)
        await asyncio.Event().wait()

    try:
        asyncio.run(serve())
    except OSError as error:
        raise typer.BadParameter(f"cannot listen on {listen}: {error.strerror}") from None
    except KeyboardInterrupt:
        pass
    return DONE


@main.command("demo", cls=DescribedCommand)
def demo() -> None:
    """Send messages through a temporary relay. Prints their states, and whether they are as
    expected."""
    from commands.standalone.demo import run

    raise typer.Exit(run())


@command(main)
def check(json_lines: Json = False) -> int:
    """Check whether the relay can work here. Checks settings, database, spool, broker and QMQP
    servers."""
    from commands.ops.check import run
    from relay.log import log_to_stderr

    log_to_stderr()
    return run(json_lines=json_lines)


@command(main)
def plugins(json_lines: Json = False) -> int:
    """Show the plugins: order, hooks, arguments and time limits. Loads them as smtpd does."""
    from commands.ops.plugins import show_plugins
    from relay.log import log_to_stderr

    log_to_stderr()
    return show_plugins(json_lines=json_lines)


@command(main)
def probe(
    server: Annotated[str, typer.Argument(help="host, host:port, [v6]:port or unix:/path.")],
    json_lines: Json = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the connection, and for a reply.")
    ] = 5.0,
) -> int:
    """Test whether a QMQP server accepts this client. Also finds out which software it is. No
    message is sent."""
    from commands.ops.probe import run

    return run(server, json_lines=json_lines, timeout=timeout)


@command(main)
def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="Repair what can be repaired.")] = False,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Make the rows that the database lacks from the spool, held. For a database that"
            " was lost or restored from a backup.",
        ),
    ] = False,
    since: Annotated[
        str | None,
        typer.Option(help="With --rebuild: only mail that arrived in the last 30m, 2h, 5d."),
    ] = None,
    adopt: Annotated[
        bool,
        typer.Option("--adopt", help="Take over the segments of another host, which has ended."),
    ] = False,
    discard: Annotated[
        str | None,
        typer.Option(
            metavar="SEGMENT", help="Remove a damaged segment of the journal that nothing needs."
        ),
    ] = None,
    yes: Yes = False,
    json_lines: Json = False,
) -> int:
    """Compare spool, database and broker. Prints every inconsistency, and exits with status 1 if
    one remains. Mail may flow meanwhile."""
    if repair + rebuild + adopt + (discard is not None) > 1:
        raise typer.BadParameter("--repair, --rebuild, --adopt and --discard exclude each other")
    if since is not None and not rebuild:
        raise typer.BadParameter("--since belongs to --rebuild")
    if adopt:
        from commands.ops.adopt import run as run_adopt

        return run_adopt(yes=yes)
    if discard is not None:
        from commands.ops.discard import run as run_discard

        return run_discard(discard, yes=yes)
    if rebuild:
        from commands.ops.rebuild import run as run_rebuild
        from relay.settings import seconds

        try:
            age = seconds(since) if since else None
        except ValueError as error:
            raise typer.BadParameter(f"--since {since} {error}") from None
        return run_rebuild(since=age, yes=yes, json_lines=json_lines)
    from commands.ops.fsck import run

    return run(repair=repair, json_lines=json_lines)


@command(main, warn=False)
def web() -> int:
    """Serve a page that shows the queue, on RELAY_WEB_LISTEN. Operators who log in act there."""
    from commands.web.app import run
    from relay.log import configure
    from relay.settings import SmtpdSettings, load

    settings = load(SmtpdSettings)
    configure(settings)
    return run(settings)


def app_for(words: Sequence[str]) -> typer.Typer:
    """The app that understands these words: `main`, or if they begin with the name of a command of
    the queue or of this module, the same with that command alone.

    Typer makes the options of each command that it knows, which takes longer than a short command
    runs.
    """
    name = words[0] if words else None
    known = [info for app in (main, queue) for info in app.registered_commands if info.name == name]
    if not known:
        return main
    app = copy(main)
    app.registered_commands, app.registered_groups = known, []
    return app


main.add_typer(queue)
main.add_typer(users)
main.add_typer(events)
main.add_typer(webhooks)


if __name__ == "__main__":
    main(prog_name="qmqp-relay")
