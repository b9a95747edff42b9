"""Lets a user who has logged in write from addresses of one domain only:
RELAY_PLUGINS=examples/plugins/own_address.py example.com"""

from qmqp_relay import Deny, hookimpl


@hookimpl
def register(args):
    global domain
    domain = args.word(0)


@hookimpl
async def mail(transaction, sender):
    if transaction.session.user and sender.domain.lower() != domain:
        return Deny(f"Write from an address of {domain}", code=553)
