"""How an error ends a command: a sentence on standard error and an exit status.

0 done, 1 nothing matched, 2 wrong use (also a bad setting), 3 a service is out of reach, 130
interrupted (Ctrl-C). What must stay true: an error that an operator can correct has no traceback,
and no output contains a password.
"""

import sys

DONE, NOTHING_MATCHED, WRONG_USE, OUT_OF_REACH = range(4)
INTERRUPTED = 130


class CommandError(Exception):
    """Ends a command with an exit status and a sentence that says why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def say(text: str) -> None:
    """Print a sentence on standard error."""
    print(f"qmqp-relay: {text}", file=sys.stderr)


def status_of(error: Exception) -> int:
    """Print the sentence for an error, and return its exit status. Raises a fault of our own."""
    status, text = explanation(error)
    if status is None:
        raise error
    say(text)
    return status


def explanation(error: Exception) -> tuple[int | None, str]:
    """The exit status and the sentence for an error; the status is None for a fault of our own."""
    from sqlalchemy.exc import DBAPIError

    from reception.spooler_client import SpoolerError
    from relay.db.engine import (
        DatabaseError,
        OlderDatabase,
        WrongSchema,
        is_outage,
        lacks_schema,
    )
    from relay.log import first_line
    from relay.report.queries import NoSuchMessage
    from relay.settings import SettingsError
    from relay.spool.store import SpoolError

    match error:
        case CommandError():
            return error.status, str(error)
        case NoSuchMessage():
            return NOTHING_MATCHED, str(error)
        case SettingsError() | DatabaseError() | SpoolError():
            return WRONG_USE, str(error)
        case OlderDatabase() | WrongSchema():
            return OUT_OF_REACH, str(error)
        case SpoolerError():  # processes or memory are short: the next start may succeed
            return OUT_OF_REACH, str(error)
        case OSError(filename=str(name)):  # for example a spool of another user
            return OUT_OF_REACH, f"{name}: {error.strerror}"
        case DBAPIError() if lacks_schema(error):
            text = "the database has no tables of this version: run `qmqp-relay migrate`"
            return OUT_OF_REACH, text
        case DBAPIError() if is_outage(error):
            text = f"database: {first_line(error.orig)}; run `qmqp-relay check`"
            return OUT_OF_REACH, text
    return None, ""
