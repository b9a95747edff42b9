"""The certificate: renewals are taken, a pair that does not fit replaces nothing."""

import os
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from prometheus_client import REGISTRY

from commands.ops.check import check_certificate
from relay import tls
from relay.settings import Settings, SettingsError, SmtpdSettings, load
from relay.tls import CertificateError, CertificatePair, load_pair
from tests.certificates import Authority
from tests.waiting import SetClock


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def settings_of(pair: tuple[Path, Path], **more: Any) -> SmtpdSettings:
    return load(SmtpdSettings, tls_certificate=pair[0], tls_key=pair[1], **more)


def rejected(pair: tuple[Path, Path]) -> float:
    return shown("relay_tls_certificate_rejected", pair)


def shown(name: str, pair: tuple[Path, Path]) -> float:
    """The value of a metric of a certificate."""
    value = REGISTRY.get_sample_value(name, {"file": str(pair[0])})
    assert value is not None
    return value


def served_serial(context: ssl.SSLContext, authority: Authority) -> str:
    """The serial number of the certificate that a client gets."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = authority.client_context().wrap_bio(
        to_client, to_server, server_hostname="relay.example"
    )
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return str((client.getpeercert() or {})["serialNumber"])


def test_a_renewed_pair_is_taken_when_its_files_have_settled(
    authority: Authority, tmp_path: Path
) -> None:
    files = authority.sign("relay.example", days=20).write(tmp_path / "tls")
    clock = SetClock()
    pair = CertificatePair(settings_of(files), clock=clock)
    assert 19.9 < pair.days < 20.1
    first = served_serial(pair.context, authority)
    kept = pair.server_context()
    authority.sign("relay.example", days=90).write(tmp_path / "tls")
    assert served_serial(pair.context, authority) == first, "it is not time to look"
    clock.now += tls.CHECK_INTERVAL
    assert served_serial(pair.context, authority) == first, "the files have just changed"
    clock.now += tls.CHECK_INTERVAL
    second = served_serial(pair.context, authority)
    assert second != first
    assert served_serial(kept, authority) == second, "a server that keeps its context too"
    assert 89.9 < pair.days < 90.1
    assert 89.9 < shown("relay_tls_certificate_days", files) < 90.1
    assert tls.CHECK_INTERVAL * 2 < 60


def test_a_pair_that_does_not_fit_keeps_the_old_one_and_alarms_once(
    authority: Authority,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = authority.sign("relay.example").write(tmp_path / "tls")
    clock = SetClock()
    pair = CertificatePair(settings_of(files), clock=clock)
    first = served_serial(pair.context, authority)
    other = authority.sign("relay.example").write(tmp_path / "other")
    other[1].rename(files[1])
    assert not pair.reload()
    assert rejected(files) == 1
    for _ in range(4):
        clock.now += tls.CHECK_INTERVAL
        assert served_serial(pair.context, authority) == first
    text = capsys.readouterr().out
    assert text.count("certificate rejected") == 1
    assert "the key does not belong to the certificate" in text
    other[0].rename(files[0])
    for _ in range(2):
        clock.now += tls.CHECK_INTERVAL
        pair.refresh()
    assert rejected(files) == 0
    assert served_serial(pair.context, authority) != first
    files[0].unlink()
    assert not pair.reload()
    assert "No such file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("certificate", "key", "reason"),
    [
        (b"", None, "no certificate"),
        (b"-----BEGIN CERTIFICATE-----\nnonsense\n", None, ""),
        (None, b"", ""),
        (None, b"nonsense", ""),
    ],
)
def test_files_that_are_none_are_named(
    authority: Authority, tmp_path: Path, certificate: bytes | None, key: bytes | None, reason: str
) -> None:
    files = authority.sign("relay.example").write(tmp_path / "tls")
    for file, content in zip(files, (certificate, key), strict=True):
        if content is not None:
            file.write_bytes(content)
    with pytest.raises(CertificateError) as caught:
        CertificatePair(settings_of(files))
    assert str(files[0]) in str(caught.value)
    assert reason in str(caught.value)


def test_a_key_with_a_password_is_refused_and_asks_nobody(
    authority: Authority, tmp_path: Path
) -> None:
    files = authority.sign("relay.example").write(tmp_path / "tls")
    key = serialization.load_pem_private_key(files[1].read_bytes(), None)
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(CertificateError, match="the key has a password"):
        load_pair(settings_of(files))


def test_one_file_may_have_both_and_the_minimum_is_kept(
    authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.sign("relay.example").write(tmp_path / "tls")
    certificate.write_bytes(certificate.read_bytes() + key.read_bytes())
    settings = load(SmtpdSettings, tls_certificate=certificate)
    assert load_pair(settings).context.minimum_version == ssl.TLSVersion.TLSv1_2
    settings = load(SmtpdSettings, tls_certificate=certificate, tls_minimum="1.3")
    assert load_pair(settings).context.minimum_version == ssl.TLSVersion.TLSv1_3


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"tls_key": "/k"}, "RELAY_TLS_KEY needs RELAY_TLS_CERTIFICATE"),
        ({"tls_client_ca": "/c"}, "RELAY_TLS_CLIENT_CA needs RELAY_TLS_CERTIFICATE"),
        ({"tls_minimum": "1.1"}, "'1.2' or '1.3'"),
        ({"smtp_listen": ":465/tls"}, ":465/tls needs a certificate: set RELAY_TLS_CERTIFICATE"),
    ],
)
def test_settings_that_lack_a_part_say_what_to_set(values: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        load(SmtpdSettings, **values)


def test_a_client_authority_that_cannot_be_read_is_named(
    authority: Authority, tmp_path: Path
) -> None:
    files = authority.sign("relay.example").write(tmp_path / "tls")
    with pytest.raises(CertificateError, match=f"RELAY_TLS_CLIENT_CA = {tmp_path}/none: No such"):
        load_pair(settings_of(files), tmp_path / "none")


@pytest.mark.parametrize(
    ("days", "verdict", "text"),
    [
        (60, "ok", "ends in 60 days"),
        (5, "warn", "ends in 5 days"),
        (-3, "fail", "ended 3 days"),
    ],
)
def test_check_says_until_when_the_certificate_is_valid(
    authority: Authority, tmp_path: Path, days: float, verdict: str, text: str
) -> None:
    files = authority.sign("relay.example", days=days).write(tmp_path / "tls")
    [result] = check_certificate(settings_of(files))
    assert (result.verdict, text in result.words) == (verdict, True)
    assert bool(result.remedy) == (verdict != "ok")


def test_check_names_a_key_that_other_users_can_read(authority: Authority, tmp_path: Path) -> None:
    files = authority.sign("relay.example").write(tmp_path / "tls")
    files[1].chmod(0o644)
    _, result = check_certificate(settings_of(files))
    assert (result.verdict, str(files[1]) in result.words) == ("warn", True)


def test_check_names_a_pair_that_does_not_fit(authority: Authority, tmp_path: Path) -> None:
    assert list(check_certificate(load(SmtpdSettings))) == []
    files = authority.sign("relay.example").write(tmp_path / "tls")
    authority.sign("relay.example").write(tmp_path / "other")[1].rename(files[1])
    [result] = check_certificate(settings_of(files))
    assert result.verdict == "fail"
    assert "the key does not belong to the certificate" in result.words
    assert str(files[1]) in result.words


def test_a_worker_whose_certificate_is_bad_goes_on_without_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beyond, loopback = (("0.0.0.0", 9151),), (("127.0.0.1", 9151),)
    missing = tmp_path / "chain.pem"
    assert tls.metrics_context(Settings(metrics_listen=beyond)) is None
    settings = Settings(metrics_listen=loopback, tls_certificate=missing)
    assert tls.metrics_context(settings) is None
    context = tls.metrics_context(Settings(metrics_listen=beyond, tls_certificate=missing))
    assert context is not None
    assert "certificate rejected" in capsys.readouterr().out
    with pytest.raises(CertificateError):
        context()


def test_files_are_loaded_again_when_their_time_has_changed(
    authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = authority.sign("relay.example").write(tmp_path / "tls")
    clock = SetClock()
    pair = CertificatePair(settings_of(files), clock=clock)
    for changed in (False, True):
        if changed:
            os.utime(files[1], (time.time(), time.time() + 1))
        for _ in range(2):
            clock.now += tls.CHECK_INTERVAL
            pair.refresh()
        assert ("certificate loaded" in capsys.readouterr().out) == changed
