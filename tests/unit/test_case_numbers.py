"""Every case of the protocol and of the queue that this project set out with has a test that bears
its number.

A: the codec, 1 to 18. B: the client, 1 to 44. D: the queue and its workers, 1 to 14.
"""

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent


def test_no_case_is_without_a_test():
    names = re.findall(
        r"def (test_\w+)", "".join(file.read_text() for file in TESTS.rglob("test_*.py"))
    )
    found = {number for name in names for number in re.findall(r"_([ABD][0-9]+)(?=_)", name)}
    wanted = {
        f"{kind}{n}" for kind, last in [("A", 18), ("B", 44), ("D", 14)] for n in range(1, last + 1)
    }
    assert wanted - found == set()
