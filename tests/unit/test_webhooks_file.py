"""The file RELAY_WEBHOOKS and the secrets: what is accepted, and errors that say what to write."""

from pathlib import Path

import pytest

from relay.events.model import EventType
from relay.events.webhooks import (
    MAX_SECRETS,
    SecretError,
    Webhook,
    parse_webhooks,
    read_secrets,
)
from relay.settings import Settings, SettingsError, load
from tests.integration.webhook_receiver import OTHER_SECRET, SECRET

HTTPS = '[[webhook]]\nurl = "https://billing.example.org:8443/mail?x=1"\nsecret_file = "s"\n'


def parsed(text: str) -> Webhook:
    (webhook,) = parse_webhooks(text, Path("/etc/relay"))
    return webhook


def test_webhook_has_the_name_of_its_host_and_wants_all() -> None:
    webhook = parsed(HTTPS)
    assert webhook.name == "billing.example.org"
    assert webhook.secret_file == Path("/etc/relay/s")
    assert (webhook.types, webhook.routes) == ((), ())
    assert "8443" not in repr(webhook), "a URL may contain a password"


def test_all_keys_are_read() -> None:
    webhook = parsed(HTTPS + 'name = "b"\ntypes = ["bounced"]\nroutes = ["far"]\n')
    assert webhook.subscription == ("b", (EventType.BOUNCED,), ("far",))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "[::1]", "localhost"])
def test_http_to_this_machine_is_allowed(host: str) -> None:
    webhook = parsed(f'[[webhook]]\nurl = "http://{host}:8080/x"\nsecret_file = "s"\nname = "n"')
    assert host in webhook.url


def test_http_to_another_machine_must_be_called_insecure() -> None:
    text = HTTPS.replace("https", "http")
    with pytest.raises(ValueError, match="write https, or insecure = true"):
        parsed(text)
    assert parsed(f"{text}insecure = true\n").url.startswith("http://")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("x = 1", r"x: no such table; write \[\[webhook\]\]"),
        ("[webhook]\nurl = 'x'", "with two brackets"),
        (HTTPS + "secret = 1", r"\[\[webhook\]\] 1: secret: no such key; there are name, url"),
        ("[[webhook]]\nsecret_file = 's'", "url: write a text"),
        ("[[webhook]]\nurl = 'https://x.test/'", "secret_file: write a text"),
        ("[[webhook]]\nurl = 'ftp://u:secret@x'\nsecret_file = 's'", "url: write https://host/"),
        ("[[webhook]]\nurl = 'https://x.test:0/'\nsecret_file = 's'", "url: write https://host/"),
        ("[[webhook]]\nurl = 'https://x.test:x/'\nsecret_file = 's'", "url: write https://host/"),
        ("[[webhook]]\nurl = 'https://x .test/'\nsecret_file = 's'", "url: write https://host/"),
        (HTTPS + "types = ['sent']", "'sent' is no type; there are accepted, delivered"),
        (HTTPS + "types = 'bounced'", "types: write a list of texts"),
        (HTTPS + "routes = [1]", "routes: write a list of texts"),
        (HTTPS + "insecure = 'yes'", "insecure: write true or false"),
        (HTTPS + "name = 'a b'", "name: 'a b': write up to 100 letters"),
        (HTTPS + HTTPS, r"\[\[webhook\]\] 2: name: billing.example.org is another webhook"),
        ("[[webhook", "end of an array"),
    ],
)
def test_error_says_where_it_is_and_what_to_write(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error) as caught:
        parse_webhooks(text, Path("/"))
    assert "secret@" not in str(caught.value)


def test_every_process_refuses_a_bad_file(tmp_path: Path) -> None:
    file = tmp_path / "webhooks.toml"
    with pytest.raises(SettingsError, match=r"RELAY_WEBHOOKS: .*No such file"):
        load(Settings, webhooks=file)
    file.write_text("x = 1")
    with pytest.raises(SettingsError, match=r"RELAY_WEBHOOKS: .*no such table"):
        load(Settings, webhooks=file)
    file.write_bytes(b"\xff")
    with pytest.raises(SettingsError, match="is not UTF-8"):
        load(Settings, webhooks=file)
    file.write_text(HTTPS)
    assert load(Settings, webhooks=file).webhooks == file


def test_secrets_stand_in_lines(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"# the new one\n{SECRET}\n\n  {OTHER_SECRET}\n")
    assert read_secrets(file) == (SECRET, OTHER_SECRET)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "has no secret; write lines such as"),
        ("password\n", "secret 1 is not valid"),
        (f"{SECRET}\nwhsec_c2hvcnQ=\n", "secret 2 is not valid"),
        ("whsec_!!!\n", "is not valid"),
        (f"{SECRET}\n" * (MAX_SECRETS + 1), "more than 5 secrets"),
    ],
)
def test_error_about_a_secret_does_not_show_it(tmp_path: Path, text: str, error: str) -> None:
    file = tmp_path / "secret"
    file.write_text(text)
    with pytest.raises(SecretError, match=error) as caught:
        read_secrets(file)
    assert "c2hvcnQ" not in str(caught.value)
    with pytest.raises(SecretError, match="No such file"):
        read_secrets(tmp_path / "missing")
