"""Ids: UUIDv7 as in RFC 9562, unique, and in the order of time."""

import re
import time
import uuid

from hypothesis import given
from hypothesis import strategies as st

from relay.ids import dashed, lock_key, new_id


def test_id_is_a_uuid_of_version_7() -> None:
    before = time.time_ns() // 1_000_000
    made = new_id()
    after = time.time_ns() // 1_000_000
    assert re.fullmatch(r"[0-9a-f]{32}", made)
    read = uuid.UUID(made)
    assert (read.version, read.variant) == (7, uuid.RFC_4122)
    assert before <= int(made[:12], 16) <= after


def test_ids_differ_and_sort_by_time() -> None:
    made = [new_id() for _ in range(20_000)]
    assert len(set(made)) == len(made)
    stamps = [int(queue_id[:12], 16) for queue_id in made]
    assert stamps == sorted(stamps)
    assert [i[:12] for i in sorted(made)] == [i[:12] for i in made]


def test_every_random_bit_is_used() -> None:
    ones, zeros = 0, 0
    for _ in range(500):
        value = int(new_id(), 16)
        ones |= value
        zeros |= ~value
    chance = (1 << 80) - 1 & ~(0xF << 76) & ~(0b11 << 62)
    assert ones & chance == chance == zeros & chance


@given(st.integers(0, (1 << 128) - 1))
def test_a_lock_key_is_a_bigint_with_the_random_end_of_the_id(value: int) -> None:
    key = lock_key(f"{value:032x}")
    assert -(1 << 63) <= key < 1 << 63
    assert key % (1 << 64) == value % (1 << 64)


def test_dashed_has_the_form_of_the_database() -> None:
    made = new_id()
    assert dashed(made) == str(uuid.UUID(made))
