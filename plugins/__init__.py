"""Plugins: loads them, and runs their hooks in any process.

`loader` finds the plugins that RELAY_PLUGINS names and checks their hooks; `runner` asks them, with
time limits and metrics. What a plugin may import is the package `qmqp_relay`.
"""
