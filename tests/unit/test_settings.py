"""Settings: every spelling that operators use, and errors that name the variable, the value and
what to write."""

import inspect
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import settings as module
from relay.listeners import Listener, parse_listen
from relay.redaction import redacted
from relay.settings import (
    ROLES,
    Settings,
    SettingsError,
    SmtpdSettings,
    WorkerSettings,
    load,
    names,
    seconds,
    size,
    unknown_names,
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without RELAY_ variables."""
    for name in [name for name in os.environ if name.startswith("RELAY_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def test_every_default_is_valid() -> None:
    for role in ROLES:
        found = load(role)
        assert found.state_dir == Path("var").absolute()
        assert found.database_url == f"sqlite:///{Path('var').absolute()}/relay.db"
        assert found.spool_dir == Path("var").absolute() / "spool"
        assert found.broker_url.startswith("redis+socket://")
        assert found.hostname
        assert found.qmqp_servers == ()


def test_defaults_are_those_of_the_design() -> None:
    smtpd, worker = load(SmtpdSettings), load(WorkerSettings)
    assert smtpd.smtp_listen == (Listener("127.0.0.1", 2525),)
    assert smtpd.client_networks == ("127.0.0.0/8", "::1")
    assert (smtpd.qmqp_listen, smtpd.qmqp_client_networks) == ((), ("127.0.0.0/8", "::1"))
    assert (smtpd.max_message_size, smtpd.max_recipients, smtpd.max_connections) == (
        25 << 20,
        1000,
        1000,
    )
    assert (smtpd.smtp_timeout, smtpd.accept_deadline, smtpd.grace, smtpd.batch_size) == (
        300,
        60,
        5,
        64,
    )
    assert (worker.connect_timeout, worker.io_timeout, worker.reply_timeout) == (10, 60, 600)
    assert (worker.session_timeout, worker.block_size, worker.lease) == (3600, 64 << 10, 60)
    assert (worker.worker_connections, worker.server_connections, worker.drain_timeout) == (
        128,
        50,
        30,
    )
    assert (worker.retry_min, worker.retry_max, worker.queue_lifetime) == (30, 3600, 5 * 86400)
    assert (worker.uncertain, worker.uncertain_delay, worker.poison_limit) == ("retry", 900, 5)
    assert (worker.bounces, worker.delay_warning, worker.retention, worker.metrics_listen) == (
        "dsn",
        None,
        2592000,
        (),
    )


def test_settings_are_read_from_the_environment(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RELAY_STATE_DIR", "/var/lib/relay")
    environment.setenv("RELAY_QMQP_SERVERS", "a, b:629,[::1]:628\n unix:/run/q")
    environment.setenv("RELAY_SMTP_LISTEN", "0.0.0.0:25,[::]:25/auth")
    environment.setenv("RELAY_AUTH_PLAINTEXT_NETWORKS", "127.0.0.1")
    environment.setenv("RELAY_MAX_MESSAGE_SIZE", "10M")
    environment.setenv("RELAY_QUEUE_LIFETIME", "2d")
    environment.setenv("RELAY_CLIENT_NETWORKS", "10.0.0.0/8 192.168.0.0/16")
    environment.setenv("RELAY_METRICS_LISTEN", "off")
    environment.setenv("RELAY_GRACE", "")
    found = load(SmtpdSettings)
    assert found.database_url == "sqlite:////var/lib/relay/relay.db"
    assert found.qmqp_servers == ("a", "b:629", "[::1]:628", "unix:/run/q")
    assert found.smtp_listen == (Listener("0.0.0.0", 25), Listener("::", 25, auth=True))
    assert (found.max_message_size, found.queue_lifetime, found.metrics_listen) == (
        10 << 20,
        172800.0,
        (),
    )
    assert found.client_networks == ("10.0.0.0/8", "192.168.0.0/16")
    assert found.grace == 5.0, "empty is not given"


def test_a_name_in_lower_case_is_no_setting(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("relay_grace", "9s")
    environment.setenv("RELAY_Grace", "9s")
    assert load(Settings).grace == 5.0
    assert unknown_names() == {"RELAY_Grace": "RELAY_GRACE"}


def test_a_given_value_comes_before_the_environment(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RELAY_GRACE", "9s")
    assert (load(Settings).grace, load(Settings, grace=7.0).grace) == (9, 7)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("30s", 30),
        ("5m", 300),
        ("2h", 7200),
        ("5d", 432000),
        ("45", 45),
        ("1.5h", 5400),
        ("250ms", 0.25),
        (" 7 s ", 7),
    ],
)
def test_duration_becomes_seconds(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64K", 65536),
        ("25M", 25 << 20),
        ("1G", 1 << 30),
        ("512", 512),
        ("10m", 10 << 20),
        ("3KiB", 3072),
        ("2MB", 2 << 20),
    ],
)
def test_size_becomes_bytes(text: str, value: int) -> None:
    assert size(text) == value


@given(st.text())
def test_any_text_parses_or_raises_value_error(text: str) -> None:
    for read in (seconds, size, parse_listen):
        with suppress(ValueError):
            read(text)


@pytest.mark.parametrize(
    ("name", "value", "role", "expected"),
    [
        ("RELAY_LEASE", "soon", WorkerSettings, "is not a duration"),
        ("RELAY_LEASE", "0", WorkerSettings, "greater than 0"),
        ("RELAY_LEASE", "-5s", WorkerSettings, "is not a duration"),
        ("RELAY_MAX_MESSAGE_SIZE", "25X", SmtpdSettings, "is not a size"),
        ("RELAY_MAX_MESSAGE_SIZE", "0", SmtpdSettings, "greater than 0"),
        ("RELAY_MAX_RECIPIENTS", "99", SmtpdSettings, "100"),
        ("RELAY_BLOCK_SIZE", "16", WorkerSettings, "512"),
        ("RELAY_SMTP_LISTEN", "25", SmtpdSettings, "address to listen on"),
        ("RELAY_SMTP_LISTEN", "::1:25", SmtpdSettings, "address to listen on"),
        ("RELAY_UNCERTAIN", "maybe", WorkerSettings, "'retry' or 'hold'"),
        ("RELAY_POISON_LIMIT", "2", WorkerSettings, "3"),
        ("RELAY_BATCH_SIZE", "many", Settings, "integer"),
        ("RELAY_LOG_LEVEL", "loud", Settings, "debug"),
        ("RELAY_UNSAFE_DURABILITY", "perhaps", Settings, "boolean"),
    ],
)
def test_error_names_the_bad_value(
    environment: pytest.MonkeyPatch, name: str, value: str, role: type[Settings], expected: str
) -> None:
    environment.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load(role)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{name} = {value!r}: ")
    assert expected in line


def test_every_bad_value_has_a_line_in_the_error(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RELAY_LEASE", "soon")
    environment.setenv("RELAY_GRACE", "later")
    with pytest.raises(SettingsError) as caught:
        load(WorkerSettings)
    assert sorted(line.partition(" ")[0] for line in str(caught.value).splitlines()) == [
        "RELAY_GRACE",
        "RELAY_LEASE",
    ]
    environment.delenv("RELAY_LEASE")
    load(SmtpdSettings, grace=1.0)


def test_contradicting_values_are_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RELAY_RETRY_MIN", "2h")
    with pytest.raises(
        SettingsError, match="RELAY_RETRY_MAX must not be less than RELAY_RETRY_MIN"
    ):
        load(WorkerSettings)


@pytest.mark.parametrize("role", ROLES)
def test_every_role_refuses_the_same_settings(
    environment: pytest.MonkeyPatch, tmp_path: Path, role: type[Settings]
) -> None:
    environment.setenv("RELAY_LEASE", "soon")
    environment.setenv("RELAY_MAX_RECIPIENTS", "1")
    environment.setenv("RELAY_GRACE", "later")
    with pytest.raises(SettingsError) as caught:
        load(role)
    named = [line.partition(" ")[0] for line in str(caught.value).splitlines()]
    assert sorted(named) == ["RELAY_GRACE", "RELAY_LEASE", "RELAY_MAX_RECIPIENTS"], "each once"
    for name in named:
        environment.delenv(name)
    environment.setenv("RELAY_ROUTES", str(tmp_path / "missing.toml"))
    with pytest.raises(
        SettingsError, match=r"^RELAY_ROUTES: .*missing.toml: No such file .*; write that file, or "
    ):
        load(role)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "CLIENT_NETWORKS",
            "foo",
            "'foo' is not a network: write 192.0.2.0/24, 2001:db8::/32, one address, or connected",
        ),
        (
            "CLIENT_NETWORKS",
            "10.0.0.1/8",
            (
                "'10.0.0.1/8' is an address within a network: write 10.0.0.0/8, or 10.0.0.1"
                " for that"
                " address alone"
            ),
        ),
        (
            "CLIENT_NETWORKS",
            "::1, 2001:db8::7/32",
            "write 2001:db8::/32, or 2001:db8::7 for that address alone",
        ),
        ("CLIENT_NETWORKS", "127.0.0.0/8 300.1.1.1", "'300.1.1.1' is not a network"),
        ("HOSTNAME", "a b", "is not a host name: write relay.example.org"),
        ("HOSTNAME", "relay.example.org.", "is not a host name"),
        ("HOSTNAME", "-relay.example.org", "is not a host name"),
        ("HOSTNAME", "b\u00fccher.example", "is not a host name"),
        ("HOSTNAME", ".".join(["a" * 63] * 4) + ".example", "is not a host name"),
        (
            "RECIPIENT_DOMAINS",
            "example.org, .example. net",
            "'.example.' is not a domain: write example.org, or .",
        ),
        ("RECIPIENT_DOMAINS", "example.org . example.net", "'.' is not a domain"),
        ("RECIPIENT_DOMAINS", "@example.org", "'@example.org' is not a domain"),
        (
            "RECIPIENT_DOMAINS",
            "*.example.org",
            "write example.org, or .example.org for every domain below it",
        ),
        ("RECIPIENT_DOMAINS", "example.org;example.net", "with a comma or a blank between two"),
    ],
)
def test_error_says_what_to_write(
    environment: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    environment.setenv(f"RELAY_{name}", value)
    with pytest.raises(SettingsError) as caught:
        load(Settings)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"RELAY_{name} = {value!r}: ")
    assert expected in line


@pytest.mark.parametrize("blank", [", ", " ", ",,", "\t", "\r\n", " \n"])
def test_commas_and_blanks_separate_words(environment: pytest.MonkeyPatch, blank: str) -> None:
    environment.setenv(
        "RELAY_RECIPIENT_DOMAINS", f"{blank}example.org{blank}.example.net{blank}[192.0.2.1]{blank}"
    )
    environment.setenv("RELAY_QMQP_SERVERS", blank)
    found = load(SmtpdSettings)
    assert (found.recipient_domains, found.qmqp_servers) == (
        ("example.org", ".example.net", "[192.0.2.1]"),
        (),
    )


@pytest.mark.parametrize(
    "name", ["relay", "Relay-1.example.org", "my_host.localdomain", "[192.0.2.1]", "[IPv6:::1]"]
)
def test_host_name_is_accepted(name: str) -> None:
    assert load(Settings, hostname=name).hostname == name


def test_secret_is_read_from_a_file(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("postgresql://relay:secret@db/relay\n")
    environment.setenv("RELAY_DATABASE_URL_FILE", str(secret))
    assert load(Settings).database_url == "postgresql://relay:secret@db/relay"
    environment.setenv("RELAY_DATABASE_URL", "sqlite:////x.db")
    assert load(Settings).database_url == "sqlite:////x.db", "what is given itself counts more"


def test_unreadable_file_is_named(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, expected in (
        (tmp_path / "missing", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "binary", "text"),
    ):
        environment.setenv("RELAY_DATABASE_URL_FILE", str(path))
        with pytest.raises(SettingsError) as caught:
            load(Settings)
        assert str(caught.value).startswith(f"RELAY_DATABASE_URL_FILE: cannot read {path}: ")
        assert expected in str(caught.value)


def test_setting_whose_name_ends_in_file_is_not_a_file(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RELAY_HEALTH_FILE", "/run/relay/tick")
    assert load(WorkerSettings).health_file == Path("/run/relay/tick")
    assert unknown_names() == {}


def test_unknown_name_is_reported_with_the_most_similar_one() -> None:
    given = {
        "RELAY_QMQP_SERVER": "x",
        "RELAY_LEASE": "1m",
        "RELAY_DATABASE_URL_FILE": "/f",
        "RELAY_XYZZY": "1",
        "RELAY_TEST_POSTGRES_URL": "x",
        "HOME": "/",
    }
    assert unknown_names(given) == {"RELAY_QMQP_SERVER": "RELAY_QMQP_SERVERS", "RELAY_XYZZY": ""}


def test_password_is_never_shown(environment: pytest.MonkeyPatch) -> None:
    assert (
        redacted("postgresql://relay:s3cret@db/relay?x=1")
        == "postgresql://relay:***@db/relay?x=***"
    )
    assert redacted("redis://:s3cret@host:6379/0") == "redis://:***@host:6379/0"
    assert redacted("postgresql://relay:p@ss/w:rd@db/relay") == "postgresql://relay:***@db/relay"
    assert (
        redacted("postgresql://relay@db/relay?password=s3cret&x=1")
        == "postgresql://relay@db/relay?password=***&x=***"
    )
    assert redacted("sqlite:////var/relay.db") == "sqlite:////var/relay.db"
    environment.setenv("RELAY_LEASE", "soon")
    environment.setenv("RELAY_DATABASE_URL", "postgresql://relay:s3cret@db/relay")
    with pytest.raises(SettingsError) as caught:
        load(WorkerSettings)
    assert "s3cret" not in str(caught.value)


def test_settings_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(Settings).grace = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://relay:s3@cret s3cret@db/relay", "postgresql://relay:***@db/relay"),
        ("postgresql://re@lay:s3@cret@db/relay", "postgresql://re@lay:***@db/relay"),
        ("postgresql://relay:s3?x=cret@db/relay", "postgresql://relay:***@"),
        (
            "postgresql://relay@db/relay?sslpassword=s3 cret&passfile=s3cret",
            "postgresql://relay@db/relay?sslpassword=***&passfile=***",
        ),
        ("redis://host:6379/0?password=s3@cret&db=1", "redis://host:***@db=1"),
        ("redis://host/0?password=s3:cret@s3cret", "redis://host/0?password=***"),
        (
            "rediss://host:6379/0?ssl_keyfile_password=s3cret",
            "rediss://host:6379/0?ssl_keyfile_password=***",
        ),
        ("no redis://:s3 cret@host:6379/0 there", "no redis://:***@host:6379/0 there"),
        ("host=db password=s3cret", "host=db password=***"),
    ],
)
def test_possible_secret_is_not_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown


@given(st.text(st.sampled_from("s:/?&=@# é"), max_size=12), st.sampled_from(["u", ""]))
def test_part_of_a_password_is_not_shown(inside: str, user: str) -> None:
    secret = f"XX{inside}XX"
    assert "X" not in redacted(f"postgresql://{user}:{secret}@db:5432/relay")
    assert "X" not in redacted(
        f"postgresql://{user}@db:5432/relay?a=1&pw={secret.replace('&', '')}"
    )


def test_names_lists_every_setting() -> None:
    assert {"RELAY_STATE_DIR", "RELAY_SMTP_LISTEN", "RELAY_LEASE"} <= names()
    assert all(
        role in ROLES
        for _, role in inspect.getmembers(module, inspect.isclass)
        if issubclass(role, Settings)
    )


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cret/x@host:6379/0",
        "redis://:s3cret#x@host/0",
        "s3cret@host",
        "redis://host:s3cret/0",
        "amqp://u:s3cret@host",
        "redis://",
        "redis+socket://",
    ],
)
def test_invalid_broker_url_is_not_shown(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^RELAY_BROKER_URL: is not a broker URL") as caught:
        load(Settings, broker_url=url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["redis://localhost", "rediss://u:a%2Fb@[::1]:6380/1", "redis+socket:///run/b.sock"]
)
def test_broker_url_is_accepted(url: str) -> None:
    assert load(Settings, broker_url=url).broker_url == url
