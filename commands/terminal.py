"""What a terminal shows beyond text: colours of states, bold headings, links from ids to the page.

Colours follow NO_COLOR and TERM, links follow TERM and RELAY_WEB_URL. What must stay true: a pipe
and a file get neither; only escape sequences of this module reach a terminal, because texts of
peers are escaped before (`commands.output.plain`).
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from relay.report.rows import Row

BOLD, RED, GREEN, YELLOW, MAGENTA, CYAN = 1, 31, 32, 33, 35, 36
# The colour of a word in a column of COLOURED: what goes well, what waits, what failed, what an
# operator must look at.
_WORDS = (
    dict.fromkeys(("delivered", "ok", "yes"), GREEN)
    | dict.fromkeys(("queued", "sending"), CYAN)
    | dict.fromkeys(("deferred", "warn", "unreachable", "interrupted", "split"), YELLOW)
    | dict.fromkeys(("bounced", "expired", "rejected", "fail", "away", "no"), RED)
    | dict.fromkeys(("held", "dropped", "uncertain", "malformed", "unsendable"), MAGENTA)
)
COLOURED = ("STATE", "OUTCOME", "", "REACHED", "ALLOWED")
ID = "ID"

type Decorator = Callable[[Row, Sequence[str]], str]


def takes_colours(stream: TextIO) -> bool:
    """Whether the stream is a terminal that shows colours, and the user wants them."""
    return _capable(stream) and not os.environ.get("NO_COLOR")


def takes_links(stream: TextIO) -> bool:
    """Whether the stream is a terminal that may show links. One that does not know them ignores
    them; the console of Linux would print a part of them."""
    return _capable(stream) and os.environ.get("TERM") != "linux"


def _capable(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def in_colour(text: str, *codes: int) -> str:
    """The text between escape sequences (ECMA-48, SGR)."""
    return f"\x1b[{';'.join(map(str, codes))}m{text}\x1b[0m"


def link(text: str, address: str) -> str:
    """The text as a link (OSC 8)."""
    return f"\x1b]8;;{address}\x1b\\{text}\x1b]8;;\x1b\\"


def decorator(names: Sequence[str], widths: Sequence[int]) -> Decorator | None:
    """How the cells of a row become a line with colours and links, for the columns of these names
    and widths; None: standard output shows neither."""
    page = _page() if ID in names and takes_links(sys.stdout) else ""
    colours = takes_colours(sys.stdout) and not set(COLOURED).isdisjoint(names)
    if not (page or colours):
        return None

    def cell(name: str, text: str, row: Row) -> str:
        if name == ID and page:
            return link(text, f"{page}/message/{row['queue_id']}")
        if colours and name in COLOURED and text in _WORDS:
            return in_colour(text, _WORDS[text])
        return text

    def line(row: Row, texts: Sequence[str]) -> str:
        return "".join(
            cell(name, text, row) + " " * (width - len(text))
            for name, text, width in zip(names, texts, widths, strict=True)
        )

    return line


def _page() -> str:
    """The address of the page, without a slash at its end; empty if it is not known."""
    from relay.settings import Settings, load

    return load(Settings).web_url.rstrip("/")
