"""The plugins that come with the relay: RELAY_PLUGINS names them without a path.

Each is one short file, and uses the public package `qmqp_relay`. `qmqp_forward` uses the QMQP
client of the relay too. What else people want is a file of about ten lines: see docs/plugins.md
and examples/plugins.
"""
