"""The SMTP front end.

`server` owns the sockets and every limit of time. `session` is SMTP as a state machine, with
`addresses` (paths and parameters) and `content` (what follows DATA); these do no I/O and have no
clock. `reception` stores what a session has received.
"""
