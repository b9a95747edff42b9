"""Passwords: how they are prepared, hashed and verified.

A hash is argon2id (RFC 9106) with the least memory that OWASP's Password Storage Cheat Sheet names:
19 MiB, two passes, one lane. A password is prepared by the profile OpaqueString (RFC 8265, 4.2)
before it is hashed or verified, so that two ways to type the same letter are the same password.

What must stay true: a password is in no error text; `UNKNOWN` costs a verification as much time as
the hash of a user does.
"""

import unicodedata
from base64 import b64encode

from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError

MEMORY, PASSES, LANES = 19456, 2, 1  # KiB, count, threads
SHORTEST, LONGEST = 8, 512
"""Characters of a new password, and octets of any. 8 is the least of NIST SP 800-63B."""

_HASHER = PasswordHasher(time_cost=PASSES, memory_cost=MEMORY, parallelism=LANES)


def _unpadded(length: int) -> str:
    return b64encode(bytes(length)).decode().rstrip("=")


UNKNOWN = f"$argon2id$v=19$m={MEMORY},t={PASSES},p={LANES}${_unpadded(16)}${_unpadded(32)}"
"""A hash that no password has, for users that do not exist."""


def prepare(password: str) -> str:
    """The password as it is hashed; raises ValueError if it cannot be one."""
    spaced = "".join(" " if unicodedata.category(char) == "Zs" else char for char in password)
    prepared = unicodedata.normalize("NFC", spaced)
    if not prepared:
        raise ValueError("the password is empty")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in prepared):
        raise ValueError("the password contains a control character")
    if len(prepared.encode()) > LONGEST:
        raise ValueError(f"the password is longer than {LONGEST} octets")
    return prepared


def hash_new(password: str) -> str:
    """The hash of a new password; raises ValueError if it may not be one."""
    prepared = prepare(password)
    if len(prepared) < SHORTEST:
        raise ValueError(f"the password is too short: write at least {SHORTEST} characters")
    return _HASHER.hash(prepared)


def verify(hash_: str, password: str) -> bool:
    """Whether a hash is that of a password. A password that cannot be one costs as much."""
    try:
        prepared = prepare(password)
    except ValueError:
        hash_, prepared = UNKNOWN, ""
    try:
        return _HASHER.verify(hash_, prepared)
    except VerifyMismatchError:
        return False
