"""What can go wrong for an operator, as a sentence and an exit status.

0 done, 1 nothing matched, 2 wrong use (a bad setting too), 3 a service is out of reach, 130
interrupted (Ctrl-C). What must stay true: no traceback for what an operator can mend, and never a
password on the screen.
"""

import contextlib
from collections.abc import Iterator

import typer

DONE, NOTHING_MATCHED, WRONG_USE, OUT_OF_REACH = range(4)
INTERRUPTED = 130


def say(words: str) -> None:
    """A sentence on standard error."""
    typer.echo(f"qmqp-relay: {words}", err=True)


@contextlib.contextmanager
def explained(*, warn: bool = True) -> Iterator[None]:
    """Warn about unknown settings, and turn errors that an operator can mend into a sentence and an
    exit status."""
    from relay.settings import SettingsError, unknown_names

    for warning in unknown_names() if warn else ():
        say(warning)
    try:
        yield
    except SettingsError as error:
        say(str(error))
        raise typer.Exit(WRONG_USE) from None
    except (typer.Exit, typer.BadParameter):
        raise
    except Exception as error:
        status, words = explanation(error)
        if status is None:
            raise
        say(words)
        raise typer.Exit(status) from None


def explanation(error: Exception) -> tuple[int | None, str]:
    """The exit status and the sentence for an error; no status: it is a fault of ours."""
    from sqlalchemy.exc import DBAPIError

    from commands.standalone.up import UpError
    from reception.policy import PolicyError
    from reception.spooler_client import SpoolerError
    from relay.db.engine import DatabaseError, is_outage, lacks_schema
    from relay.log import first_line
    from relay.report.queries import NoSuchMessage
    from relay.spool.store import SpoolError
    from smtpd.server import ListenError

    if isinstance(error, NoSuchMessage):
        return NOTHING_MATCHED, str(error)
    if isinstance(error, UpError | DatabaseError | SpoolError | PolicyError | ListenError):
        return WRONG_USE, str(error)
    if isinstance(
        error, SpoolerError
    ):  # no process or no memory to spare: the next start may have it
        return OUT_OF_REACH, str(error)
    if isinstance(error, OSError) and error.filename:  # a spool of another user
        return OUT_OF_REACH, f"{error.filename}: {error.strerror}"
    if not isinstance(error, DBAPIError) or not is_outage(error):
        return None, ""
    if lacks_schema(error):
        return OUT_OF_REACH, "the database has no tables of this version: run `qmqp-relay migrate`"
    return OUT_OF_REACH, f"database: {first_line(error.orig)} (`qmqp-relay check` looks closer)"
