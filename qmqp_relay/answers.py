"""What a hook may answer, with the words of qpsmtpd.

None means DECLINED: the hook of the next plugin is asked. The first other answer counts. A class
itself is an answer too: `return OK` is `return OK()`.
"""

import re
from dataclasses import dataclass

LONGEST_TEXT = 400
"""Characters of a text in a reply, whose line may have 512 octets (RFC 5321, 4.5.3.1.5)."""
_ENHANCED = re.compile(r"([245])\.\d{1,3}\.\d{1,3}")

DECLINED: None = None
"""The hook has no opinion, and the next plugin is asked."""


def _one_line(text: str) -> str:
    """The text as a reply may carry it: printable ASCII, bounded."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:LONGEST_TEXT]).strip()


@dataclass(frozen=True, slots=True)
class OK:
    """Yes: no other plugin is asked. In `queue` it says that the plugin has taken the message, and
    that the relay must not: `text` is then the text of the 250."""

    text: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", _one_line(self.text))


@dataclass(frozen=True, slots=True)
class Deny:
    """No, for good: a reply 5xx. `disconnect`: the session ends with it (DENY_DISCONNECT)."""

    text: str = "Denied"
    code: int = 550
    enhanced: str = "5.7.1"
    disconnect: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def reply(self) -> str:
        """The reply: code, enhanced code and text."""
        return f"{self.code} {self.enhanced} {self.text}"


@dataclass(frozen=True, slots=True)
class DenySoft:
    """No, for now: a reply 4xx. `disconnect`: the session ends with it (DENYSOFT_DISCONNECT); so
    it does after a 421."""

    text: str = "Try again later"
    code: int = 451
    enhanced: str = "4.7.1"
    disconnect: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def reply(self) -> str:
        """The reply: code, enhanced code and text."""
        return f"{self.code} {self.enhanced} {self.text}"


type Answer = OK | Deny | DenySoft
"""The answer of a hook that is not None."""


def _check(answer: Deny | DenySoft) -> None:
    """Makes the text fit a reply. Raises ValueError for codes that a client would misread."""
    name, number = type(answer).__name__, 5 if isinstance(answer, Deny) else 4
    if answer.code // 100 != number:
        raise ValueError(f"{name}: the code {answer.code} is not between {number}00 and {number}99")
    match = _ENHANCED.fullmatch(answer.enhanced)
    if match is None or int(match[1]) != number:
        raise ValueError(
            f"{name}: the enhanced code {answer.enhanced!r} is not like {number}.7.1 (RFC 3463)"
        )
    object.__setattr__(answer, "text", _one_line(answer.text) or "Denied")
    if answer.code == 421:
        object.__setattr__(answer, "disconnect", True)


def as_answer(value: object) -> Answer | None:
    """What a hook has returned as an answer. Raises TypeError for anything else."""
    if value in (OK, Deny, DenySoft):
        value = value()
    if value is None or isinstance(value, OK | Deny | DenySoft):
        return value
    raise TypeError(
        f"a hook returned {value!r:.100}; it may return None, OK, Deny(...) or DenySoft(...)"
    )
