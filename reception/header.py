"""The header of a message that arrives: its Message-ID and the number of its trace fields.

The scanner takes the text of a message in blocks, cut anywhere, up to the end of the header. It
searches each block whole, never line by line, and keeps only the unfinished line.
"""

import re

MAX_RECEIVED = 100
"""Trace fields that a message may carry (RFC 5321, 6.3: at least 100)."""

_MESSAGE_ID = re.compile(rb"(?i)\nmessage-id:(?:\n?[ \t])*(<[!-;=?-~]{1,500}>)")
_MAX_TAIL = 1000


class HeaderScanner:
    """Scans one header. `message_id` includes the brackets and has at most 502 characters;
    `received` is the number of trace fields so far; `complete`: the header has ended."""

    __slots__ = ("_started", "_tail", "complete", "message_id", "received")

    def __init__(self) -> None:
        self.message_id: str | None = None
        self.received = 0
        self.complete = False
        self._started = False
        # The unfinished line, of at most _MAX_TAIL octets, and the LF before it. So the first field
        # is found as `LF name` too.
        self._tail = b"\n"

    def feed(self, text: bytes) -> None:
        """Takes the next text, with LF line ends."""
        window = self._tail + text
        if not self._started:
            if len(window) == 1:  # an empty text
                return
            self._started = True
            if window[1:2] in (b" ", b"\t"):
                # The receiver ends the header before a first line that begins with a blank.
                self.complete = True
                return
        end = window.find(b"\n\n")
        self.complete = end >= 0
        # The last line may still grow: it is searched when it is complete.
        cut = end if self.complete else window.rfind(b"\n")
        lines = window[:cut].lower()
        at = -1 if self.message_id else lines.find(b"\nmessage-id:")
        if at >= 0:
            match = _MESSAGE_ID.match(window, at, end if self.complete else len(window))
            if match is not None:
                self.message_id = match[1].decode("ascii")
            elif not self.complete and len(window) - at < _MAX_TAIL:
                cut = at
                lines = lines[:at]
        self.received += lines.count(b"\nreceived:")
        self._tail = window[cut : cut + _MAX_TAIL]
