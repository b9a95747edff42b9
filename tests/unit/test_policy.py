"""Who may relay what to whom."""

import os
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relay.settings import SmtpdSettings, load
from smtpd.addresses import Recipient, Refused
from smtpd.policy import ROOM_KEPT_FREE, Client, Policy, PolicyError, Room, client_networks, connected_networks


def client(tmp_path: Path, peer: str, **settings: Any) -> Client:
    made = load(SmtpdSettings, state_dir=tmp_path, spool_dir=tmp_path, hostname="relay.example", **settings)
    return Policy(made).client(peer)


def refusal(check: Callable[..., None], *arguments: object) -> bytes | None:
    try:
        check(*arguments)
    except Refused as refused:
        return refused.reply
    return None


def to(address: str) -> Recipient:
    return Recipient(address, address, address.rpartition("@")[2])


def test_C28_closed_by_default(tmp_path: Path) -> None:
    assert refusal(client(tmp_path, "127.0.0.1").check_recipient, to("a@b.example"), 0) is None
    assert refusal(client(tmp_path, "::1").check_recipient, to("a@b.example"), 0) is None
    for stranger in ("192.0.2.1", "2001:db8::1", "10.0.0.1"):
        reply = refusal(client(tmp_path, stranger).check_recipient, to("a@b.example"), 0)
        assert reply is not None
        assert reply.startswith(b"554 5.7.1")


@pytest.mark.parametrize(
    ("networks", "peer", "trusted"),
    [
        ("192.0.2.0/24", "192.0.2.77", True),
        ("192.0.2.0/24", "192.0.3.1", False),
        ("192.0.2.0/24, 2001:db8::/32", "2001:db8::9", True),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("fe80::/10", "fe80::1%eth0", True),
        ("", "127.0.0.1", False),
    ],
)
def test_client_networks(tmp_path: Path, networks: str, peer: str, trusted: bool) -> None:
    words = tuple(networks.replace(",", " ").split())
    assert client(tmp_path, peer, client_networks=words).trusted is trusted


def test_the_client_is_named_plainly(tmp_path: Path) -> None:
    assert client(tmp_path, "::ffff:192.0.2.1").address == "192.0.2.1"


@pytest.mark.parametrize(
    ("address", "taken"),
    [
        ("a@example.org", True),
        ("a@EXAMPLE.org", True),
        ("a@sub.example.org", False),
        ("a@example.net", False),
        ("a@x.example.net", True),
        ("a@notexample.net", False),
        ("a@example.org@evil.example", False),
        ("postmaster@relay.example", True),
        ("other@relay.example", False),
    ],
)
def test_recipient_domains_are_open_to_all(tmp_path: Path, address: str, taken: bool) -> None:
    stranger = client(tmp_path, "192.0.2.1", recipient_domains=("Example.ORG", ".example.net"))
    assert (refusal(stranger.check_recipient, to(address), 0) is None) is taken


def test_C16_past_the_limit_452_for_the_extra_recipients_only(tmp_path: Path) -> None:
    trusted = client(tmp_path, "127.0.0.1", max_recipients=100)
    assert refusal(trusted.check_recipient, to("a@b"), 99) is None
    assert (refusal(trusted.check_recipient, to("a@b"), 100) or b"").startswith(b"452 4.5.3")


def test_C12_a_declared_size_over_the_limit_is_refused_at_mail(tmp_path: Path) -> None:
    trusted = client(tmp_path, "127.0.0.1", max_message_size=1000)
    assert refusal(trusted.check_sender, 1000) is None
    assert (refusal(trusted.check_sender, 1001) or b"").startswith(b"552 5.3.4")


def test_C22_no_room_is_452_at_mail_and_asked_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, free, asked = 100.0, ROOM_KEPT_FREE + 1000, 0

    def statvfs(_path: Path) -> SimpleNamespace:
        nonlocal asked
        asked += 1
        return SimpleNamespace(f_files=10, f_favail=5, f_bavail=free, f_frsize=1)

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr("smtpd.policy.time.monotonic", lambda: now)
    sender = client(tmp_path, "127.0.0.1")
    assert refusal(sender.check_sender, 1000) is None
    assert (refusal(sender.check_sender, 1001) or b"").startswith(b"452 4.3.1")
    free = 0
    assert refusal(sender.check_sender, 0) is None
    assert asked == 1
    now += 1.0
    assert (refusal(sender.check_sender, 0) or b"").startswith(b"452 4.3.1")
    assert asked == 2


def test_room_without_files_left_or_without_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Room(tmp_path / "nowhere").holds(1)
    found = SimpleNamespace(f_files=10, f_favail=0, f_bavail=1 << 40, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda _path: found)
    assert not Room(tmp_path).holds(1)


@pytest.mark.parametrize("publish", ["", "127.0.0.1:2525", "[::1]:25", "localhost:2525"])
def test_connected_means_our_own_subnets(publish: str) -> None:
    networks = client_networks(["connected", "192.0.2.0/24"], publish)
    assert ip_network("127.0.0.0/8") in networks
    assert ip_network("192.0.2.0/24") in networks
    assert set(connected_networks()) < set(networks) | {ip_network("192.0.2.0/25")}


@pytest.mark.parametrize("publish", ["2525", "0.0.0.0:2525", "192.0.2.1:25", "[::]:25", "mail.example:25"])
def test_connected_is_refused_for_a_published_port(publish: str) -> None:
    with pytest.raises(PolicyError, match=r"RELAY_CLIENT_NETWORKS.*RELAY_PUBLISH"):
        client_networks(["connected"], publish)
