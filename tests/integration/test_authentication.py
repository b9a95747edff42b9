"""Authentication on real databases: verdicts, what is remembered, and what an outage changes.

Costs are counted in verifications and not in time.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import Engine, text
from structlog.testing import capture_logs

from reception import authentication as module
from reception.authentication import FAILURES_PER_MINUTE, INVALID, Authenticator
from reception.login import Credentials, Login
from reception.policy import ClientPolicy, Policy
from relay import passwords
from relay.db.engine import connect, writing
from relay.settings import SmtpdSettings, load
from relay.users import Role, Users
from tests import waiting
from tests.services import Postgres

RIGHT = "correct horse"
HASH = passwords.hash_new(RIGHT)
OTHER_HASH = passwords.hash_new("battery staple")

type Scenario = Callable[["AuthenticatorHarness"], Awaitable[None]]


def measured(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"relay_{name}_total", labels) or 0.0


class AuthenticatorHarness:
    """An authenticator on a database with the users ann (a sender), vic (a viewer) and dis
    (disabled). All have the same password."""

    def __init__(self, url: str, policy: Policy, **options: Any) -> None:
        self.engine: Engine = connect(url)
        self.users = Users(self.engine)
        for name, role in (("ann", Role.SENDER), ("vic", Role.VIEWER), ("dis", Role.SENDER)):
            assert self.users.add(name, HASH, role=role, actor="test")
        self.users.disable("dis", actor="test")
        self.policy = policy
        options = {"failure_delay": 0.0, "refresh": 3600.0, "timeout": 60.0} | options
        self.authenticator = Authenticator(asyncio.get_running_loop(), url, **options)
        self._verifications = measured("password_verifications")

    async def close(self) -> None:
        await self.authenticator.close()
        self.engine.dispose()

    def client(self, peer: str) -> ClientPolicy:
        return self.policy.client(peer)

    def begin(
        self, name: str, password: str = RIGHT, peer: str = "192.0.2.1"
    ) -> asyncio.Future[Login | str]:
        answer = asyncio.get_running_loop().create_future()
        credentials = Credentials("PLAIN", name, password)
        self.authenticator.authenticate(credentials, self.client(peer), answer.set_result)
        return answer

    async def ask(self, name: str, password: str = RIGHT, peer: str = "192.0.2.1") -> Login | str:
        async with asyncio.timeout(60):
            return await self.begin(name, password, peer)

    async def log_in(self, name: str = "ann", password: str = RIGHT) -> Login:
        login = await self.ask(name, password)
        assert isinstance(login, Login), login
        return login

    def verifications(self) -> int:
        """How many there were since the last call."""
        before, self._verifications = self._verifications, measured("password_verifications")
        return int(self._verifications - before)

    @contextmanager
    def away(self) -> Iterator[None]:
        """The users cannot be read meanwhile."""
        with writing(self.engine) as connection:
            connection.execute(text("ALTER TABLE users RENAME TO users_away"))
        yield
        with writing(self.engine) as connection:
            connection.execute(text("ALTER TABLE users_away RENAME TO users"))


@pytest.fixture
def policy() -> Policy:
    return Policy(load(SmtpdSettings))


@pytest.fixture
def run(clean_url: str, policy: Policy) -> Callable[..., None]:
    def start(scenario: Scenario, **options: Any) -> None:
        run_on(clean_url, policy, scenario, **options)

    return start


def run_on(url: str, policy: Policy, scenario: Scenario, **options: Any) -> None:
    async def go() -> None:
        harness = AuthenticatorHarness(url, policy, **options)
        try:
            await scenario(harness)
        finally:
            await harness.close()

    asyncio.run(go())


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(waiting.until, condition, 60.0)


def test_only_a_sender_with_the_right_password_logs_in(run: Callable[..., None]) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        login = await harness.log_in()
        assert login.name == "ann"
        assert await harness.log_in("ANN") is login, "a name has no case"
        for name, password in (("ann", "wrong horse"), ("bob", RIGHT), ("dis", RIGHT)):
            assert await harness.ask(name, password) == INVALID
        assert await harness.ask("vic") == INVALID

    with capture_logs() as logs:
        run(scenario)
    failures = [
        (entry["user"], entry["reason"])
        for entry in logs
        if entry["event"] == "authentication failed"
    ]
    assert failures == [
        ("ann", "wrong password"),
        ("bob", "unknown user"),
        ("dis", "disabled user"),
        ("vic", "role viewer"),
    ]
    assert not any("horse" in str(entry) for entry in logs), "no password is logged"


def test_a_page_lets_in_whom_it_names(run: Callable[..., None]) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        assert (await harness.log_in("vic")).name == "vic"
        assert await harness.ask("ann") == INVALID

    run(scenario, roles=(Role.VIEWER, Role.OPERATOR))


def test_every_failure_costs_one_verification(run: Callable[..., None]) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        for name, password in (
            ("ann", "wrong horse"),
            ("bob", RIGHT),
            ("dis", RIGHT),
            ("vic", RIGHT),
            ("no name at all", RIGHT),
        ):
            assert await harness.ask(name, password) == INVALID
            assert harness.verifications() == 1, name

    run(scenario)


def test_a_success_is_remembered_and_a_failure_is_not(run: Callable[..., None]) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        login = await harness.log_in()
        assert harness.verifications() == 1
        for _ in range(3):
            assert await harness.log_in() is login
        assert harness.verifications() == 0
        for _ in range(2):
            assert await harness.ask("ann", "wrong horse") == INVALID
        assert harness.verifications() == 2

    run(scenario)


def test_a_success_is_forgotten_after_its_time(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 0.0)

    async def scenario(harness: AuthenticatorHarness) -> None:
        await harness.log_in()
        await harness.log_in()
        assert harness.verifications() == 2

    run(scenario)


def test_connections_that_come_together_share_a_verification(run: Callable[..., None]) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        answers = await asyncio.gather(*(harness.begin("ann") for _ in range(20)))
        assert len(set(map(id, answers))) == 1
        assert harness.verifications() <= module.VERIFICATIONS

    run(scenario)


def test_without_the_database_memory_decides_however_old_it_is(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 0.0)

    async def scenario(harness: AuthenticatorHarness) -> None:
        login = await harness.log_in()
        with harness.away():
            assert await harness.log_in() is login
            for name, password in (("ann", "wrong horse"), ("bob", RIGHT), ("dis", RIGHT)):
                reply = await harness.ask(name, password)
                assert str(reply).startswith("454 4.7.0")
        assert await harness.ask("bob") == INVALID

    run(scenario)


def test_memory_outlives_an_outage_of_any_length(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refresh forgets what is old, but only when the database answers."""
    monkeypatch.setattr(module, "REMEMBERED", 0.0)

    async def scenario(harness: AuthenticatorHarness) -> None:
        with capture_logs() as logs:
            await harness.log_in()
            with harness.away():
                await until(lambda: any(entry["event"] == "users not read" for entry in logs))
                await harness.log_in()
            await until(lambda: not harness.authenticator.remembered)

    run(scenario, refresh=0.05)


