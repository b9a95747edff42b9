"""The policy: which client may send to which recipient, and in how much space."""

import os
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reception.envelope import Recipient, Refused
from reception.policy import (
    ClientPolicy,
    Policy,
    client_networks,
    connected_networks,
    qmqp_networks,
)
from reception.space import FreeSpace, SpaceClaim
from relay.settings import SettingsError, SmtpdSettings, load
from relay.spool.journal.supply import MIN_FREE
from smtpd.addresses import parse_recipient


def client(tmp_path: Path, peer: str, **settings: Any) -> ClientPolicy:
    made = load(
        SmtpdSettings, state_dir=tmp_path, spool_dir=tmp_path, hostname="relay.example", **settings
    )
    return Policy(made).client(peer)


def refusal(check: Callable[..., None], *arguments: object) -> str | None:
    try:
        check(*arguments)
    except Refused as refused:
        return str(refused)
    return None


def to(address: str) -> Recipient:
    return Recipient(address, address, address.rpartition("@")[2])


def test_C28_closed_by_default(tmp_path: Path) -> None:
    assert refusal(client(tmp_path, "127.0.0.1").check_recipient, to("a@b.example"), 0) is None
    assert refusal(client(tmp_path, "::1").check_recipient, to("a@b.example"), 0) is None
    for stranger in ("192.0.2.1", "2001:db8::1", "10.0.0.1"):
        reply = refusal(client(tmp_path, stranger).check_recipient, to("a@b.example"), 0)
        assert reply is not None
        assert reply.startswith("554 5.7.1")


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
    entries = tuple(networks.replace(",", " ").split())
    assert client(tmp_path, peer, client_networks=entries).trusted is trusted


def test_an_ipv4_mapped_address_is_shown_as_ipv4(tmp_path: Path) -> None:
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


ROUTED = [
    b"<victim%evil.test@allowed.test>",
    b"<evil.test!victim@allowed.test>",
    b'<"victim@evil.test"@allowed.test>',
    b'<"victim%evil.test"@allowed.test>',
    b'<"victim\\@evil.test"@allowed.test>',
    b"<@allowed.test:victim%evil.test@allowed.test>",
    b"<victim%evil.test@relay.example>",
    b"<a%b%c@sub.below.test>",
]


@pytest.mark.parametrize("path", ROUTED)
def test_untrusted_clients_may_not_use_routing_in_a_local_part(tmp_path: Path, path: bytes) -> None:
    recipient = parse_recipient(b"TO:" + path, "relay.example")
    domains = ("allowed.test", ".below.test", "relay.example")
    stranger = client(tmp_path, "192.0.2.1", recipient_domains=domains)
    assert (refusal(stranger.check_recipient, recipient, 0) or "").startswith("550 5.7.1")
    assert refusal(client(tmp_path, "127.0.0.1").check_recipient, recipient, 0) is None
    allowing = client(
        tmp_path, "192.0.2.1", recipient_domains=domains, allow_untrusted_routing=True
    )
    assert refusal(allowing.check_recipient, recipient, 0) is None


@pytest.mark.parametrize(
    "path", [b"<a+b=c.test@allowed.test>", b'<"a b"@allowed.test>', b"<postmaster>"]
)
def test_untrusted_clients_may_use_unusual_local_parts(tmp_path: Path, path: bytes) -> None:
    stranger = client(tmp_path, "192.0.2.1", recipient_domains=("allowed.test",))
    assert (
        refusal(stranger.check_recipient, parse_recipient(b"TO:" + path, "relay.example"), 0)
        is None
    )


@pytest.mark.parametrize(
    "path", [b"<a@[192.0.2.9]>", b"<@allowed.test:a@evil.test>", b"<postmaster@[127.0.0.1]>"]
)
def test_neither_a_literal_nor_a_source_route_leads_past_the_domains(
    tmp_path: Path, path: bytes
) -> None:
    stranger = client(
        tmp_path, "192.0.2.1", recipient_domains=("allowed.test",), allow_untrusted_routing=True
    )
    reply = refusal(stranger.check_recipient, parse_recipient(b"TO:" + path, "relay.example"), 0)
    assert (reply or "").startswith("554 5.7.1")


