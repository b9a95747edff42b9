"""Texts without their secrets, for logs and output."""

import re

_PASSWORD = re.compile(r"(?<=password=)[^&\s]+")
_VALUE = re.compile(r"([?&][^=&?]*=)[^&]*")


def redacted(text: str) -> str:
    """A URL, or a text with one, without the password and the values of the parameters.

    A password may contain characters that should have been escaped, so it reaches to the last `@`.
    Any parameter may be a secret of a driver (`sslpassword`), so no value is shown.
    """
    start, scheme, rest = text.partition("://")
    user, colon, secret = rest.partition(":")
    secret, at, host = secret.rpartition("@")
    if colon and at:
        # the `@` may belong to the value of a parameter
        if "=" in secret.partition("?")[2].rpartition("&")[2]:
            host = host.partition("&")[2]
        rest = f"{user}:***@{host}"
    return _PASSWORD.sub("***", start) + scheme + _PASSWORD.sub("***", _VALUE.sub(r"\1***", rest))
