"""The front end: from a socket to a stored message.

Bytes go up through `session` (SMTP as a state machine) and `content` (the decoder of what follows
DATA), which do no I/O and know no clock; `events` is what a session tells. `server` owns the
sockets and every limit in time, `receiver` turns a transaction into a body file, a row and only
then a 250. It does so by the `store`, which gives `orders` to the `keeper`, a process of its own
that syncs and commits. `policy` says who may send what to whom, `addresses` what an address is.
"""
