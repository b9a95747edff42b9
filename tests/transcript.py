"""Transcripts of SMTP sessions: text files of what client and server say, for people to read and
add to.

A file in tests/transcripts/ has dialogues, each with a title. A line begins with one of these:

    == title    a dialogue begins; (trusted) at its end: the client may relay; (early): the client
                does not wait for the banner; (whole): not for packets that are cut;
                (starttls): the server has a certificate
    # text      a comment on the dialogue, below its title
    C: text     the client sends this line and CR LF; lines that follow one another are one packet
    C| text     the same without CR LF
    S: text     the next line of the server
    S: *        the server has closed the session
    M: text     the next line of the message that was received, LF at its end
    R: text     the reply to the message, if it is not `250 2.0.0 Ok: queued as ID`

In a (plaintext) dialogue the client may log in without TLS: as any user, with the password `right`.

In lines of the client and of the message `\\r \\n \\t \\\\ \\xNN` are these bytes, and `{x*500}` is
500 times x. The session has a real policy: only the client of a trusted dialogue may relay, the
others may send to example.org. `python -m tests.transcript FILE...` plays the lines of the client
and writes what the server says into the file: write a dialogue with an empty line after each
packet, run this, and read the result.
"""

import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from reception.authentication import INVALID
from reception.events import CredentialsReceived, DataComplete, DataReceived, Event
from reception.login import Credentials, Login
from reception.policy import Policy
from relay.settings import SmtpdSettings, load
from relay.users import Role, User
from smtpd.session import Greeting, SessionState, SmtpSession

DIRECTORY = Path(__file__).parent / "transcripts"
MAX_SIZE = 1000
TRUSTED, UNTRUSTED = "127.0.0.1", "192.0.2.1"
_QUEUED = "250 2.0.0 Ok: queued as ID"
_CLOSED = "S: *"
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|([rnt\\]))")
_REPEAT = re.compile(rb"\{(.+?)\*([0-9]+)\}")
_PLAIN = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"\\": b"\\"}


@dataclass
class Transcript:
    """One dialogue of a file: its lines without those of other dialogues."""

    title: str
    lines: list[str] = field(default_factory=list)

    @property
    def options(self) -> set[str]:
        """The words in the parentheses of the title."""
        return set(re.findall(r"\((\w+)\)", self.title))


def read(path: Path) -> list[Transcript]:
    """The dialogues of a file."""
    found: list[Transcript] = []
    for line in path.read_text().splitlines():
        if line.startswith("== "):
            found.append(Transcript(line[3:]))
        elif found:
            found[-1].lines.append(line)
    return found


def octets(text: str) -> bytes:
    """The bytes that a line of the client stands for."""
    data = _REPEAT.sub(lambda match: match[1] * int(match[2]), text.encode("utf-8"))
    return _ESCAPE.sub(
        lambda match: bytes.fromhex(match[1].decode()) if match[1] else _PLAIN[match[2]], data
    )


def written(data: bytes) -> str:
    """Bytes as `octets` reads them, on one line."""
    text = data.decode("latin-1").replace("\\", "\\\\").replace("\r", "\\r").replace("\t", "\\t")
    text = "".join(c if c.isprintable() and c.isascii() else f"\\x{ord(c):02x}" for c in text)
    return text[:-1] + "\\x20" if text.endswith(" ") else text


class Play:
    """Plays the client of a dialogue against a session; `said` has the lines of both.

    `cut`: every octet is a packet of its own. `seen` collects command and state of each line that
    is the first of its packet."""

    def __init__(self, directory: Path, dialogue: Transcript, *, cut: bool = False) -> None:
        peer = TRUSTED if "trusted" in dialogue.options else UNTRUSTED
        settings = load(
            SmtpdSettings,
            spool_dir=directory,
            hostname="relay.example",
            client_networks=(TRUSTED,),
            recipient_domains=("example.org",),
            auth_plaintext_networks=(peer,) if "plaintext" in dialogue.options else (),
        )
        greeting = Greeting("relay.example", MAX_SIZE, "starttls" in dialogue.options)
        self.session = SmtpSession(greeting, Policy(settings).client(peer))
        self.said: list[str] = []
        self.seen: set[tuple[str, SessionState]] = set()
        self._dialogue = dialogue
        self._cut = cut
        self._reply = _QUEUED
        self._message = b""

    def run(self) -> list[str]:
        """Plays the client; all lines that were said."""
        if "early" not in self._dialogue.options:
            self.session.start()
            self._answer()
        for packet in _packets(self._dialogue.lines):
            self._send(packet)
            self._answer()
        return self.said

    def _send(self, packet: list[str]) -> None:
        data = b""
        for line in packet:
            if line.startswith("R: "):
                self._reply = line[3:]
            self.said.append(line)
            if line.startswith("C"):
                data += octets(line[3:]) + (b"\r\n" if line[1] == ":" else b"")
        word = data.split(None, 1)[0].decode("latin-1").upper() if data.split() else ""
        self.seen.add((word, self.session.state))
        for piece in [data[n : n + 1] for n in range(len(data))] if self._cut else [data]:
            self._receive(piece)

    def _receive(self, piece: bytes) -> None:
        self._handle(self.session.receive(piece))
        while self.session.pause is not None:
            self._handle(self.session.resume())

    def _handle(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case DataReceived(text):
                    self._message += text
                case DataComplete():
                    self._take()
                case CredentialsReceived(credentials):
                    self._handle(self._verdict(credentials))

    def _verdict(self, credentials: Credentials) -> list[Event]:
        if credentials.password != "right":
            return self.session.authentication_failed(INVALID)
        name, since = credentials.name, datetime.now(UTC)
        user = User(name, Role.SENDER, ("*@example.com",), None, since, None, None)
        return self.session.authenticated(Login(user))

    def _take(self) -> None:
        """Shows a message and replies to it."""
        self._answer()
        self.said += [f"M: {written(line)}".rstrip() for line in self._message.split(b"\n")[:-1]]
        self._message = b""
        reply, self._reply = self._reply, _QUEUED
        self._handle(self.session.reply(reply))

    def _answer(self) -> None:
        replies = self.session.replies().decode("ascii")
        self.said += [f"S: {line}".rstrip() for line in replies.split("\r\n")[:-1]]
        if self.session.closed and _CLOSED not in self.said:
            self.said.append(_CLOSED)


def _packets(lines: Iterable[str]) -> Iterator[list[str]]:
    """The lines of the client that follow one another."""
    packet: list[str] = []
    for line in [*lines, ""]:
        if line[:2] in ("C:", "C|", "R:"):
            packet.append(line)
        elif packet:
            yield packet
            packet = []


def filled(path: Path, directory: Path) -> str:
    """The text of a file with what the server says now; comments and the client's lines stay."""
    text = path.read_text()
    lines = [text[: text.index("== ")].rstrip(), ""] if not text.startswith("== ") else []
    for dialogue in read(path):
        lines.append(f"== {dialogue.title}")
        lines += [line for line in dialogue.lines if line.startswith("# ")]
        lines += [*Play(directory, dialogue).run(), ""]
    return "\n".join(lines).rstrip() + "\n"


def main(names: list[str]) -> None:
    """Fills files in."""
    with tempfile.TemporaryDirectory() as directory:
        for path in map(Path, names):
            path.write_text(filled(path, Path(directory)))


if __name__ == "__main__":
    main(sys.argv[1:])
