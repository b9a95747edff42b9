"""The command line: `qmqp-relay COMMAND`.

Each command is a thin function: it reads its settings, calls the module that does the work, and turns what can go wrong
into a sentence and an exit status: 0 done, 1 nothing matched, 2 wrong use (a bad setting too), 3 a service is out of
reach. Heavy modules are imported inside the commands, so that `--help` and completion answer at once.

What must stay true: no traceback for what an operator can mend, and never a password on the screen.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

WRONG_USE, OUT_OF_REACH = 2, 3
main = typer.Typer(
    name="qmqp-relay",
    help="Take mail over SMTP, keep it safe, hand it to QMQP servers. Settings are RELAY_* environment variables.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


@contextlib.contextmanager
def explained(*, warn: bool = True) -> Iterator[None]:
    """Warn about unknown settings, and turn errors that an operator can mend into a sentence and an exit status."""
    from relay.settings import SettingsError, unknown_names

    for warning in unknown_names() if warn else ():
        typer.echo(f"qmqp-relay: {warning}", err=True)
    try:
        yield
    except SettingsError as error:
        typer.echo(f"qmqp-relay: {error}", err=True)
        raise typer.Exit(WRONG_USE) from None
    except (typer.Exit, typer.BadParameter):
        raise
    except Exception as error:
        status, words = _explanation(error)
        if status is None:
            raise
        typer.echo(f"qmqp-relay: {words}", err=True)
        raise typer.Exit(status) from None


def _explanation(error: Exception) -> tuple[int | None, str]:
    from sqlalchemy.exc import DBAPIError

    from commands.up import UpError
    from relay.bodies import SpoolError
    from relay.database import DatabaseError, is_outage

    if isinstance(error, UpError | DatabaseError | SpoolError):
        return WRONG_USE, str(error)
    if not isinstance(error, DBAPIError) or not is_outage(error):
        return None, ""
    words = str(error.orig).strip().partition("\n")[0]
    return OUT_OF_REACH, f"database: {words} (`qmqp-relay check` looks closer)"


@main.command()
def up(demo: Annotated[bool, typer.Option("--demo", help="Deliver to a sink on this machine.")] = False) -> None:
    """Run everything on this machine, in the foreground, below RELAY_STATE_DIR."""
    with explained():
        from commands.up import run

        raise typer.Exit(run(demo=demo))


@main.command()
def smtpd() -> None:
    """Run the SMTP front end."""
    with explained(warn=False):  # it warns in its log
        from relay.log import configure
        from relay.settings import SmtpdSettings, load
        from smtpd.server import run

        settings = load(SmtpdSettings)
        configure(settings)
        raise typer.Exit(run(settings))


@main.command()
def worker() -> None:
    """Run a delivery worker, as `celery -A worker.app worker` does."""
    with explained(warn=False):
        from relay.settings import WorkerSettings, load

        settings = load(WorkerSettings)
        from worker.app import run  # which reads the settings too, and ends the process for a bad one

        raise typer.Exit(run(settings))


@main.command()
def migrate() -> None:
    """Bring the schema of the database up to date; waits for another that does the same."""
    with explained():
        from relay.database import migrate
        from relay.settings import Settings, load, redacted

        settings = load(Settings)
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        revision = migrate(settings.database_url)
        typer.echo(f"{redacted(settings.database_url)} is at revision {revision}")


@main.command()
def sink(
    listen: Annotated[str, typer.Option(help="host:port or unix:/path.")] = "127.0.0.1:6280",
    dump: Annotated[Path | None, typer.Option(help="Keep every message in this directory.")] = None,
    preset: Annotated[str, typer.Option(help="Meet a bad request as strict, qmail or postfix would.")] = "strict",
    delay: Annotated[float, typer.Option(help="Accept everything, so many seconds late.")] = 0.0,
) -> None:
    """Run a QMQP server for trials: the recipient says whether it accepts, defers, refuses or breaks off."""
    with explained():
        from qmqp.sink import PRESETS, Answer, MagicRecipients, Rule, Sink
        from relay.routes import parse_server

        try:
            server, rule = parse_server(listen), Rule(Answer(delay=delay)) if delay else MagicRecipients()
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        if preset not in PRESETS:
            raise typer.BadParameter(f"no preset {preset}: there are {', '.join(PRESETS)}")

        async def serve() -> None:
            await Sink([rule], dump, preset).start(server.host or "", server.port, path=server.path)
            await asyncio.Event().wait()

        try:
            asyncio.run(serve())
        except OSError as error:
            raise typer.BadParameter(f"cannot listen on {listen}: {error.strerror}") from None
        except KeyboardInterrupt:
            raise typer.Exit from None


@main.command()
def demo() -> None:
    """Send real messages through a relay of its own, show what becomes of each, and say whether that is right."""
    from commands.demo import run

    raise typer.Exit(run())


@main.command()
def check(json_lines: Json = False) -> None:
    """See whether the relay can work here: settings, database, spool, broker, QMQP servers."""
    with explained():
        from commands.check import run

        raise typer.Exit(run(json_lines=json_lines))


@main.command("list")
def list_(
    state: Annotated[list[str] | None, typer.Option(help="queued, sending, deferred, held, delivered ...")] = None,
    sender: Annotated[str | None, typer.Option(help="* stands for anything, '' is the null sender.")] = None,
    recipient: Annotated[str | None, typer.Option(help="* stands for anything.")] = None,
    route: str | None = None,
    server: Annotated[str | None, typer.Option(help="Server of the last try.")] = None,
    older_than: Annotated[str | None, typer.Option(help="Received longer ago than 30s, 5m, 2h, 5d.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="What is finished as well.")] = False,
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    json_lines: Json = False,
) -> None:
    """List the queue, a line a recipient, oldest first."""
    with explained():
        from commands.inspect import list_queue
        from relay.queue import Filter
        from relay.settings import seconds

        try:
            age = float(str(seconds(older_than))) if older_than else None
        except ValueError as error:
            raise typer.BadParameter(f"--older-than {older_than} {error}") from None
        wanted = Filter(tuple(state or ()), sender, recipient, route, server, age)
        raise typer.Exit(list_queue(wanted, everything=everything, limit=limit, json_lines=json_lines))


@main.command()
def show(
    queue_id: Annotated[str, typer.Argument(metavar="ID", help="A queue id, or as much of its end as is unique.")],
    json_lines: Json = False,
) -> None:
    """Show all that is known about a message: envelope, deliveries, and every try with the server's words."""
    with explained():
        from commands.inspect import show_message

        raise typer.Exit(show_message(queue_id, json_lines=json_lines))


@main.command()
def stats(json_lines: Json = False) -> None:
    """Count the queue by state, and show workers and servers."""
    with explained():
        from commands.inspect import show_stats

        raise typer.Exit(show_stats(json_lines=json_lines))


if __name__ == "__main__":
    main(prog_name="qmqp-relay")
