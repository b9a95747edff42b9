"""`python -m bench.source -s SESSIONS -m MESSAGES -l BYTES [-d] -f FROM -t TO HOST:PORT`: the part
of smtp-source that the benchmark needs, for machines without Postfix.

It uses several times the CPU of smtp-source, so only runs with the same source can be compared.
FROM and TO are ignored.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

from bench.load import connect, deliver, text_of


def send_all(port: int, messages: SimpleQueue[bytes], *, keep: bool) -> None:
    """Send messages until the queue is empty, on one connection or on a new one for each."""
    try:
        while True:
            text = messages.get_nowait()
            with connect(port) as client:
                deliver(client, text)
                while keep:
                    deliver(client, messages.get_nowait())
    except Empty:
        return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-s", dest="sessions", type=int, default=1)
    parser.add_argument("-m", dest="messages", type=int, default=1)
    parser.add_argument("-l", dest="size", type=int, default=1000)
    parser.add_argument("-d", dest="keep", action="store_true")
    parser.add_argument("-f")
    parser.add_argument("-t")
    parser.add_argument("address")
    options = parser.parse_args()
    port = int(options.address.rpartition(":")[2])
    messages: SimpleQueue[bytes] = SimpleQueue()
    text = text_of(options.size)
    for _ in range(options.messages):
        messages.put(text)
    with ThreadPoolExecutor(options.sessions) as pool:
        sessions = [
            pool.submit(send_all, port, messages, keep=options.keep)
            for _ in range(options.sessions)
        ]
    for session in sessions:
        session.result()


if __name__ == "__main__":
    main()
