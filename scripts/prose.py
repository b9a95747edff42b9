"""Checks the English of the pages with proselint: `python scripts/prose.py [FILE ...]`. Without
arguments it checks all pages.

proselint reads plain text, so the script first masks all that is not prose: code, targets of links
and HTML comments. The mask keeps lines and columns, so that a finding names the right position. The
exit status is 1 when there is a finding, and 2 when a file cannot be read.
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
    "typography.symbols.curly_quotes",  # pages are ASCII, so that they can be typed and grepped
    "typography.symbols.ellipsis",  # the same
    "typography.symbols.multiplication",  # the same
    "typography.diacritical_marks",  # the command `resume` and the verb are not a résumé
}

# Code between fences; a line that is indented as code; code in a line; the target of a link; an
# HTML comment.
NOT_PROSE = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)|^ {4}.*?$|(?P<ticks>`+).+?(?P=ticks)(?!`)"
    r"|(?<=\])\([^)\s]*\)|<!--.*?-->",
    re.MULTILINE | re.DOTALL,
)


def masked(page: str) -> str:
    """The page with a `~` for each character that is not prose."""
    return NOT_PROSE.sub(lambda match: re.sub(r"\S", "~", match[0]), page)


def cuts_a_word(text: str, end: int) -> bool:
    """Whether a match ends within a word: proselint 0.16 finds `for ever` in "for everything"."""
    return text[end - 1 : end + 1].isalnum()


def main(names: list[str]) -> int:
    """Print a line for each finding; return the exit status."""
    checks = dict.fromkeys(OFF, False) | DEFAULT["checks"]  # the first match counts
    config = Config(max_errors=DEFAULT["max_errors"], checks=checks)
    CheckRegistry().register_many(__register__)
    root = Path(__file__).parents[1]
    count = 0
    pages = [path for pattern in PAGES for path in sorted(root.glob(pattern))]
    for path in map(Path, names) if names else pages:
        try:
            page = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
        prose = LintFile(path, masked(page))
        for finding in prose.lint(config):
            result = finding.check_result
            if not cuts_a_word(prose.content, result.span[1]):
                line, column = finding.pos
                text = " ".join(result.message.split())
                print(f"{path}:{line}:{column}: {result.check_path}: {text}")
                count += 1
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
