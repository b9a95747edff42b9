"""The front end: from a socket to a stored message.

Bytes go up through `session` (SMTP as a state machine) and `content` (the decoder of what follows DATA), which do no
I/O and know no clock. `server` owns the sockets and every limit in time, `receiver` turns a transaction into a body
file, a row and only then a 250. `policy` says who may send what to whom, `addresses` what an address is.
"""
