"""How a function becomes a command."""

import functools
from collections.abc import Callable

import typer

from commands.cli.usage import DescribedCommand
from commands.errors import say, status_of


def command[**P](
    app: typer.Typer, name: str | None = None, *, warn: bool = True
) -> Callable[[Callable[P, int]], Callable[P, None]]:
    """Add a function that returns an exit status to `app`.

    The command warns about unknown settings, and turns an error that an operator can correct into a
    sentence and an exit status.
    """

    def add(function: Callable[P, int]) -> Callable[P, None]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            from relay.settings import unknown_names

            for name, nearest in unknown_names().items() if warn else ():
                hint = f"; did you mean {nearest}?" if nearest else ""
                say(f"ignoring {name}, which is not a setting{hint}")
            try:
                status = function(*args, **kwargs)
            except typer.BadParameter:  # typer explains it
                raise
            except Exception as error:
                status = status_of(error)
            raise typer.Exit(status)

        return app.command(name or function.__name__, cls=DescribedCommand)(run)

    return add
