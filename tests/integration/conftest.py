"""A queue on the database of the module (`clean_url`), and one Postfix for all tests: starting one
takes longer than most of these tests."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from relay.db.engine import connect
from tests.integration.harness import QueueHarness, opened
from tests.postfix import Postfix
from tests.services import ServiceError


@pytest.fixture(scope="session")
def postfix() -> Iterator[Postfix]:
    """Real qmqpds: one that accepts mail, one that authorizes no client, one that never says D."""
    try:
        server = Postfix()
        server.start()
    except ServiceError as error:
        pytest.skip(str(error))
    yield server
    server.stop()


@pytest.fixture
def engine(clean_url: str) -> Iterator[Engine]:
    engine = connect(clean_url)
    yield engine
    engine.dispose()


@pytest.fixture
def queue(clean_url: str) -> Iterator[QueueHarness]:
    with opened(clean_url) as queue:
        yield queue


@pytest.fixture
def postgres_queue(clean_postgres_url: str) -> Iterator[QueueHarness]:
    with opened(clean_postgres_url) as queue:
        yield queue
