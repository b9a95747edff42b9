"""The certificate of the relay: smtpd, the page and the metrics present the same one.

A `CertificatePair` reads RELAY_TLS_CERTIFICATE and RELAY_TLS_KEY into an SSLContext. Renewed files
are found by their times, at most every CHECK_INTERVAL, and used when they have not changed between
two checks; `reload` (SIGHUP) uses them at once. Handshakes take `context` when they begin, so
sessions that are open keep what they have.

What must stay true: a pair that cannot be read, or whose parts do not belong together, replaces
nothing. It is logged and counted once, until the files change again.
"""

import re
import ssl
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, NoReturn

from relay import metrics
from relay.listeners import is_loopback
from relay.log import get_logger
from relay.settings import Settings, SettingsError

CHECK_INTERVAL = 10.0  # seconds between two looks at the files
DAY = 86400.0
WARN_DAYS = 14.0  # before the end of a certificate
_MINIMUM = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

log = get_logger(__name__)


class CertificateError(SettingsError):
    """The certificate cannot be used; the text names the file."""


class LoadedPair(NamedTuple):
    """A pair that fits. `expires_at` (seconds since the epoch) is the end of the first certificate
    of the chain that ends."""

    context: ssl.SSLContext
    expires_at: float


def load_pair(settings: Settings, client_ca: Path | None = None) -> LoadedPair:
    """Reads the pair that the settings name; raises CertificateError."""
    certificate = settings.tls_certificate
    if certificate is None:
        raise CertificateError("RELAY_TLS_CERTIFICATE is not set")
    key = settings.tls_key or certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _MINIMUM[settings.tls_minimum]
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
        expires_at = min(end.timestamp() for end in _ends(certificate))
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise CertificateError(
            f"RELAY_TLS_CERTIFICATE = {certificate}, RELAY_TLS_KEY = {key}: {_reason(error)}"
        ) from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except OSError as error:
            raise CertificateError(f"RELAY_TLS_CLIENT_CA = {client_ca}: {_reason(error)}") from None
        context.verify_mode = ssl.CERT_OPTIONAL
    return LoadedPair(context, expires_at)


def _no_password() -> NoReturn:
    # Without this function OpenSSL would ask on the terminal.
    raise ValueError("the key has a password; store it without one, readable by the relay alone")


def _ends(certificate: Path) -> list[datetime]:
    from cryptography import x509  # only processes with a certificate need its memory

    chain = x509.load_pem_x509_certificates(certificate.read_bytes())
    return [each.not_valid_after_utc for each in chain]


def _reason(error: Exception) -> str:
    reasons = {
        "KEY_VALUES_MISMATCH": "the key does not belong to the certificate",
        "PEM_LIB": "no certificate and key in PEM format",
        "NO_START_LINE": "no certificate and key in PEM format",
        "NO_CERTIFICATE_OR_CRL_FOUND": "no certificate in PEM format",
    }
    if isinstance(error, ssl.SSLError):
        reason = error.reason or re.sub(r"^\[\w+\] | \(_ssl.*\)$", "", str(error))
        return reasons.get(reason.upper().replace(" ", "_"), reason)
    return (isinstance(error, OSError) and error.strerror) or str(error)


class CertificatePair:
    """The pair in use. Raises CertificateError if it cannot be used at the start."""

    def __init__(
        self,
        settings: Settings,
        client_ca: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._client_ca = client_ca
        self._tried = self._seen = self._signature()
        self._check_at = clock() + CHECK_INTERVAL
        self._loaded = load_pair(settings, client_ca)
        file = str(settings.tls_certificate)
        self._rejected = metrics.CERTIFICATE_REJECTED.labels(file)
        self._rejected.set(0)
        metrics.CERTIFICATE_DAYS.labels(file).set_function(lambda: self.days)

    @property
    def context(self) -> ssl.SSLContext:
        """The context for a handshake that begins."""
        self.refresh()
        return self._loaded.context

    @property
    def days(self) -> float:
        """Days until the certificate ends; negative afterwards."""
        return (self._loaded.expires_at - time.time()) / DAY

    def refresh(self) -> None:
        """Takes renewed files. Looks at them every CHECK_INTERVAL, however often it is called."""
        now = self._clock()
        if now < self._check_at:
            return
        self._check_at = now + CHECK_INTERVAL
        last, self._seen = self._seen, self._signature()
        if self._seen == last != self._tried:
            self.reload()

    def reload(self) -> bool:
        """Takes the files as they are now, if they fit; returns whether they do."""
        self._tried = self._signature()
        try:
            self._loaded = load_pair(self._settings, self._client_ca)
        except CertificateError as error:
            self._rejected.set(1)
            log.critical("certificate rejected", reason=str(error), days=round(self.days, 1))
            return False
        self._rejected.set(0)
        log.info("certificate loaded", days=round(self.days, 1))
        return True

    def server_context(self) -> ssl.SSLContext:
        """A context for a server that keeps one: each handshake presents the pair in use then."""
        context = load_pair(self._settings).context

        def choose(connection: ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
            connection.context = self.context

        context.sni_callback = choose  # called without a name too
        return context

    def _signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What changes when a file is written or replaced."""
        files = (self._settings.tls_certificate, self._settings.tls_key, self._client_ca)
        return tuple(_stamp(file) if file is not None else None for file in files)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def certificate_pair(settings: Settings, client_ca: Path | None = None) -> CertificatePair | None:
    """The pair that the settings name, if they name one; raises CertificateError."""
    return None if settings.tls_certificate is None else CertificatePair(settings, client_ca)


def metrics_context(settings: Settings) -> Callable[[], ssl.SSLContext] | None:
    """What a worker needs to serve its metrics over TLS, None if it serves none beyond loopback.

    A certificate that cannot be used does not stop a worker: each scrape fails.
    """
    if settings.tls_certificate is None or all(
        is_loopback(host) for host, _port in settings.metrics_listen
    ):
        return None
    try:
        pair = CertificatePair(settings)
    except CertificateError as error:
        log.critical("certificate rejected", reason=str(error))
        return lambda: load_pair(settings).context
    return lambda: pair.context
