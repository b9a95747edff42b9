"""`--watch`: a command repeats itself until Ctrl-C."""

import contextlib
import sys
import time
from collections.abc import Callable

import typer

from commands.errors import DONE, OUT_OF_REACH, explanation, say


def watched(
    interval: float | None, run: Callable[[], int], pause: Callable[[float], None] = time.sleep
) -> int:
    """Run once, or every `interval` seconds until Ctrl-C on a cleared screen; the exit status.

    While a command is repeated, a database that is out of reach is reported and tried again.
    """
    status = DONE
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            if interval and sys.stdout.isatty():
                typer.echo("\x1b[H\x1b[2J", nl=False)
            try:
                status = run()
            except Exception as error:
                known, text = explanation(error)
                if not interval or known != OUT_OF_REACH:
                    raise
                status = known
                say(text)
            if not interval:
                return status
            sys.stdout.flush()
            pause(interval)
    return status
