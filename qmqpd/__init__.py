"""The door for QMQP: it gives hosts that speak only QMQP the queue that their protocol lacks.

`session` is a request as a state machine without I/O, with `addresses`; `server` is the connection
that drives it. Its process is smtpd, its server and its limits are those of reception/, and
`qmqp/reader.py` reads the bytes.
"""