def test_guesses_during_an_outage_are_limited_too(run: Callable[..., None]) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        await harness.log_in()
        with harness.away():
            for _ in range(FAILURES_PER_MINUTE):
                assert str(await harness.ask("ann", "wrong horse")).startswith("454")
            assert str(await harness.ask("ann", RIGHT)).startswith("421")

    run(scenario)


def test_too_many_failures_block_an_address_and_no_other(run: Callable[..., None]) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        await harness.log_in()
        for _ in range(FAILURES_PER_MINUTE):
            assert await harness.ask("ann", "wrong horse") == INVALID
        harness.verifications()
        for password in ("wrong horse", RIGHT):
            assert str(await harness.ask("ann", password)).startswith("421 4.7.0")
        assert harness.verifications() == 0
        assert isinstance(await harness.ask("ann", peer="192.0.2.2"), Login)

    before = measured("authentications", result="limited")
    run(scenario)
    assert measured("authentications", result="limited") == before + 2


def test_guesses_that_come_together_are_limited_too(run: Callable[..., None]) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        guesses = [harness.begin("ann", f"wrong horse {n}") for n in range(40)]
        answers = await asyncio.gather(*guesses)
        most = FAILURES_PER_MINUTE + module.VERIFICATIONS - 1
        assert harness.verifications() <= most
        assert sum(answer == INVALID for answer in answers) <= most
        assert all(str(answer)[:3] in ("421", "535") for answer in answers)

    run(scenario)


def test_the_network_of_an_ipv6_client_counts(run: Callable[..., None]) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        for n in range(FAILURES_PER_MINUTE):
            assert await harness.ask("bob", peer=f"2001:db8::{n}") == INVALID
        assert str(await harness.ask("ann", peer="2001:db8::ffff")).startswith("421")
        assert isinstance(await harness.ask("ann", peer="2001:db8:0:1::1"), Login)

    run(scenario)


