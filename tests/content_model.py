"""A slow and simple model of the decoder of content: it works line by line."""

import re


def model(wire: bytes, *, strip_cr: bool = False) -> tuple[bytes | None, bytes] | None:
    """Decodes line by line: the text (None: a bare CR or LF in it) and the rest; None if there is
    no end."""
    end = (b"\r\n" + wire).find(b"\r\n.\r\n")
    if end < 0:
        return None
    content, rest = wire[:end], wire[end + 3 :]
    lines = content.split(b"\r\n")[:-1]
    if re.search(rb"\n" if strip_cr else rb"[\r\n]", b"".join(lines)):
        return None, rest
    return b"".join(line.removeprefix(b".").replace(b"\r", b"") + b"\n" for line in lines), rest
