"""Delivery: from a stored message to a recorded outcome.

A worker process is a Celery worker with one task, `deliver`, and an engine. The engine is one event
loop that drives all connections to QMQP servers. The rows of the database say what has to be done;
a task is only a hint that now is a good moment. This package knows `relay` and `qmqp`, and nothing
of the SMTP side.
"""
