"""The door for QMQP, for hosts that speak only QMQP: their protocol has no queue.

`session` is a request as a state machine without I/O, with `addresses`; `server` is the connection
that drives it. Its process is smtpd, its server and its limits are those of reception/, and
`qmqp/reader.py` reads the bytes.
"""
