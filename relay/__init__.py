"""The durable state of the relay, and what its two halves must agree on.

`smtpd` writes what it accepted here, `worker` takes it from here and records what became of it.
Neither knows the other: the tables, the body files and the hints are all they share.
"""
