"""Every numbered case of the protocol and of the queue has a test that bears its number.

The table at the end of docs/delivery.md names one for each. A: netstrings, 1 to 18. B: the client,
1 to 44. C: from SMTP to the spool, 1 to 32. D: the queue and its workers, 1 to 14.
"""

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs" / "delivery.md"
ROW = re.compile(r"^\| `([A-D]\d+)` \| [^|]+ \| `([^`]+)::(test_\w+)` \|$", re.M)
LAST = {"A": 18, "B": 44, "C": 32, "D": 14}


def rows() -> list[tuple[str, str, str]]:
    """Number, file and test of each row."""
    return ROW.findall(PAGE.read_text())


def test_every_case_has_a_row():
    numbers = [number for number, _, _ in rows()]
    assert numbers == [f"{kind}{n}" for kind, last in LAST.items() for n in range(1, last + 1)]


def test_every_row_names_a_test_that_bears_its_number():
    for number, file, test in rows():
        assert re.search(rf"^(async )?def {test}\(", (TESTS / file).read_text(), re.M), test
        assert number in test.split("_"), test


def test_numbers_of_tests_are_in_the_table():
    texts = [file.read_text() for file in TESTS.rglob("test_*.py")]
    names = [name for text in texts for name in re.findall(r"def (test_\w+)", text)]
    numbers = {
        word for name in names for word in name.split("_") if re.fullmatch(r"[A-D]\d+", word)
    }
    assert numbers == {number for number, _, _ in rows()}
