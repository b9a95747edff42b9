"""`check` and QMQP servers: a server that accepts a connection may still reject the mail of the
relay."""

import json
import socket
from pathlib import Path

import pytest

from qmqp import probe
from qmqp.sink import running_sink
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness
from tests.integration.test_probe import speaking
from tests.integration.typed import lines, typed_at
from tests.postfix import Postfix


def verdicts_on(
    queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch, *servers: str
) -> dict[str, tuple[str, str]]:
    """The verdict on each of these servers, and its text."""
    monkeypatch.setattr(probe, "REFUSAL_DELAY", 0.3)
    monkeypatch.setenv("RELAY_QMQP_SERVERS", ",".join(servers))
    typed = typed_at(queue, spool, monkeypatch)
    rows = [json.loads(line) for line in typed("check", "--json", status=None).stdout.splitlines()]
    what = "QMQP server "
    return {
        row["what"].removeprefix(what): (row["verdict"], row["words"])
        for row in rows
        if row["what"].startswith(what)
    }


def test_servers_that_do_not_authorize_the_relay_or_are_out_of_reach_fail(
    queue: QueueHarness,
    spool: Spool,
    postfix: Postfix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = str(tmp_path / "qmqp")
    with (
        running_sink(path=path) as sink,
        speaking(b"", close=True) as (denied, _),
        speaking(b"220 mx ESMTP\r\n") as (smtp, _),
        socket.socket() as closed,
    ):
        closed.bind(("127.0.0.1", 0))
        ports = (postfix.port, postfix.closed_port, denied, smtp, closed.getsockname()[1])
        names = [f"127.0.0.1:{port}" for port in ports]
        verdicts = verdicts_on(queue, spool, monkeypatch, *names, f"unix:{path}")
        assert sink.count == 0
    assert [verdicts[name][0] for name in names] == ["ok", "fail", "fail", "fail", "away"]
    assert verdicts[f"unix:{path}"][0] == "ok"
    assert "accepts connections from this machine (postfix)" in verdicts[names[0]][1]
    assert "is not authorized to use this service" in verdicts[names[1]][1]
    assert "closed before anything was sent" in verdicts[names[2]][1]
    assert "did not send a QMQP reply" in verdicts[names[3]][1]
    assert "Connection refused" in verdicts[names[4]][1]


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite:////nowhere/relay.db"])
def test_unusable_database_url_fails_with_a_remedy(
    queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    typed = typed_at(queue, spool, monkeypatch)
    monkeypatch.setenv("RELAY_DATABASE_URL", url)
    rows = lines(typed("check", "--json", status=None))
    (database,) = (row for row in rows if row["what"] == "database")
    assert (database["verdict"], "correct RELAY_DATABASE_URL" in database["remedy"]) == (
        "fail",
        True,
    )
