"""Check the English of the pages with proselint: `python scripts/prose.py [FILE ...]`, all pages
unless some are named.

proselint reads plain text, so everything in a page that is not prose is masked first: code, links'
targets and HTML comments. The mask keeps every line and column, so that a finding stands where the
page has it. The exit status is 1 when there is a finding, and 2 when a file cannot be read.
"""

import re
import sys
from pathlib import Path

from proselint.checks import __register__
from proselint.config import DEFAULT, Config
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

PAGES = ("*.md", "docs/*.md", "docs/decisions/*.md")

# The checks of proselint that are off here. Each has its reason; a new one needs a reason too.
OFF = {
    "typography.symbols.curly_quotes",  # pages are ASCII, so that what is copied from one can be typed and grepped
    "typography.symbols.ellipsis",  # the same
    "typography.symbols.multiplication",  # the same
    "typography.diacritical_marks",  # the command `resume` and the verb are not a résumé
}

# Code between fences; a line that is indented as code; code in a line; the target of a link; an
# HTML comment.
NOT_PROSE = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)|^ {4}.*?$|(?P<ticks>`+).+?(?P=ticks)(?!`)|(?<=\])\([^)\s]*\)|<!--.*?-->",
    re.MULTILINE | re.DOTALL,
)


def masked(page: str) -> str:
    """The page with a `~` for each character that is not prose."""
    return NOT_PROSE.sub(lambda found: re.sub(r"\S", "~", found[0]), page)


def cuts_a_word(text: str, end: int) -> bool:
    """Whether a match ends within a word: proselint 0.16 finds `for ever` in "for everything"."""
    return text[end - 1 : end + 1].isalnum()


def main(names: list[str]) -> int:
    """Print a line for each finding; the exit status."""
    checks = dict.fromkeys(OFF, False) | DEFAULT["checks"]  # the first that fits counts
    config = Config(max_errors=DEFAULT["max_errors"], checks=checks)
    CheckRegistry().register_many(__register__)
    root = Path(__file__).parents[1]
    count = 0
    for path in (
        map(Path, names)
        if names
        else (path for pattern in PAGES for path in sorted(root.glob(pattern)))
    ):
        try:
            page = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
        prose = LintFile(path, masked(page))
        for finding in prose.lint(config):
            found = finding.check_result
            if not cuts_a_word(prose.content, found.span[1]):
                line, column = finding.pos
                print(
                    f"{path}:{line}:{column}: {found.check_path}: {' '.join(found.message.split())}"
                )
                count += 1
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
