"""How an error ends a command: a sentence on standard error and an exit status.

0 done, 1 nothing matched, 2 wrong use (also a bad setting), 3 a service is out of reach, 130
interrupted (Ctrl-C). What must stay true: an error that an operator can correct has no traceback,
and no output contains a password.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import typer

DONE, NOTHING_MATCHED, WRONG_USE, OUT_OF_REACH = range(4)
INTERRUPTED = 130


def say(text: str) -> None:
    """Print a sentence on standard error."""
    typer.echo(f"qmqp-relay: {text}", err=True)


def command[**P](
    app: typer.Typer, name: str | None = None, *, warn: bool = True
) -> Callable[[Callable[P, int]], Callable[P, None]]:
    """Add a function that returns an exit status to `app`, with its errors `explained`."""

    def add(function: Callable[P, int]) -> Callable[P, None]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            with explained(warn=warn):
                raise typer.Exit(function(*args, **kwargs))

        return app.command(name)(run)

    return add


@contextlib.contextmanager
def explained(*, warn: bool = True) -> Iterator[None]:
    """Warn about unknown settings, and turn an error that an operator can correct into a sentence
    and an exit status."""
    from relay.settings import unknown_names

    for warning in unknown_names() if warn else ():
        say(warning)
    try:
        yield
    except (typer.Exit, typer.BadParameter):
        raise
    except Exception as error:
        status, text = explanation(error)
        if status is None:
            raise
        say(text)
        raise typer.Exit(status) from None


def explanation(error: Exception) -> tuple[int | None, str]:
    """The exit status and the sentence for an error; the status is None for a fault of our own."""
    from sqlalchemy.exc import DBAPIError

    from commands.standalone.up import UpError
    from reception.spooler_client import SpoolerError
    from relay.db.engine import DatabaseError, is_outage, lacks_schema
    from relay.log import first_line
    from relay.report.queries import NoSuchMessage
    from relay.settings import SettingsError
    from relay.spool.store import SpoolError

    match error:
        case NoSuchMessage():
            return NOTHING_MATCHED, str(error)
        case SettingsError() | UpError() | DatabaseError() | SpoolError():
            return WRONG_USE, str(error)
        case SpoolerError():  # processes or memory are short: the next start may succeed
            return OUT_OF_REACH, str(error)
        case OSError(filename=str(name)):  # for example a spool of another user
            return OUT_OF_REACH, f"{name}: {error.strerror}"
        case DBAPIError() if is_outage(error):
            if lacks_schema(error):
                return (
                    OUT_OF_REACH,
                    "the database has no tables of this version: run `qmqp-relay migrate`",
                )
            return OUT_OF_REACH, f"database: {first_line(error.orig)}; run `qmqp-relay check`"
    return None, ""
