"""`python -m tests.fuzz [--seconds N] [TARGET ...]`: fuzzes the targets, as many at a time as there
are processors.

Each target runs in a process of its own, because libFuzzer ends its process. It begins with the
kept corpus. New inputs go to `.fuzz/TARGET/`, and an input that fails to `.fuzz/TARGET-crash-...`,
with a line for the corpus on standard error. `--keep` fuzzes nothing; it adds the inputs of
`.fuzz/TARGET/` that reach new code to the corpus. The exit status is 1 if a target failed.
"""

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

TARGETS = ("qmqp_reader", "qmqp_session", "smtp_session", "content", "addresses", "proxy_header")
FOUND = Path(".fuzz")
CORPUS = Path(__file__).parent / "corpus"
LONGEST = 4096  # bytes of an input
_ROOMS = ("qmqp", "qmqpd", "reception", "smtpd", "tests.fuzz")


def fuzz(target: str, arguments: list[str]) -> None:
    """Runs libFuzzer on a target in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=list(_ROOMS)):
        from tests.fuzz import targets

    # To merge, libFuzzer gives this name of the program to a shell.
    program = f"{shlex.quote(sys.executable)} -m tests.fuzz --target {target}"
    atheris.Setup([program, *arguments], targets.TARGETS[target])
    atheris.Fuzz()


def kept(target: str) -> list[bytes]:
    """The kept inputs of a target."""
    lines = (CORPUS / f"{target}.txt").read_text("ascii").splitlines()
    return [
        line.encode("ascii").decode("unicode_escape").encode("latin-1")
        for line in lines
        if not line.startswith("#")
    ]


def written(data: bytes) -> str:
    """An input as a line of the corpus."""
    line = data.decode("latin-1").encode("unicode_escape").decode("ascii")
    if line.startswith("#"):
        line = f"\\x23{line[1:]}"
    return f"{line[:-1]}\\x20" if line.endswith(" ") else line


def keep(target: str) -> int:
    """Adds the inputs that reach new code to the kept ones; the exit status of libFuzzer."""
    with TemporaryDirectory() as directory:
        names = [_write(Path(directory), data) for data in kept(target)]
        done = _libfuzzer(target, "-merge=1", directory, str(FOUND / target))
        new = [path for path in Path(directory).iterdir() if path.name not in names]
        lines = sorted(written(path.read_bytes()) for path in new)
        with (CORPUS / f"{target}.txt").open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
    print(f"{target}: {len(lines)} new inputs", flush=True)
    return done.returncode


def run(target: str, seconds: int) -> int:
    """Fuzzes a target in a process of its own; its exit status."""
    found = FOUND / target
    found.mkdir(parents=True, exist_ok=True)
    for data in kept(target):
        _write(found, data)
    done = _libfuzzer(target, f"-max_total_time={seconds}", "-print_final_stats=1", str(found))
    lines = done.stderr.splitlines()
    words = ("stat::number_of_executed_units", "stat::new_units_added")
    facts = [line.split("::")[1] for line in lines if line.startswith(words)]
    if done.returncode:
        print("\n".join(lines[-40:]), file=sys.stderr)
        for path in FOUND.glob(f"{target}-*"):
            print(f"{path}: {written(path.read_bytes())}", file=sys.stderr)
    print(f"{target}: {'failed' if done.returncode else 'ok'}  {'  '.join(facts)}", flush=True)
    return done.returncode


def _write(directory: Path, data: bytes) -> str:
    """Writes an input as libFuzzer names it; its name."""
    name = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    (directory / name).write_bytes(data)
    return name


def _libfuzzer(target: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "-m", "tests.fuzz", "--target", target),
        *(f"-max_len={LONGEST}", "-timeout=20", "-rss_limit_mb=1024"),
        f"-artifact_prefix={FOUND}/{target}-",
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def main(arguments: list[str]) -> int:
    """Fuzzes all targets, or those that are named."""
    if arguments[:1] == ["--target"]:
        fuzz(arguments[1], arguments[2:])
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--keep", action="store_true", help="keep inputs that reach new code")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=" ".join(TARGETS))
    options = parser.parse_args(arguments)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        statuses = threads.map(
            lambda target: keep(target) if options.keep else run(target, options.seconds),
            options.targets or TARGETS,
        )
        return int(any(list(statuses)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
