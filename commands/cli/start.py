"""The program `qmqp-relay`: it starts `commands.cli.main` so that a command answers at once.

Half of the time of a short command is Python's own: to import modules, to search them for garbage
meanwhile, and to take them apart at the end. A short command does the last two hardly at all. The
services (SERVICES) start and end as every program does. smtpd and workers run without a command
line (`commands.services`), and without docstrings (`-OO`), which are a fifth of their memory,
because most are SQLAlchemy's.
"""

import gc
import os
import sys
from importlib.util import cache_from_source
from pathlib import Path
from typing import NoReturn

SERVICES = frozenset(("up", "smtpd", "worker", "web", "sink", "demo", "migrate"))
# Objects that are created before the garbage collector looks at them; the default is 2,000. A
# command with --watch is collected too, but not while it imports.
THRESHOLD = 1_000_000
FAILED = 1


def main() -> None:
    """Run the command of the arguments, and end the process."""
    if SERVICES.isdisjoint(sys.argv[1:2]):
        gc.set_threshold(THRESHOLD)
        # Pydantic reads what each installed package declares, in search of plugins for itself.
        os.environ["PYDANTIC_DISABLE_PLUGINS"] = "1"
        _end(_status())
    if sys.argv[1:] in (["smtpd"], ["worker"]):
        _serve(sys.argv[1])
    try:
        _run()
    finally:
        _discard_unwritable()


def _serve(service: str) -> NoReturn:
    if not sys.flags.optimize and _has_bytecode():
        program = [sys.orig_argv[0], "-OO", *sys.orig_argv[1:]]
        os.execv(sys.executable, program)  # noqa: S606  (it is this program)
    from commands.services import run

    sys.exit(run(service))


def _has_bytecode() -> bool:
    """Whether Python finds bytecode without docstrings, or can keep it. Else every start would
    compile all modules, which takes some seconds."""
    kept = Path(cache_from_source(__file__, optimization=2))
    can_keep = not sys.dont_write_bytecode and os.access(kept.parent, os.W_OK)
    return can_keep or os.access(kept, os.R_OK)


def _run() -> None:
    from commands.cli.main import app_for

    app_for(sys.argv[1:])(prog_name="qmqp-relay")


def _status() -> int:
    try:
        _run()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return FAILED
    return 0


def _discard_unwritable() -> None:
    """Python ends with status 120 if it cannot write what waits in a buffer, as `up` has it for a
    terminal that was closed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)


def _end(status: int) -> None:
    """End without the destructors of each module. What was written reaches its reader before."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        status = status or FAILED
    os._exit(status)


if __name__ == "__main__":
    main()
