"""Webhooks: the file RELAY_WEBHOOKS, and the secrets that sign.

Each `[[webhook]]` table is a URL that gets events by POST (docs/webhooks.md has the keys and an
example). `secret_file` has a `whsec_` line for each secret, as the Standard Webhooks specification
writes them; every request is signed with each of them, the first one first, so that a receiver may
change from one to the other at any time.

What must stay true: no secret is in the database, in a log or in an error; plain `http://` leaves
this machine only where the file says `insecure`.
"""

import base64
import binascii
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from relay.events.model import EventType, NewSubscription
from relay.listeners import is_loopback
from relay.settings import Settings, SettingsError

PREFIX = "whsec_"
MIN_SECRET, MAX_SECRET = 24, 64  # bytes, as the specification has them
MAX_SECRETS = 5
KEYS = ("name", "url", "secret_file", "types", "routes", "insecure")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HOW_TO_WRITE = 'write lines such as `echo "whsec_$(openssl rand -base64 32)"` prints'


class SecretError(ValueError):
    """A file of secrets that cannot be used; the text says what to write."""


@dataclass(frozen=True, slots=True)
class Webhook:
    """A table of the file. No types or no routes: all."""

    name: str
    url: str = field(repr=False)  # it may contain a password
    secret_file: Path
    types: tuple[EventType, ...] = ()
    routes: tuple[str, ...] = ()

    @property
    def subscription(self) -> NewSubscription:
        """What the worker registers for it."""
        return NewSubscription(self.name, self.types, self.routes)


def load_webhooks(settings: Settings) -> tuple[Webhook, ...]:
    """The webhooks of the settings, without their secrets; raises SettingsError."""
    path = settings.webhooks
    if path is None:
        return ()
    try:
        return parse_webhooks(path.read_text(), path.absolute().parent)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(
            f"RELAY_WEBHOOKS: {path}: {why}; write that file, or leave RELAY_WEBHOOKS empty"
        ) from None
    except ValueError as error:
        raise SettingsError(f"RELAY_WEBHOOKS: {path}: {error}") from None


def parse_webhooks(text: str, directory: Path) -> tuple[Webhook, ...]:
    """The webhooks of a TOML file, in its order; raises ValueError that names table and key.

    `secret_file` is relative to `directory`.
    """
    document = tomllib.loads(text)
    for key in document.keys() - {"webhook"}:
        raise ValueError(f"{key}: no such table; write [[webhook]] for each webhook")
    tables = document.get("webhook", [])
    if not isinstance(tables, list):
        raise ValueError("webhook: write [[webhook]], with two brackets")
    webhooks: dict[str, Webhook] = {}
    for number, table in enumerate(tables, 1):
        try:
            webhook = _webhook(table, directory)
        except ValueError as error:
            raise ValueError(f"[[webhook]] {number}: {error}") from None
        if webhook.name in webhooks:
            raise ValueError(
                f"[[webhook]] {number}: name: {webhook.name} is another webhook: write a `name` of"
                " its own"
            )
        webhooks[webhook.name] = webhook
    return tuple(webhooks.values())


def _webhook(table: Mapping[str, Any], directory: Path) -> Webhook:
    for key in table.keys() - set(KEYS):
        raise ValueError(f"{key}: no such key; there are {', '.join(KEYS)}")
    insecure = table.get("insecure", False)
    if not isinstance(insecure, bool):
        raise ValueError("insecure: write true or false")
    url, host = _url(_text(table, "url"), insecure=insecure)
    name = _text(table, "name") if "name" in table else host
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: {name!r}: write up to 100 letters, digits and . _ -")
    types = []
    for text in _texts(table, "types"):
        if text not in list(EventType):
            raise ValueError(f"types: {text!r} is no type; there are {', '.join(EventType)}")
        types.append(EventType(text))
    secret_file = directory / _text(table, "secret_file")
    return Webhook(name, url, secret_file, tuple(types), _texts(table, "routes"))


def _text(table: Mapping[str, Any], key: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key}: write a text")
    return value


def _texts(table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"{key}: write a list of texts; without it there is no limit")
    return tuple(dict.fromkeys(value))


def _url(text: str, *, insecure: bool) -> tuple[str, str]:
    """A URL and its host. The error does not show it, because it may contain a password."""
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        valid = parts.scheme in ("http", "https") and host and parts.port != 0
    except ValueError:
        valid, host, parts = False, "", None
    if not valid or parts is None or not text.isascii() or re.search(r"\s", text):
        raise ValueError("url: write https://host/path")
    if parts.scheme == "http" and not insecure and not is_loopback(host):
        raise ValueError(
            f"url: http to {host} could be read on the way: write https, or insecure = true"
        )
    return text, host.replace(":", "-")


def read_secrets(path: Path) -> tuple[str, ...]:
    """The secrets of a file, in its order; empty lines and lines with # are left out. Raises
    SecretError."""
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SecretError(f"{path}: {why}; {_HOW_TO_WRITE}") from None
    secrets = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not secrets:
        raise SecretError(f"{path} has no secret; {_HOW_TO_WRITE}")
    if len(secrets) > MAX_SECRETS:
        raise SecretError(f"{path} has more than {MAX_SECRETS} secrets; remove the oldest")
    for number, secret in enumerate(secrets, 1):
        if not _is_secret(secret):
            raise SecretError(f"{path}: secret {number} is not valid; {_HOW_TO_WRITE}")
    return tuple(secrets)


def _is_secret(text: str) -> bool:
    """`whsec_` and the base64 of 24 to 64 bytes."""
    try:
        key = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        return False
    return text.startswith(PREFIX) and MIN_SECRET <= len(key) <= MAX_SECRET
