"""`python -m bench`: start the chosen systems, measure the chosen parts, write the results.

The exit status is 1 if a run failed.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import machine, plot, report
from bench.parts import PARTS, QUICK, SMOKE, Scale
from bench.postfix_system import PostfixSystem, missing
from bench.relay_system import RelaySystem
from bench.runs import measure
from bench.systems import System, find_program

RESULTS = Path(__file__).parent / "results"
SYSTEMS = ("postgresql", "sqlite", "postfix")
_SCALE_OPTIONS = {
    "runs": "how often each part is run on each system",
    "messages": "messages of a load",
    "sessions": "SMTP sessions at once",
    "size": "bytes of a message",
    "singles": "messages one at a time, for latency",
    "large": "messages of 20 MB",
}


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure the relay, beside Postfix."
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a few minutes: one run of each part, small loads")
    add("--smoke", action="store_true", help="a minute: every part runs; its figures mean nothing")
    choices = {"parts": [part.name for part in PARTS], "systems": list(SYSTEMS)}
    for name, known in choices.items():
        add(f"--{name}", default=",".join(known), help=f"some of {','.join(known)}")
    for name, text in _SCALE_OPTIONS.items():
        add(f"--{name}", type=int, help=text)
    add("--directory", type=Path, default=Path("/var/tmp"), help="a directory on the disk to use")
    add("--results", type=Path, default=RESULTS, help="where the JSON file and the plot go")
    add("--no-postfix-log", action="store_true", help="let Postfix write no log")
    options = parser.parse_args(arguments)
    for name, known in choices.items():
        chosen = getattr(options, name).split(",")
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: there is no {', '.join(sorted(unknown))}")
        setattr(options, name, chosen)
    return options


def scale_of(options: argparse.Namespace) -> Scale:
    changes = {name: value for name in _SCALE_OPTIONS if (value := getattr(options, name))}
    scale = SMOKE if options.smoke else QUICK if options.quick else Scale()
    files = machine.allow_open_files(max(scale.connections) + 200)
    connections = tuple(count for count in scale.connections if count + 200 <= files)
    if connections != scale.connections:
        print(f"at most {max(connections)} connections: only {files} files may be open")
    return dataclasses.replace(scale, connections=connections, **changes)


@contextmanager
def running(options: argparse.Namespace, directory: Path) -> Iterator[list[System]]:
    """The chosen systems that this machine can run; they are stopped at the end."""
    systems: list[System] = [
        RelaySystem(kind, directory) for kind in SYSTEMS[:2] if kind in options.systems
    ]
    if "postfix" in options.systems:
        if reason := missing():
            print(f"without Postfix: {reason}")
        else:
            systems.append(PostfixSystem(directory, log=not options.no_postfix_log))
    with ExitStack() as stack:
        for system in systems:
            system.start()
            stack.callback(system.stop)
        yield systems


def run(options: argparse.Namespace, directory: Path) -> bool:
    """Measure, print and write; whether no run failed."""
    scale = scale_of(options)
    about = machine.describe(directory)
    file = options.results / f"{about['when'].replace(':', '')}.json"
    results = []
    with running(options, directory) as systems:
        for system in systems:
            about |= {f"{system.name}: {name}": value for name, value in system.facts().items()}
        about["source, sinks"] = "Postfix' tools" if find_program("smtp-source") else "our own"
        about["command"] = "python -m bench " + " ".join(sys.argv[1:])
        about["scale"] = ", ".join(
            f"{name} {value}" for name, value in dataclasses.asdict(scale).items()
        )
        print(report.facts(about), flush=True)
        for part in PARTS:
            if part.name not in options.parts:
                continue
            results.append(measure(part, systems, scale))
            print(report.table(results[-1], [system.name for system in systems]), flush=True)
            # After each part, because a later one may fail or be interrupted.
            about["load after"] = machine.load_average()
            report.write(file, results, about)
            plot.draw(report.as_json(results, about), file.with_suffix(".svg"))
    print(f"\n{file}\n{file.with_suffix('.svg')}")
    return not any(result.failures for result in results)


def main() -> int:
    options = parse_options()
    began = time.monotonic()
    # All files of the run are below one directory, which is removed after the last measurement.
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.directory.resolve()) as name:
        directory = Path(name)
        directory.chmod(0o755)  # other users run PostgreSQL and Postfix
        succeeded = run(options, directory)
    print(f"{time.monotonic() - began:.0f} s")
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
