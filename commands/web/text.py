"""Text of peers in HTML: an address is not cut where it would look like another one.

What must stay true: the text is escaped; the time is linear in its length.
"""

import re

from markupsafe import Markup, escape

from commands.output import plain


def unbroken(text: str) -> Markup:
    """Text in which no line ends at a hyphen or colon."""
    # A run matches only from its beginning and only as a whole, so the time is linear in the length
    # of what peers wrote.
    joined = re.sub(
        r"(?<![-:])[-:]++(&[#\w]+;|[^\s&:-])",
        r'<span class="joined">\g<0></span>',
        escape(plain(text)),
    )
    return Markup(joined)  # noqa: S704 - it was escaped


def address(text: str) -> Markup:
    """The same, with line breaks allowed before the @ and before dots."""
    return Markup(re.sub(r"[@.]", r"<wbr>\g<0>", unbroken(text)))  # noqa: S704 - it was escaped
