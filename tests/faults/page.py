"""The table of a run: printed, and written between two markers of docs/reliability.md."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.faults.trial import TrialResult

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
COLUMNS = (
    "fault",
    "database",
    "accepted",
    "refused",
    "unknown",
    "delivered",
    "doubles (uncertain)",
    "lost",
    "invented",
    "altered",
    "stuck",
    "DSNs",
    "seconds",
    "result",
)
NAMES = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}


def row(result: TrialResult) -> list[str]:
    """The cells of a result."""
    books = result.books
    head = [result.case, NAMES[result.database]]
    if result.not_run:
        return [*head, *["-"] * (len(COLUMNS) - 3), f"not run: {result.not_run}"]
    return [
        *head,
        str(books.accepted),
        str(books.refused),
        f"{books.unknown} ({books.unknown_delivered})",
        str(books.delivered),
        f"{books.doubles} ({books.doubles_uncertain})",
        *map(str, (books.lost, books.invented, books.altered, books.stuck)),
        f"{books.dsns} of {books.dsns_due}",
        f"{result.seconds:.0f}",
        "FAILED" if result.problems else "ok",
    ]


def table(results: Sequence[TrialResult]) -> str:
    """A Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(row, results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(about: Mapping[str, str], results: Sequence[TrialResult]) -> str:
    """The facts of the run, and its table."""
    facts = "\n".join(f"- {name}: {value}" for name, value in about.items())
    return f"{facts}\n\n{table(results)}"


def write(marker: str, text: str, page: Path = PAGE) -> None:
    """Replace what is between the markers. Raises ValueError for a page without them."""
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    content = page.read_text()
    if not pattern.search(content):
        raise ValueError(f"{page} has no markers of {marker}")
    page.write_text(pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", content))
