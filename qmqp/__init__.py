"""The Quick Mail Queueing Protocol: codec, client and server, and nothing of the relay.

QMQP hands one message with its whole envelope to a mail server over one connection and gets one reply:

    request  = netstring( netstring(message) netstring(sender) 1*netstring(recipient) )
    reply    = netstring( ("K" / "Z" / "D") *OCTET )
    netstring(s) = decimal-length(s) ":" s ","

K means accepted for every recipient, Z try again later, D refused for ever. Until the last byte of the
request has left, the server must throw everything away; afterwards only its reply can tell what became of the
message. That byte is the *commit point*, and most of what this package does is about being exact on which
side of it a failure fell.

    netstring   the codec: exact lengths, strict and bounded decoding
    request     a request as bytes of known length, and the parsers of both directions; no I/O
    client      sends one request and tells exactly what happened
    sink        a strict server that answers, or misbehaves, by rule

The protocol: https://cr.yp.to/proto/qmqp.html, https://cr.yp.to/proto/netstrings.txt. Port 628/tcp.
"""

PORT = 628
