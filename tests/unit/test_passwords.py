"""Hashes of passwords: their cost, what is the same password, and what may not be one."""

import re

import pytest
from argon2 import extract_parameters
from hypothesis import given
from hypothesis import strategies as st

from relay.passwords import LONGEST, SHORTEST, UNKNOWN, hash_new, prepare, verify


def test_a_hash_has_the_least_cost_that_owasp_names():
    hash_ = hash_new("correct horse")
    assert re.fullmatch(r"\$argon2id\$v=19\$m=19456,t=2,p=1\$[^$]{22}\$[^$]{43}", hash_)
    assert "horse" not in hash_
    assert hash_new("correct horse") != hash_, "each has a salt of its own"


def test_a_password_fits_its_hash_alone():
    hash_ = hash_new("correct horse")
    assert verify(hash_, "correct horse")
    for wrong in ("correct horsf", "", "Correct horse", "correct horse ", "\0", "x" * 10_000):
        assert not verify(hash_, wrong)


def test_the_hash_of_an_unknown_user_costs_the_same_and_fits_nothing():
    assert extract_parameters(UNKNOWN) == extract_parameters(hash_new("correct horse"))
    assert not verify(UNKNOWN, "correct horse")


def test_two_ways_to_type_a_letter_are_one_password():
    assert verify(hash_new("cafe\u0301 cre\u0300me"), "caf\u00e9\u00a0cr\u00e8me")
    assert not verify(hash_new("caf\u00e9 cr\u00e8me"), "cafe creme")


@pytest.mark.parametrize(
    ("password", "complaint"),
    [
        ("", "empty"),
        ("x" * (SHORTEST - 1), "at least 8 characters"),
        ("x" * (LONGEST + 1), "longer than 512 octets"),
        ("correct\nhorse", "control character"),
        ("correct\0horse", "control character"),
        ("correct\ud800horse", "control character"),
    ],
)
def test_what_may_not_be_a_password_is_said_without_it(password: str, complaint: str):
    with pytest.raises(ValueError, match=complaint) as refused:
        hash_new(password)
    assert not password or password not in str(refused.value)


@given(st.text(max_size=20))
def test_a_prepared_password_stays_as_it_is(password: str):
    try:
        prepared = prepare(password)
    except ValueError:
        return
    assert prepare(prepared) == prepared
