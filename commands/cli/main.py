"""The command line: `qmqp-relay COMMAND`; the commands for the queue are in `commands.cli.queue`.

Each command is a thin function: it reads its settings, calls the module that does the work, and
turns what can go wrong into a sentence and an exit status (`commands.errors`). Heavy modules are
imported inside the commands, so that `--help` and completion answer at once.
"""

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer

from commands.cli.queue import Json, queue
from commands.errors import explained

main = typer.Typer(
    name="qmqp-relay",
    help="Take mail over SMTP, keep it safe, hand it to QMQP servers. Settings are RELAY_* environment variables.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@main.callback()
def closed_to_others() -> None:
    # Libraries make files too, the database's for one, and STATE_DIR may have any mode. What is in
    # them (envelopes, bodies, replies) is for no other user. Child processes inherit it.
    os.umask(0o077)


@main.command()
def up(
    demo: Annotated[
        bool, typer.Option("--demo", help="Deliver to a sink on this machine.")
    ] = False,
) -> None:
    """Run everything on this machine, in the foreground. Its state stands below RELAY_STATE_DIR."""
    with explained():
        from commands.standalone.up import run

        raise typer.Exit(run(demo=demo))


@main.command()
def smtpd() -> None:
    """Run the SMTP front end."""
    with explained(warn=False):  # it warns in its log
        from relay.log import configure
        from relay.settings import SmtpdSettings, load
        from smtpd.main import run

        settings = load(SmtpdSettings)
        configure(settings)
        raise typer.Exit(run(settings))


@main.command()
def worker() -> None:
    """Run a delivery worker, as `celery -A worker.app worker` does."""
    with explained(warn=False):
        from relay.settings import WorkerSettings, load

        settings = load(WorkerSettings)
        from worker.app import (
            run,
        )  # which reads the settings too, and ends the process for a bad one

        raise typer.Exit(run(settings))


@main.command()
def migrate(
    wait: Annotated[
        float, typer.Option(help="Wait so many seconds for a database that is away.")
    ] = 0.0,
) -> None:
    """Bring the schema of the database up to date. Waits for another that does the same."""
    with explained():
        from relay.db.engine import migrate
        from relay.log import configure
        from relay.settings import Settings, load, redacted

        settings = load(Settings)
        configure(settings)
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        revision = migrate(settings.database_url, wait)
        typer.echo(f"{redacted(settings.database_url)} is at revision {revision}")


@main.command()
def sink(
    listen: Annotated[str, typer.Option(help="host:port or unix:/path.")] = "127.0.0.1:6280",
    dump: Annotated[Path | None, typer.Option(help="Keep every message in this directory.")] = None,
    preset: Annotated[
        str, typer.Option(help="Meet a bad request as strict, qmail or postfix would.")
    ] = "strict",
    delay: Annotated[float, typer.Option(help="Accept everything, so many seconds late.")] = 0.0,
) -> None:
    """Run a QMQP server for trials. The recipient says whether it accepts, defers, refuses or
    breaks off."""
    with explained():
        from qmqp.sink import PRESETS, Answer, MagicRecipients, Rule, Sink
        from relay.routes import parse_server

        try:
            server, rule = (
                parse_server(listen),
                Rule(Answer(delay=delay)) if delay else MagicRecipients(),
            )
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
    """Send real messages through a relay of its own. Shows what becomes of each, and whether that
    is right."""
    from commands.standalone.demo import run

    raise typer.Exit(run())


@main.command()
def check(json_lines: Json = False) -> None:
    """See whether the relay can work here. Looks at settings, database, spool, broker and QMQP
    servers."""
    with explained():
        from commands.ops.check import run

        raise typer.Exit(run(json_lines=json_lines))


@main.command()
def probe(
    server: Annotated[str, typer.Argument(help="host, host:port, [v6]:port or unix:/path.")],
    json_lines: Json = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds for the connection, and for an answer.")
    ] = 5.0,
) -> None:
    """Ask a QMQP server whether it lets us in. Also which family it is of, without giving it a
    message."""
    with explained():
        from commands.ops.probe import run

        raise typer.Exit(run(server, json_lines=json_lines, timeout=timeout))


@main.command()
def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended.")] = False,
    json_lines: Json = False,
) -> None:
    """Compare files, rows and broker, and say what is wrong. Mail may flow; status 1 if something
    stays so."""
    with explained():
        from commands.ops.fsck import run

        raise typer.Exit(run(repair=repair, json_lines=json_lines))


@main.command()
def web() -> None:
    """Serve a page to look at the queue with. Read only, on RELAY_WEB_LISTEN."""
    with explained(warn=False):
        from commands.web.app import run
        from relay.log import configure
        from relay.settings import Settings, load

        settings = load(Settings)
        configure(settings)
        raise typer.Exit(run(settings))


main.add_typer(queue)


if __name__ == "__main__":
    main(prog_name="qmqp-relay")
