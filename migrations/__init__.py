"""Alembic migrations, shipped with the program and run by `qmqp-relay migrate`."""
