"""Sends newsletters on a route of their own, and holds large messages:
RELAY_PLUGINS=examples/plugins/bulk_route.py bulk"""

from qmqp_relay import hookimpl


@hookimpl
def register(args):
    global route
    route = args.word(0)


@hookimpl
def message(transaction):
    if "List-Unsubscribe" in transaction.header:
        transaction.route = route
    if transaction.content.size > 20_000_000:
        transaction.hold("larger than 20 MB")
