"""Which entries of a broker's list are hints, and their contents."""

import base64
import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest
from kombu.transport.virtual import Message

from relay.hint_entry import EARLY_COMMIT, EARLY_SEARCH, Hint, NoHint, entry_of, hinted

IDS = [f"{n:032x}" for n in range(3)]


def entry(change: Callable[[dict[str, Any]], object] = lambda _: None, *, ids: Any = IDS) -> bytes:
    """A hint for these ids, with a change to it."""
    made = json.loads(entry_of(Hint({"bulk": ids} if isinstance(ids, list) else ids), "fresh"))
    change(made)
    return json.dumps(made).encode()


def with_body(text: bytes) -> bytes:
    return entry(lambda made: made.update(body=base64.b64encode(text).decode()))


def test_only_ids_are_read_from_a_hint() -> None:
    said: dict[str, Any] = {
        "eta": "2099-01-01T00:00:00",
        "expires": "soon",
        "timelimit": 7,
        "callbacks": [{}],
    }
    assert hinted(entry(lambda made: made["headers"].update(said)), 3) == Hint({"bulk": IDS})
    again = json.loads(entry_of(Hint({"bulk": IDS}), "retry"))
    assert again["headers"]["eta"] is again["headers"]["expires"] is None
    assert again["properties"]["delivery_info"]["routing_key"] == "retry"


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(b"garbage", id="no JSON"),
        pytest.param(b"\xff\xfe\x00", id="no text"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"[" * 8000, id="deep"),
        *(
            pytest.param(text, id=text.decode())
            for text in (
                b"null",
                b"7",
                b'"x"',
                b"[]",
                b"{}",
                b'{"headers": [], "properties": {}}',
                b'{"headers": {"task": "deliver"}, "properties": 1}',
            )
        ),
        pytest.param(
            entry(lambda made: made["headers"].update(task="celery.backend_cleanup")),
            id="another task",
        ),
        pytest.param(
            entry(lambda made: made["headers"].update(compression="gzip")), id="compressed"
        ),
        pytest.param(
            entry(lambda made: made.update({"content-type": "application/x-python-serialize"})),
            id="pickle",
        ),
        pytest.param(
            entry(lambda made: made["properties"].update(body_encoding=None)), id="bare body"
        ),
        pytest.param(entry(lambda made: made.update(body="*")), id="no base64"),
        pytest.param(entry(lambda made: made.update(body=None)), id="no body"),
        pytest.param(with_body(b"{}"), id="no arguments"),
        pytest.param(with_body(b"[[], {}, {}]"), id="no ids"),
        pytest.param(with_body(b"[" * 5000), id="deep body"),
        pytest.param(entry(ids=[]), id="no id"),
        pytest.param(entry(ids="0" * 32), id="a text"),
        pytest.param(entry(ids=[*IDS, 7]), id="a number"),
        pytest.param(entry(ids=["0" * 31]), id="too short"),
        pytest.param(entry(ids=["A" * 32]), id="capitals"),
        pytest.param(entry(ids=["0" * 32 + "\n"]), id="a line"),
        pytest.param(entry(ids=IDS * 2), id="more than a batch"),
        pytest.param(with_body(json.dumps([[{"": IDS}], [], {}]).encode()), id="no options"),
        pytest.param(b" " * 20_000 + entry(), id="huge"),
    ],
)
def test_everything_else_is_refused(bad: bytes) -> None:
    with pytest.raises(NoHint):
        hinted(bad, 5)


def test_a_body_is_not_unpacked() -> None:
    bomb = base64.b64encode(gzip.compress(bytes(1_000_000))).decode()
    packed = entry(
        lambda made: (
            made.update(body=bomb),
            made["headers"].update(compression="application/x-gzip"),
        )
    )
    with pytest.raises(NoHint, match="compressed"):
        hinted(packed, 5)


def test_a_batch_of_any_size_is_no_huge_entry() -> None:
    assert len(hinted(entry(ids=IDS * 1000), 3000).ids["bulk"]) == 3000


def test_workers_search_for_longer_than_an_early_hint_may_be_early() -> None:
    assert EARLY_COMMIT < EARLY_SEARCH


@pytest.mark.parametrize("early", [True, False])
def test_a_hint_says_whether_it_is_early(early: bool) -> None:
    assert hinted(entry_of(Hint({"bulk": IDS}, early), "fresh"), 3) == Hint({"bulk": IDS}, early)


@pytest.mark.parametrize("options", [{"early": "yes"}, {"early": 1}, {"other": True}])
def test_other_options_of_a_hint_are_ignored(options: dict[str, Any]) -> None:
    body = json.dumps([[{"bulk": IDS}], options, {}]).encode()
    assert hinted(with_body(body), 3) == Hint({"bulk": IDS})


def test_a_plain_list_is_for_no_route_in_particular() -> None:
    assert hinted(with_body(json.dumps([[IDS], {}, {}]).encode()), 3) == Hint({"": IDS})


def test_ids_of_all_routes_together_are_at_most_a_batch() -> None:
    routes = entry(ids={"bulk": IDS, "default": IDS})
    assert hinted(routes, 6).ids == {"bulk": IDS, "default": IDS}
    with pytest.raises(NoHint):
        hinted(routes, 5)


def test_hints_are_what_kombu_reads() -> None:
    class Channel:
        no_ack_consumers: tuple[str, ...] = ()

        def decode_body(self, body: str, encoding: str) -> bytes:
            assert encoding == "base64"
            return base64.b64decode(body)

    message = Message(json.loads(entry_of(Hint({"bulk": IDS}), "fresh")), channel=Channel())
    message.accept = {"application/json"}
    assert message.decode() == [[{"bulk": IDS}], {}, {}]
