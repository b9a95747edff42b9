"""The mechanisms of AUTH: exchanges as RFC 4954 and RFC 4616 describe them, and other bytes."""

from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reception.envelope import Refused
from reception.login import Credentials
from smtpd.sasl import MECHANISMS, Exchange


def encoded(*parts: str) -> bytes:
    return b64encode("\0".join(parts).encode())


def exchanged(mechanism: bytes, initial: bytes | None, *responses: bytes) -> Credentials | str:
    """The credentials at the end, or the last challenge or refusal."""
    try:
        exchange = Exchange(mechanism)
        step = exchange.start(initial)
        for response in responses:
            assert isinstance(step, str), "an exchange ends once"
            step = exchange.respond(response)
    except Refused as refused:
        return str(refused)
    return step


ANN = ("ann", "correct horse")


@pytest.mark.parametrize(
    ("mechanism", "initial", "responses"),
    [
        (b"PLAIN", encoded("", *ANN), []),
        (b"plain", encoded("ann", *ANN), []),
        (b"PLAIN", None, [encoded("", *ANN)]),
        (b"LOGIN", None, [encoded(ANN[0]), encoded(ANN[1])]),
        (b"login", encoded(ANN[0]), [encoded(ANN[1])]),
    ],
)
def test_credentials_come_out_as_they_went_in(
    mechanism: bytes, initial: bytes | None, responses: list[bytes]
):
    assert exchanged(mechanism, initial, *responses) == Credentials(
        mechanism.decode().upper(), "ann", "correct horse"
    )


def test_challenges():
    assert exchanged(b"PLAIN", None) == "334 "
    assert exchanged(b"LOGIN", None) == "334 VXNlcm5hbWU6"
    assert exchanged(b"LOGIN", None, encoded("ann")) == "334 UGFzc3dvcmQ6"
    assert exchanged(b"LOGIN", encoded("ann")) == "334 UGFzc3dvcmQ6"


@pytest.mark.parametrize(
    ("mechanism", "initial", "responses", "refusal"),
    [
        (b"CRAM-MD5", None, [], "504 5.5.4"),
        (b"SCRAM-SHA-256", b"=", [], "504 5.5.4"),
        (b"PLAIN", None, [b"*"], "501 5.7.0"),
        (b"LOGIN", None, [encoded("ann"), b"*"], "501 5.7.0"),
        (b"PLAIN", b"=", [], "501 5.5.2"),
        (b"PLAIN", None, [b""], "501 5.5.2"),
        (b"PLAIN", None, [b"="], "501 5.5.2"),
        (b"PLAIN", b"AGFubgBwdw", [], "501 5.5.2"),  # without its padding
        (b"PLAIN", b"AGFub gBwdw==", [], "501 5.5.2"),
        (b"PLAIN", b"\xff", [], "501 5.5.2"),
        (b"PLAIN", b64encode(b"\0ann\0\xff"), [], "501 5.5.2"),
        (b"PLAIN", encoded("ann", "correct horse"), [], "501 5.5.2"),
        (b"PLAIN", encoded("", "ann", "correct", "horse"), [], "501 5.5.2"),
        (b"PLAIN", encoded("", "", "correct horse"), [], "501 5.5.2"),
        (b"PLAIN", encoded("", "ann", ""), [], "501 5.5.2"),
        (b"PLAIN", encoded("root", *ANN), [], "535 5.7.8"),
        (b"LOGIN", b"=", [encoded("correct horse")], "501 5.5.2"),
        (b"LOGIN", None, [encoded("ann"), b""], "501 5.5.2"),
        (b"LOGIN", None, [encoded("ann", "x"), encoded("correct horse")], "501 5.5.2"),
    ],
)
def test_what_is_refused(
    mechanism: bytes, initial: bytes | None, responses: list[bytes], refusal: str
):
    assert str(exchanged(mechanism, initial, *responses)).startswith(refusal)


def test_a_password_is_not_in_the_text_of_credentials():
    assert "horse" not in repr(Credentials("PLAIN", "ann", "correct horse"))


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(NAMES, NAMES, st.booleans())
def test_every_name_and_password_arrives(name: str, password: str, at_once: bool):
    response = encoded("", name, password)
    plain = exchanged(b"PLAIN", response) if at_once else exchanged(b"PLAIN", None, response)
    assert plain == Credentials("PLAIN", name, password)
    login = exchanged(b"LOGIN", None, encoded(name), encoded(password))
    assert login == Credentials("LOGIN", name, password)


def exchanged_until_the_end(
    mechanism: bytes, initial: bytes | None, *responses: bytes
) -> Credentials | str:
    """As `exchanged`, with as many of the responses as it takes."""
    ends = (exchanged(mechanism, initial, *responses[:n]) for n in range(len(responses) + 1))
    return next(end for end in ends if isinstance(end, Credentials) or not end.startswith("334"))


@given(
    st.sampled_from(sorted(MECHANISMS)),
    st.none() | st.binary(),
    st.lists(st.binary() | st.binary().map(b64encode), min_size=2, max_size=2),
)
def test_an_exchange_ends_after_two_responses_whatever_they_are(
    mechanism: bytes, initial: bytes | None, responses: list[bytes]
):
    end = exchanged_until_the_end(mechanism, initial, *responses)
    if isinstance(end, Credentials):
        assert end.name
        assert end.password
    else:
        assert end[:3] in ("501", "535")
