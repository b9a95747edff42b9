"""Delivery: from a stored message to a recorded outcome.

A worker process is a Celery worker whose one task hands message ids to an engine, and the engine:
one event loop that drives every connection to the QMQP servers. The rows of the database say what
is to be done; the task only says that now would be a good moment. Knows `relay` and `qmqp`, and
nothing of the SMTP side.
"""
