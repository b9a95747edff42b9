"""The program `qmqp-relay`: it starts `commands.cli.main` so that a command answers at once.

Half of the time of a short command is Python's own: to import modules, to search them for garbage
meanwhile, and to take them apart at the end. A short command does the last two hardly at all. The
services (SERVICES) start and end as every program does.
"""

import gc
import os
import sys

SERVICES = frozenset(("up", "smtpd", "worker", "web", "sink", "demo", "migrate"))
# Objects that are created before the garbage collector looks at them; the default is 2,000. A
# command with --watch is collected too, but not while it imports.
THRESHOLD = 100_000
FAILED = 1


def main() -> None:
    """Run the command of the arguments, and end the process."""
    if SERVICES.isdisjoint(sys.argv[1:2]):
        gc.set_threshold(THRESHOLD)
        _end(_status())
    _run()


def _run() -> None:
    from commands.cli.main import main as commands

    commands(prog_name="qmqp-relay")


def _status() -> int:
    try:
        _run()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return FAILED
    return 0


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
