"""Sends events to one webhook, over connections that are kept.

A request is as the Standard Webhooks specification has it: the headers `webhook-id`,
`webhook-timestamp` and `webhook-signature`, and the event as JSON. Of the reply only the status and
`Retry-After` count.

What must stay true: a request ends within TIMEOUT, however slowly the receiver reads or replies; at
most MAX_REPLY bytes of a reply are read; no error contains the URL or a secret.
"""

import asyncio
import json
import logging
import time
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
from standardwebhooks.webhooks import Webhook as Signer

from relay.events.model import MailEvent
from relay.events.webhooks import SecretError, Webhook, read_secrets
from relay.listeners import is_loopback
from relay.log import escaped, first_line
from relay.version import running_version
from worker.event_receiver import SendResult

TIMEOUT = 20.0  # seconds for a whole request and its reply
CONNECT_TIMEOUT = 5.0
KEEP_ALIVE = 60.0  # seconds that a connection waits for the next event
MAX_REPLY = 64 << 10
MAX_RETRY_AFTER = 86400.0
SECRETS_CHECKED = 5.0  # seconds between two looks whether the file has changed
GONE, TOO_MANY_REQUESTS = 410, 429

# It would log each request with its URL, which may contain a password.
logging.getLogger("httpx").setLevel(logging.WARNING)


class WebhookClient:
    """Sends events to one webhook. Used on one event loop."""

    def __init__(self, webhook: Webhook, *, connections: int) -> None:
        self.subscription = webhook.subscription
        self._url = webhook.url
        self._signers = _Signers(webhook.secret_file)
        limits = httpx.Limits(
            max_connections=connections,
            max_keepalive_connections=connections,
            keepalive_expiry=KEEP_ALIVE,
        )
        self._client = httpx.AsyncClient(
            headers={
                "content-type": "application/json",
                "user-agent": f"qmqp-relay/{running_version()}",
            },
            timeout=httpx.Timeout(TIMEOUT, connect=CONNECT_TIMEOUT),
            limits=limits,
            # A proxy of the environment is not for this machine itself.
            trust_env=not is_loopback(httpx.URL(webhook.url).host),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def send(self, event: MailEvent) -> SendResult:
        """Send an event once."""
        return await self.post(event.id, json.dumps(event.payload(), separators=(",", ":")))

    async def post(self, event_id: str, text: str) -> SendResult:
        """Send a JSON text under an id once."""
        now = datetime.now(UTC)
        try:
            headers = {
                "webhook-id": event_id,
                "webhook-timestamp": str(int(now.timestamp())),
                "webhook-signature": self._signers.sign(event_id, now, text),
            }
        except SecretError as error:
            return SendResult(str(error), down=True, tried=False)
        try:
            async with (
                asyncio.timeout(TIMEOUT),
                self._client.stream("POST", self._url, content=text, headers=headers) as response,
            ):
                await _read_reply(response)
        except TimeoutError:
            return SendResult(f"no reply in {TIMEOUT:g} s", down=True)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            reason = first_line(error) or type(error).__name__
            return SendResult(escaped(reason, 200), down=True)
        return _result(response)


class _Signers:
    """The secrets of a file, read again when it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._checked_at = float("-inf")
        self._signers: list[Signer] = []

    def sign(self, event_id: str, when: datetime, text: str) -> str:
        """The signatures by every secret; raises SecretError."""
        if time.monotonic() - self._checked_at >= SECRETS_CHECKED:
            self._read()
        return " ".join(signer.sign(event_id, when, text) for signer in self._signers)

    def _read(self) -> None:
        """Read the file if it has changed. While it cannot be used the secrets before count; raises
        SecretError if there are none."""
        try:
            stamp = _stamp(self._path)
            if stamp is None or stamp != self._stamp:
                self._signers = [Signer(secret) for secret in read_secrets(self._path)]
                self._stamp = stamp
        except SecretError:
            if not self._signers:
                raise
        self._checked_at = time.monotonic()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Inode, time and size of a file, which tell a change; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


async def _read_reply(response: httpx.Response) -> None:
    """Read a reply to its end, so that its connection can be kept; a long one closes it."""
    count = 0
    async for chunk in response.aiter_raw():
        count += len(chunk)
        if count > MAX_REPLY:
            return


def _result(response: httpx.Response) -> SendResult:
    status = response.status_code
    if 200 <= status < 300:
        return SendResult()
    return SendResult(
        f"HTTP {status}",
        down=status >= 500 or status == TOO_MANY_REQUESTS,
        gone=status == GONE,
        retry_after=_retry_after(response.headers.get("retry-after", "")),
    )


def _retry_after(text: str) -> float:
    """Seconds of a Retry-After (RFC 9110, 10.2.3), at most a day; 0 without one."""
    seconds = 0.0
    with suppress(ValueError):
        if text.strip().isdecimal():
            seconds = float(text)
        elif text:
            when = parsedate_to_datetime(text)
            zoned = when if when.tzinfo else when.replace(tzinfo=UTC)
            seconds = (zoned - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)
