"""`python -m bench`: start the chosen systems, measure the chosen parts, write the results.

The exit status is 1 if a run failed.
"""

import dataclasses
import json
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from bench import ledger, machine, nullmailer, plot, postfix
from bench import loop_disk as loop
from bench.ledger import LEDGER
from bench.nullmailer import NullmailerSystem
from bench.parts import PARTS, QUICK, SMOKE, Part, Scale, System
from bench.postfix import PostfixSystem
from bench.results import measure, table
from bench.services import find_program
from bench.systems import RelaySystem
from relay.settings import size as size_in_bytes

RESULTS = Path(__file__).parent / "results"
SLOW_FILES = """
WARNING: the figures will be too low. Files are expensive on an ext4 without a journal. Name another
disk with --directory, or use --loop-disk 8G (docs/performance.md, "A file system without a
journal").""".replace("\n", " ")
PART_NAMES = ",".join(part.name for part in (*PARTS, LEDGER))
SYSTEMS = "postgresql,sqlite,postfix"  # without being asked, nothing is downloaded
KNOWN_SYSTEMS = f"{SYSTEMS},nullmailer"


def chosen(text: str, known: str) -> list[str]:
    """The names of a list with commas. Raises typer.BadParameter for one that is not known."""
    names = text.split(",")
    if unknown := set(names) - set(known.split(",")):
        raise typer.BadParameter(f"there is no {', '.join(sorted(unknown))}")
    return names


def scale_of(base: Scale, **changes: int | None) -> Scale:
    """The scale with those changes that are given, and with no more connections than files may be
    open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = max(soft, min(max(base.connections) + 200, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    connections = tuple(count for count in base.connections if count + 200 <= files)
    if connections != base.connections:
        print(f"at most {max(connections)} connections: only {files} files may be open")
    given = {name: value for name, value in changes.items() if value}
    return dataclasses.replace(base, connections=connections, **given)


def started(names: list[str], top: Path, stack: ExitStack, *, postfix_log: bool) -> list[System]:
    """The systems of these names, started in directories below `top`. Says which cannot run here,
    and why."""
    systems: list[System] = [
        RelaySystem(kind, top, stack) for kind in ("postgresql", "sqlite") if kind in names
    ]
    peers: dict[str, tuple[Callable[[], str], Callable[[], System]]] = {
        "postfix": (postfix.missing, lambda: PostfixSystem(top, stack, log=postfix_log)),
        "nullmailer": (nullmailer.missing, lambda: NullmailerSystem(top, stack)),
    }
    for name, (missing, start) in peers.items():
        if name in names and (reason := missing()):
            print(f"without {name}: {reason}")
        elif name in names:
            systems.append(start())
    return systems


def measure_parts(
    plan: Sequence[tuple[Part, Sequence[System]]],
    scale: Scale,
    about: dict[str, str],
    file: Path,
) -> bool:
    """Measure parts on systems, print and write the results; whether a run failed."""
    measured = []
    for part, systems in plan:
        measured.append(measure(part, systems, scale))
        print(table(measured[-1], [system.name for system in systems]), flush=True)
        # After each part, because a later one may fail or be interrupted.
        about["load after"] = machine.load_average()
        document = {"about": about, "parts": [dataclasses.asdict(result) for result in measured]}
        file.write_text(json.dumps(document, indent=1) + "\n")
        plot.draw(document, file.with_suffix(".svg"))
    return any(result.failures for result in measured)


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="A few minutes: one run of each part, small loads.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A minute: every part runs; its figures mean nothing.")
    ] = False,
    parts: Annotated[str, typer.Option(help="Some of the parts.")] = PART_NAMES,
    systems: Annotated[str, typer.Option(help=f"Some of {KNOWN_SYSTEMS}.")] = SYSTEMS,
    runs: Annotated[
        int | None, typer.Option(help="How often each part is run on each system.")
    ] = None,
    messages: Annotated[int | None, typer.Option(help="Messages of a load.")] = None,
    sessions: Annotated[int | None, typer.Option(help="SMTP sessions at once.")] = None,
    size: Annotated[int | None, typer.Option(help="Bytes of a message.")] = None,
    singles: Annotated[
        int | None, typer.Option(help="Messages one at a time, for latency.")
    ] = None,
    large: Annotated[int | None, typer.Option(help="Messages of 20 MB.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Jobs of a figure of the ledger.")] = None,
    directory: Annotated[Path, typer.Option(help="A directory on the disk to use.")] = Path(
        "/var/tmp"
    ),
    loop_disk: Annotated[
        int | None,
        typer.Option(
            help="Make an ext4 of this size there for the run, with a journal (root).",
            parser=size_in_bytes,
            metavar="SIZE",
        ),
    ] = None,
    results: Annotated[Path, typer.Option(help="Where the JSON file and the plot go.")] = RESULTS,
    no_postfix_log: Annotated[
        bool, typer.Option("--no-postfix-log", help="Let Postfix write no log.")
    ] = False,
) -> None:
    """Measure the relay, beside Postfix."""
    part_names, system_names = chosen(parts, PART_NAMES), chosen(systems, KNOWN_SYSTEMS)
    scale = scale_of(
        SMOKE if smoke else QUICK if quick else Scale(),
        runs=runs,
        messages=messages,
        sessions=sessions,
        size=size,
        singles=singles,
        large=large,
        jobs=jobs,
    )
    if loop_disk and (reason := loop.missing()):
        raise typer.BadParameter(f"--loop-disk: {reason}")
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # removes all files too
    directory = directory.resolve()
    disk = loop.mounted(directory, loop_disk) if loop_disk else nullcontext(directory)
    # All files of the run are below one directory, which is removed after the last measurement.
    with (
        disk as place,
        tempfile.TemporaryDirectory(prefix="bench-", dir=place) as name,
        ExitStack() as stack,
    ):
        top = Path(name)
        top.chmod(0o755)  # other users run PostgreSQL and Postfix
        about = machine.describe(top)
        mail_parts = [part for part in PARTS if part.name in part_names]
        running = (
            started(system_names, top, stack, postfix_log=not no_postfix_log) if mail_parts else []
        )
        plan = [(part, running) for part in mail_parts]
        if LEDGER.name in part_names:
            plan.append((LEDGER, ledger.started(system_names, top, stack)))
        for system in running:
            about |= {f"{system.name}: {name}": value for name, value in system.facts.items()}
        about |= {
            "source, sinks": "Postfix' tools" if find_program("smtp-source") else "our own",
            "command": "python -m bench " + " ".join(sys.argv[1:]),
            "scale": ", ".join(
                f"{key} {value}" for key, value in dataclasses.asdict(scale).items()
            ),
        }
        print("\n".join(f"  {key:<38}{value}" for key, value in about.items()), flush=True)
        if about["disk"].endswith(machine.NO_JOURNAL):
            print(SLOW_FILES)
        results.mkdir(parents=True, exist_ok=True)
        file = results / f"{about['when'].replace(':', '')}.json"
        failed = measure_parts(plan, scale, about, file)
    print(f"\n{file}\n{file.with_suffix('.svg')}\n{time.monotonic() - began:.0f} s")
    sys.exit(failed)


if __name__ == "__main__":
    typer.run(main)
