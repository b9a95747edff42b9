"""The durable state of the relay, and what its two halves must agree on.

`smtpd` stores accepted mail here. `worker` sends it and records the outcome. Neither imports the
other: they share only the tables, the body files and the hints.
"""
