"""Reads the files of the spool as a test expects them."""

from pathlib import Path

from relay.spool.trailer import read_trailer


def body_in(path: Path) -> bytes:
    """The body in a file that the relay wrote, without its trailer."""
    with path.open("rb") as file:
        trailer = read_trailer(file.fileno())
        assert trailer is not None, f"{path} has no trailer"
        return file.read(trailer.size)
