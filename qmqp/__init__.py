"""The Quick Mail Queueing Protocol: codec, client and server. It knows nothing of the relay.

A QMQP client gives one message with its envelope to a mail server over one connection and gets one
reply. Every unit is a netstring: a length in decimal digits, a colon, that many bytes, a comma.

    request      = netstring( message sender 1*recipient )   each of them a netstring too
    reply        = netstring( ("K" / "Z" / "D") *OCTET )

    -> 42:5:test\\n,13:a@example.com,13:b@example.com,,
    <- 18:KReceived 5 bytes.,

The session. The client connects to TCP port 628 or to a Unix socket, sends the request and reads
the reply; the server closes [Q]. A connection carries one request: Postfix ignores a second one
[seen]. There is no greeting, no negotiation, no authentication and no TLS: every client that can
connect may relay anywhere [qmail-qmqpd(8)].

The request. The outer length is the exact sum of all that is inside, so the size of the message
must be known before its first byte is sent [Q]. If it is wrong, qmail-qmqpd closes without a reply;
Postfix ignores it [seen]. Lines of the message end with LF, not CR LF [Q]. A CR is an ordinary
byte, and Postfix changes it to a space, so that the empty line after the header is no longer empty
[seen]. Bytes are not changed, 8-bit and NUL included [T 5]. Addresses are octets without brackets
or quoting [T 8]; an empty sender is the null sender, `0:,`. There is at least one recipient [Q].

The reply holds for all recipients [Q]. K: the server answers for every one of them. Z: not now; the
same request may be sent again. D: never; no recipient got it. The text that follows is for people,
of any length and any bytes (qmqp/reply.py).

The commit point is the last byte of the request, its closing comma. Before it, the client may
close, and the server must throw the message away. After it, only the reply tells the outcome;
without one the client tries again later, and the message may arrive twice [Q]. Most of this package
makes sure on which side of that byte a failure fell (qmqp/client.py). A server must not reply
before the commit point, but it may close at any time, and "high-quality servers will try to send a
response first" [Q]: so a client must read and honour an early Z or D.

What a client must not do.

    guess a length, or send another size than announced    it is read as another message [Q]
    send no recipient                                      Postfix says D [seen]; qmail-qmqpd accepts it
    send a NUL, CR or LF in an address                     Postfix delivers to what stands before the NUL [seen]
    send an address of more than 999 bytes                 qmail-qmqpd says D about the whole message
    write without reading                                  Postfix says D early and closes: the write breaks [seen]
    take a missing, broken or unknown reply for a verdict  it is a temporary failure [Q]
    take the first K, Z or D of any bytes for a reply      a banner of SSH has one
    try another server after the commit point              the first may have taken it; before, it must not [Q]
    send the first length or last comma on its own         Postfix' qmqp-sink misreads it [seen]
    stay for more than an hour                             both sides close then [Q]

What servers do.

                    qmail-qmqpd              Postfix qmqpd                    mailfront      qmqp-sink
    outer length    exact                    ignored [seen]                   ignored        counts bytes only
    bad request     closes, no reply         D after 1 s, early               Z              closes, no reply
    not allowed     no connection            D after 1 s, before the request  by plugin      -
    too large       2,000,000,009 bytes      D, early (message_size_limit)    by plugin      no limit
    address         999 bytes, else D        2048 bytes, else D               by plugin      unread
    no recipient    K                        D                                by plugin      K
    empty message   K                        K                                Z              K
    silence         closes after an hour     closes after 300 s               after an hour  waits

Sources. [Q] https://cr.yp.to/proto/qmqp.html; netstrings: https://cr.yp.to/proto/netstrings.txt;
[T n] section n of QMTP, by the same author with the same definitions:
https://cr.yp.to/proto/qmtp.txt. Servers, by their source: qmail-qmqpd.c (notqmail), qmqpd(8) and
qmqp-sink(1) of Postfix, protocol-qmqp.c of mailfront. [seen]: observed with Postfix 3.7.11; the
tests ask a Postfix too.

    netstring    the codec: exact lengths, strict and bounded decoding
    request      a request as bytes of known length; no I/O
    reader       a strict reader of requests; no I/O
    reply        a reader of replies; no I/O
    client       sends one request; `body` reads its message, `connection` connects in time
    probe        finds out the family of a server without giving it a message
    sink         a strict server that replies, or misbehaves, by rule
"""

PORT = 628  # TCP, as IANA assigns it
LONGEST_SESSION = 3600.0  # seconds after which both sides close
