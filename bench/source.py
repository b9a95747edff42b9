"""`python -m bench.source -s SESSIONS -m MESSAGES -l BYTES [-d] -f FROM -t TO HOST:PORT`: what of
smtp-source we need.

For machines without Postfix' tools. It takes several times their CPU, so compare only runs that
have the same source.
"""

import argparse
import asyncio
import sys

from bench.load import text_of


class Sending:
    """What all sessions share: how many messages nobody has taken yet."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.left = int(given.messages)
        self.host, _, port = str(given.where).rpartition(":")
        self.port, self.keep = int(port), bool(given.keep)
        self.envelope = (f"MAIL FROM:<{given.sender}>", f"RCPT TO:<{given.recipient}>", "DATA")
        self.content = text_of(given.size) + b"\r\n.\r\n"

    async def session(self) -> None:
        """Send messages until none is left, on one connection or on a new one each time."""
        while self.left > 0:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            await _heard(reader, b"2")
            await _say(reader, writer, b"EHLO client.example.com\r\n", b"2")
            while self.left > 0:
                self.left -= 1
                for command in self.envelope:
                    await _say(
                        reader,
                        writer,
                        f"{command}\r\n".encode(),
                        b"3" if command == "DATA" else b"2",
                    )
                await _say(reader, writer, self.content, b"2")
                if not self.keep:
                    break
            await _say(reader, writer, b"QUIT\r\n", b"2")
            writer.close()


async def _say(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes, code: bytes
) -> None:
    writer.write(data)
    await writer.drain()
    await _heard(reader, code)


async def _heard(reader: asyncio.StreamReader, code: bytes) -> None:
    while (line := await reader.readline())[3:4] == b"-":
        pass
    if not line.startswith(code):
        raise RuntimeError(f"expected {code!r}, heard {line!r}")


async def _send(given: argparse.Namespace) -> None:
    sending = Sending(given)
    await asyncio.gather(*(sending.session() for _ in range(given.sessions)))


def main() -> int:
    import uvloop

    parser = argparse.ArgumentParser()
    parser.add_argument("-s", dest="sessions", type=int, default=1)
    parser.add_argument("-m", dest="messages", type=int, default=1)
    parser.add_argument("-l", dest="size", type=int, default=1000)
    parser.add_argument("-d", dest="keep", action="store_true")
    parser.add_argument("-f", dest="sender")
    parser.add_argument("-t", dest="recipient")
    parser.add_argument("where")
    uvloop.run(_send(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
