"""The public face of qmqp-relay: what a plugin imports.

A plugin is a file or a module whose functions carry `@hookimpl`. Their names are those of the hooks
in `qmqp_relay.hooks`; each takes any subset of its hook's arguments, by name. A hook returns None
(DECLINED: the next plugin is asked), `OK`, `Deny` or `DenySoft`.

    from qmqp_relay import Deny, hookimpl

    @hookimpl
    def rcpt(transaction, recipient):
        if recipient.local == "spam":
            return Deny("No such user", enhanced="5.1.1")

This package is stable: a name that stands in `__all__` keeps its meaning. Nothing else of the
program is promised to plugins. `qmqp_relay.testing` runs a session of a plugin in a test.
"""

from qmqp_relay.answers import DECLINED, OK, Answer, Deny, DenySoft
from qmqp_relay.content import MessageContent
from qmqp_relay.events import Event
from qmqp_relay.hooks import hookimpl
from qmqp_relay.registration import PluginArgumentError, PluginArguments, PluginLog, Relay
from qmqp_relay.session import Address, RewritableAddress, Session, Transaction

__all__ = [
    "DECLINED",
    "OK",
    "Address",
    "Answer",
    "Deny",
    "DenySoft",
    "Event",
    "MessageContent",
    "PluginArgumentError",
    "PluginArguments",
    "PluginLog",
    "Relay",
    "RewritableAddress",
    "Session",
    "Transaction",
    "hookimpl",
]