def test_the_table_of_failures_is_bounded(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CLIENTS", 3)
    monkeypatch.setattr(module, "MAX_REMEMBERED", 2)

    async def scenario(harness: AuthenticatorHarness) -> None:
        for n in range(5):
            assert await harness.ask("bob", peer=f"192.0.2.{n}") == INVALID
            harness.users.add(f"user{n}", HASH, actor="test")
            await harness.log_in(f"user{n}")
        assert len(harness.authenticator.failing) == 3
        assert len(harness.authenticator.remembered) == 2

    run(scenario)


def test_a_failure_is_answered_after_its_delay(run: Callable[..., None]) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        failure = harness.begin("ann", "wrong horse")
        await harness.log_in()
        await until(lambda: measured("authentications", result="failed") > before)
        assert not failure.done(), "it was verified, and its reply waits"

    before = measured("authentications", result="failed")
    run(scenario, failure_delay=3600.0)


def test_the_queue_of_attempts_is_bounded(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)

    async def scenario(harness: AuthenticatorHarness) -> None:
        began = [harness.begin("bob", peer=f"192.0.2.{n}") for n in range(7)]
        assert [attempt.done() for attempt in began] == [False] * 5 + [True] * 2
        answers = [str(answer)[:3] for answer in await asyncio.gather(*began)]
        assert answers == ["535"] * 5 + ["454"] * 2

    run(scenario)


def test_a_user_that_was_disabled_loses_its_login(run: Callable[..., None]) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        login = await harness.log_in()
        harness.users.disable("ann", actor="test")
        await until(lambda: login.revoked)
        assert await harness.ask("ann") == INVALID
        harness.users.enable("ann", actor="test")
        assert await harness.log_in() is not login

    run(scenario, refresh=0.05)


def test_a_user_that_was_removed_loses_its_login(run: Callable[..., None]) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        login = await harness.log_in()
        harness.users.remove("ann", actor="test")
        await until(lambda: login.revoked)
        assert await harness.ask("ann") == INVALID

    run(scenario, refresh=0.05)


@pytest.mark.parametrize("refresh", [0.05, 3600.0])
def test_a_new_password_ends_logins_with_the_old_one(
    run: Callable[..., None], refresh: float
) -> None:
    """At the next refresh, or when the new password comes."""

    async def scenario(harness: AuthenticatorHarness) -> None:
        old = await harness.log_in()
        harness.users.set_password("ann", OTHER_HASH, actor="test")
        if refresh < 1:
            await until(lambda: old.revoked)
        new = await harness.log_in("ann", "battery staple")
        assert old.revoked
        assert not new.revoked
        assert await harness.ask("ann", RIGHT) == INVALID

    run(scenario, refresh=refresh)


def test_the_last_activity_is_recorded(run: Callable[..., None]) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        def seen(name: str) -> Any:
            return harness.users.find([name])[name].last_seen_at

        login = await harness.log_in()
        await until(lambda: seen("ann") is not None)
        first = seen("ann")
        login.begin_message("a@b")
        await until(lambda: seen("ann") != first)
        assert seen("dis") is None

    run(scenario, refresh=0.05)


def test_the_last_activity_is_recorded_at_the_end(clean_url: str, policy: Policy) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        await harness.log_in()

    run_on(clean_url, policy, scenario)
    engine = connect(clean_url)
    assert Users(engine).find(["ann"])["ann"].last_seen_at is not None
    engine.dispose()


def test_a_frozen_database_counts_as_away(
    postgres: Postgres, postgres_url: str, policy: Policy
) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        await harness.log_in()
        postgres.pause()
        try:
            assert str(await harness.ask("bob")).startswith("454")
            await harness.log_in()
        finally:
            postgres.resume()
        assert await harness.ask("bob", peer="192.0.2.2") == INVALID

    run_on(postgres_url, policy, scenario, timeout=2.0)


def test_the_database_may_be_away_from_the_beginning(
    postgres: Postgres, postgres_url: str, policy: Policy
) -> None:
    async def scenario(harness: AuthenticatorHarness) -> None:
        postgres.kill()
        assert str(await harness.ask("ann")).startswith("454")
        postgres.start()
        await harness.log_in()

    run_on(postgres_url, policy, scenario)
