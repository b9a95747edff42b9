"""docs/decisions: the index has every record once, and every record has the same parts."""

import re
from pathlib import Path

import pytest

DECISIONS = Path(__file__).parents[2] / "docs" / "decisions"
RECORDS = sorted(path for path in DECISIONS.glob("*.md") if path.name != "README.md")


def test_index_lists_every_record_in_order():
    index = (DECISIONS / "README.md").read_text()
    rows = re.findall(r"^\| \[(\d{4})\]\((\S+\.md)\) \| (.+?) \|", index, re.MULTILINE)
    numbers = [f"{number:04}" for number in range(1, len(RECORDS) + 1)]
    titles = [record.read_text().partition("\n")[0].partition(": ")[2] for record in RECORDS]
    assert rows == list(zip(numbers, [record.name for record in RECORDS], titles, strict=True))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.stem)
def test_record_has_its_number_status_and_parts(record: Path):
    page = record.read_text()
    assert page.startswith(f"# {record.name[:4]}: ")
    assert re.search(
        r"^Status: (accepted, 20\d\d-\d\d-\d\d|superseded by \d{4})", page, re.MULTILINE
    )
    parts = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert parts == ["Context", "Decision", "Consequences", "Alternatives"]