def test_C16_past_the_limit_452_for_the_extra_recipients_only(tmp_path: Path) -> None:
    trusted = client(tmp_path, "127.0.0.1", max_recipients=100)
    assert refusal(trusted.check_recipient, to("a@b"), 99) is None
    assert (refusal(trusted.check_recipient, to("a@b"), 100) or "").startswith("452 4.5.3")


@pytest.mark.parametrize(
    ("peer", "setting", "strips"),
    [("127.0.0.1", "strip", True), ("127.0.0.1", "reject", False), ("192.0.2.1", "strip", False)],
)
def test_bare_crs_are_stripped_for_trusted_clients_alone(
    tmp_path: Path, peer: str, setting: str, strips: bool
) -> None:
    assert client(tmp_path, peer, bare_cr=setting).strips_cr is strips
    assert not client(tmp_path, peer).strips_cr


def test_C22_no_space_is_452_at_mail_and_measured_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, free, asked = 100.0, MIN_FREE + 1000, 0

    def statvfs(_path: Path) -> SimpleNamespace:
        nonlocal asked
        asked += 1
        return SimpleNamespace(f_files=10, f_favail=5, f_bavail=free, f_frsize=1)

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr("reception.space.time.monotonic", lambda: now)
    sender = client(tmp_path, "127.0.0.1")
    assert refusal(sender.check_sender, "", 1000) is None
    assert (refusal(sender.check_sender, "", 1001) or "").startswith("452 4.3.1")
    free = 0
    assert refusal(sender.check_sender, "", 0) is None
    assert asked == 1
    now += 1.0
    assert (refusal(sender.check_sender, "", 0) or "").startswith("452 4.3.1")
    assert asked == 2


def test_space_without_inodes_or_without_a_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert FreeSpace(tmp_path / "nowhere").has(1)
    found = SimpleNamespace(f_files=10, f_favail=0, f_bavail=1 << 40, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda _path: found)
    assert not FreeSpace(tmp_path).has(1)


