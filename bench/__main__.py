"""`python -m bench`: choose, start the systems, measure, print, write the results. Exit status 1:
some runs failed."""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import machine, plot, report
from bench.parts import PARTS, QUICK, SMOKE, Part, Scale
from bench.postfix_system import PostfixSystem, missing
from bench.relay_system import RelaySystem
from bench.runs import measure
from bench.systems import System, program
from tests.services import temporary_directory

RESULTS = Path(__file__).parent / "results"
SYSTEMS = ("postgresql", "sqlite", "postfix")


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure the relay, beside Postfix."
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few minutes: one run of each part, small loads"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a minute: every part runs; its figures mean nothing"
    )
    parser.add_argument(
        "--parts", default="", help=f"some of {','.join(part.name for part in PARTS)}"
    )
    parser.add_argument("--systems", default="", help=f"some of {','.join(SYSTEMS)}")
    parser.add_argument("--runs", type=int, help="how often each part is run on each system")
    parser.add_argument("--messages", type=int, help="messages of a load")
    parser.add_argument("--sessions", type=int, help="SMTP sessions at once")
    parser.add_argument("--size", type=int, help="bytes of a message")
    parser.add_argument("--singles", type=int, help="messages one at a time, for latency")
    parser.add_argument("--large", type=int, help="messages of 20 MB")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("/var/tmp"),
        help="where everything is written (a disk)",
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the JSON file and the plot go"
    )
    parser.add_argument("--no-postfix-log", action="store_true", help="let Postfix log to nowhere")
    given = parser.parse_args(words)
    for name, known in (("parts", {part.name for part in PARTS}), ("systems", set(SYSTEMS))):
        chosen = [word for word in getattr(given, name).split(",") if word]
        if unknown := set(chosen) - known:
            parser.error(f"--{name}: there is no {', '.join(sorted(unknown))}")
        setattr(given, name, chosen or sorted(known))
    return given


def scale_of(given: argparse.Namespace) -> Scale:
    names = ("runs", "messages", "sessions", "size", "singles", "large")
    changes = {name: value for name in names if (value := getattr(given, name))}
    scale = dataclasses.replace(
        SMOKE if given.smoke else QUICK if given.quick else Scale(), **changes
    )
    files = machine.open_files(max(scale.connections) + 200)
    if fewer := tuple(count for count in scale.connections if count + 200 > files):
        print(
            f"without {', '.join(map(str, fewer))} connections: at most {files} files may be open"
        )
    return dataclasses.replace(
        scale, connections=tuple(n for n in scale.connections if n not in fewer)
    )


@contextmanager
def running(given: argparse.Namespace, directory: Path) -> Iterator[list[System]]:
    """The chosen systems that this machine can run, all started; ended again afterwards."""
    chosen: list[System] = [
        RelaySystem(kind, directory) for kind in SYSTEMS[:2] if kind in given.systems
    ]
    if "postfix" in given.systems:
        if why := missing():
            print(f"without Postfix: {why}")
        else:
            chosen.append(PostfixSystem(directory, log=not given.no_postfix_log))
    with ExitStack() as stack:
        for system in chosen:
            system.start()
            stack.callback(system.stop)
        yield chosen


def main() -> int:
    given = options()
    scale, began = scale_of(given), time.monotonic()
    parts: list[Part] = [part for part in PARTS if part.name in given.parts]
    # Everything that the run writes is below one directory, which goes when the run is over and not
    # before.
    tempfile.tempdir = str(given.directory.resolve())
    directory = temporary_directory()
    directory.chmod(0o755)
    tempfile.tempdir = str(directory)
    about: dict[str, str] = machine.describe(directory)
    with running(given, directory) as systems:
        for system in systems:
            about |= {f"{system.name}: {name}": value for name, value in system.facts().items()}
        about["source, sinks"] = "Postfix' tools" if program("smtp-source") else "our own"
        about["command"] = "python -m bench " + " ".join(sys.argv[1:])
        about["scale"] = ", ".join(
            f"{name} {value}" for name, value in dataclasses.asdict(scale).items()
        )
        print(report.facts(about), flush=True)
        file, results = given.results / f"{about['when'].replace(':', '')}.json", []
        for part in parts:
            results.append(measure(part, systems, scale))
            print(report.table(results[-1], [system.name for system in systems]), flush=True)
            # After each part: what comes later may fail, or take somebody's patience.
            about |= {"load after": " ".join(f"{value:.1f}" for value in os.getloadavg())}
            report.write(file, results, about)
            plot.draw(report.as_json(results, about), file.with_suffix(".svg"))
    print(f"\n{file}\n{file.with_suffix('.svg')}\n{time.monotonic() - began:.0f} s")
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
