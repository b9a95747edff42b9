"""scripts/prose.py: its findings, their positions, and the parts of a page that it does not
read."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "prose.py"


def check(path: Path, page: str) -> tuple[int, list[str]]:
    """The exit status for a page, and a line for each finding, without the path."""
    path.write_text(page)
    found = subprocess.run(
        [sys.executable, SCRIPT, path], capture_output=True, text=True, check=False
    )
    assert not found.stderr
    return found.returncode, [line.removeprefix(f"{path}:") for line in found.stdout.splitlines()]


def test_finding_has_its_line_and_column(tmp_path: Path):
    status, findings = check(
        tmp_path / "page.md", "A relay.\n\nIt is is small. `code`, and the the end.\n"
    )
    assert status == 1
    assert [finding.split(" ")[:2] for finding in findings] == [
        ["3:4:", "lexical_illusions:"],
        ["3:29:", "lexical_illusions:"],
    ]


def test_code_is_not_read(tmp_path: Path):
    page = """\
A page with `the the` and ``the `the the` ``, a [link](the/the%20the), <!-- the the --> and

```sh
the the
```

    the the

| the | the |
"""
    assert check(tmp_path / "page.md", page) == (0, [])


def test_part_of_a_word_is_no_finding(tmp_path: Path):
    assert check(tmp_path / "page.md", "One answer for everything.\n") == (0, [])
    assert check(tmp_path / "page.md", "One answer for ever.\n")[0] == 1


def test_ascii_typography_is_no_finding(tmp_path: Path):
    assert check(tmp_path / "page.md", 'It says "yes" and 3 x 5 ... and one may resume it.\n') == (
        0,
        [],
    )


def test_page_that_is_missing_is_an_error(tmp_path: Path):
    missing = tmp_path / "page.md"
    found = subprocess.run(
        [sys.executable, SCRIPT, missing], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert str(missing) in found.stderr
