"""Asks clients to come again after a delay:
RELAY_PLUGINS=examples/plugins/greylist.py delay=5m"""

import time

from qmqp_relay import DenySoft, hookimpl

first_seen = {}


@hookimpl
def register(args):
    global delay
    delay = args.seconds("delay", 300)


@hookimpl
async def rcpt(transaction, recipient):
    key = transaction.session.client_address, transaction.sender, recipient.address
    if time.monotonic() - first_seen.setdefault(key, time.monotonic()) < delay:
        return DenySoft("Greylisted, try again later", code=450)
