"""RLIMIT_NOFILE: raised to what the settings need, and shared out."""

import resource
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from smtpd.descriptors import MIN_BODIES, RESERVE, reserve_descriptors


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def soft(limit: int) -> None:
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )


def test_the_limit_is_raised_to_the_needed_value() -> None:
    soft(256)
    assert reserve_descriptors(100 + RESERVE) == (100 + RESERVE, 100 + RESERVE)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 2 * (100 + RESERVE) + RESERVE


def test_a_higher_limit_stays() -> None:
    soft(1000)
    assert reserve_descriptors(100) == (1000 - RESERVE - 100, 100)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1000


def test_a_limit_that_cannot_be_raised_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (256, 500))
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _which, limits: raised.append(limits))
    with capture_logs() as logged:
        assert reserve_descriptors(1000) == (500 - RESERVE - MIN_BODIES, MIN_BODIES)
    assert raised == [(500, 500)]
    [line] = logged
    assert line["event"] == "RLIMIT_NOFILE too low for RELAY_MAX_CONNECTIONS"
    assert (line["limit"], line["needed"], line["max_connections"]) == (500, 2064, 1000)
    monkeypatch.undo()