class FakeDisk:
    """A file system with `free` octets, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free, self.now = MIN_FREE + free, 100.0
        monkeypatch.setattr(os, "statvfs", self._statvfs)
        monkeypatch.setattr("reception.space.time.monotonic", lambda: self.now)

    def _statvfs(self, _path: Path) -> SimpleNamespace:
        return SimpleNamespace(f_files=0, f_favail=0, f_bavail=self.free, f_frsize=1)


def claimed(space: FreeSpace, size: int, network: str) -> SpaceClaim:
    made = SpaceClaim(space, network)
    made.reserve(size)
    return made


def test_unfinished_messages_of_untrusted_networks_take_a_quarter_each_and_leave_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, space = FakeDisk(monkeypatch, 4000), FreeSpace(tmp_path)
    assert space.has(1000, "a")
    assert not space.has(1001, "a")
    claims = [claimed(space, 1000, one) for one in "abc"]
    assert not space.has(1, "a")
    assert not space.has(1, "d"), "the last quarter is for clients that are trusted"
    assert space.has(1000)
    assert not space.has(1001)
    claims[0].end()
    disk.now += 1.0
    assert space.has(1000, "d")
    assert space.has(2000)


def test_octets_are_counted_once_in_memory_or_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, space = FakeDisk(monkeypatch, 4000), FreeSpace(tmp_path)
    claim = claimed(space, 0, "")
    assert claim.grow(3000)
    claim.store(2000)
    disk.free -= 2000
    assert space.has(1000), "before the next measurement"
    assert not space.has(1001)
    disk.now += 1.0
    assert space.has(1000), "and after it"
    assert not space.has(1001)
    assert not claim.grow(1001)
    assert space.has(250, "a")
    assert space.has(1000, "a"), "the quarter is one of the space without unfinished messages"


def test_the_declared_size_is_claimed_and_further_octets_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeDisk(monkeypatch, 4000)
    space = FreeSpace(tmp_path)
    claim = claimed(space, 3000, "")
    assert not space.has(1001)
    assert claim.grow(3000)
    assert space.has(1000)
    assert claim.grow(1000)
    assert not claim.grow(1)
    assert not SpaceClaim(space, "").reserve(1)


def test_a_discarded_message_is_free_at_once_and_a_finished_one_at_the_next_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, space = FakeDisk(monkeypatch, 4000), FreeSpace(tmp_path)
    for _ in range(5):  # claims that begin and end do not add up until the next measurement
        claimed(space, 3000, "").end()
        assert space.has(4000)
    kept = claimed(space, 2000, "")
    assert kept.grow(1500)
    kept.end(kept=True)
    kept.end()
    assert space.has(2500)
    assert not space.has(2501)
    disk.free, disk.now = disk.free - 1500, disk.now + 1.0
    gone = claimed(space, 1000, "")
    assert gone.grow(1000)
    gone.store(1000)
    disk.free, disk.now = disk.free - 1000, disk.now + 1.0
    assert not space.has(1501)
    gone.end()
    assert not space.has(1501), "its file may be there yet"
    disk.free, disk.now = disk.free + 1000, disk.now + 1.0
    assert space.has(2500)


def test_a_client_is_counted_by_its_network(tmp_path: Path) -> None:
    first, second = client(tmp_path, "2001:db8::1"), client(tmp_path, "2001:db8::ffff:1")
    assert first.network == second.network == "2001:db8::/64"
    assert client(tmp_path, "2001:db8:0:1::1").network == "2001:db8:0:1::/64"
    assert (
        client(tmp_path, "192.0.2.1").network
        == client(tmp_path, "::ffff:192.0.2.1").network
        == "192.0.2.1"
    )


@pytest.mark.parametrize("publish", ["", "127.0.0.1:2525", "[::1]:25", "localhost:2525"])
def test_connected_means_the_subnets_of_this_machine(publish: str) -> None:
    networks = client_networks(["connected", "192.0.2.0/24"], publish)
    assert ip_network("127.0.0.0/8") in networks
    assert ip_network("192.0.2.0/24") in networks
    assert set(connected_networks()) < set(networks) | {ip_network("192.0.2.0/25")}


@pytest.mark.parametrize(
    "publish", ["2525", "0.0.0.0:2525", "192.0.2.1:25", "[::]:25", "mail.example:25"]
)
def test_connected_is_refused_for_a_published_port(publish: str) -> None:
    with pytest.raises(SettingsError, match=r"RELAY_CLIENT_NETWORKS.*RELAY_PUBLISH"):
        client_networks(["connected"], publish)
    settings = load(
        SmtpdSettings,
        hostname="relay.example",
        qmqp_client_networks=("connected",),
        qmqp_publish=publish,
    )
    with pytest.raises(SettingsError, match=r"RELAY_QMQP_CLIENT_NETWORKS.*RELAY_QMQP_PUBLISH"):
        qmqp_networks(settings)


def test_the_networks_of_qmqp_are_its_own(tmp_path: Path) -> None:
    settings = load(
        SmtpdSettings,
        spool_dir=tmp_path,
        hostname="relay.example",
        client_networks=("192.0.2.0/24",),
        qmqp_client_networks=("198.51.100.0/24",),
    )
    smtp = Policy(settings)
    qmqp = Policy(settings, qmqp_networks(settings), smtp.space)
    assert smtp.client("192.0.2.1").trusted
    assert not smtp.client("198.51.100.1").trusted
    assert qmqp.client("198.51.100.1").trusted
    assert not qmqp.client("192.0.2.1").trusted
    assert qmqp.space is smtp.space, "both fill one spool"
