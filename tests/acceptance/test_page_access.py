"""Who may use the page: logins, sessions, tokens of forms, and the header of a trusted proxy."""

import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.requests import Request

from commands.web import app as web
from commands.web.access import COOKIE, Access
from relay import passwords
from relay.queue.states import State
from relay.settings import Settings, SettingsError, SmtpdSettings, load
from relay.spool.store import Spool
from relay.tls import CertificatePair
from relay.users import Role, Users
from tests.acceptance.console import Browser, browsing, hidden
from tests.certificates import Authority
from tests.integration.harness import QueueHarness, opened
from tests.integration.typed import typed_at
from tests.waiting import until

PASSWORD = "correct horse"
HASH = passwords.hash_new(PASSWORD)
ACTOR = "me@here"


@pytest.fixture
def queue(clean_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Iterator[QueueHarness]:
    with opened(clean_url) as queue:
        typed_at(queue, spool, monkeypatch)
        yield queue


@pytest.fixture
def users(queue: QueueHarness) -> Users:
    """Ann is an operator, vic a viewer, and sam may only send."""
    users = Users(queue.database)
    for name, role in (("ann", Role.OPERATOR), ("vic", Role.VIEWER), ("sam", Role.SENDER)):
        users.add(name, HASH, role=role, actor=ACTOR)
    return users


@pytest.fixture
def browser(queue: QueueHarness) -> Iterator[Browser]:
    with browsing(queue) as browser:
        yield browser


def cookie(browser: Browser) -> str:
    [one] = browser.cookies
    return f"{one.name}={one.value}"


def test_without_users_the_page_is_open_and_read_only(
    queue: QueueHarness, browser: Browser
) -> None:
    queue_id = queue.accept()
    Users(queue.database).add("sam", HASH, role=Role.SENDER, actor=ACTOR)
    for path in ("/", "/search", f"/message/{queue_id}", "/operators"):
        page = browser.get(path)
        assert page.status == 200
        assert "/act/" not in page.text
        assert "Log out" not in page.text
    for path in (f"/act/hold?id={queue_id}", f"/message/{queue_id}/header"):
        assert browser.get(path).status == 403
    for name in ("hold", "drop", "pause"):
        assert browser.post(f"/act/{name}", id=queue_id, reason="x", expected="1").status == 403
    assert queue.state(queue_id) == State.QUEUED


def test_a_login_leads_to_the_page_that_was_asked_for(users: Users, browser: Browser) -> None:
    page = browser.log_in("Ann", PASSWORD, "/search?sender=a%26b%40example.com&state=held")
    assert (page.status, page.url) == (200, "/search?sender=a%26b%40example.com&state=held")
    assert "ann, operator" in page.visible_text
    page = browser.post("/logout", token=hidden(page, "token"))
    assert page.url == "/login"
    assert browser.get("/").url == "/login"


@pytest.mark.parametrize(
    "address",
    ["//evil.example/", "https://evil.example/", "/\\evil.example", "/login", "x", "/\t/a"],
)
def test_a_login_leads_to_no_other_site(users: Users, browser: Browser, address: str) -> None:
    page = browser.post("/login", name="ann", password=PASSWORD, next=address)
    assert (page.status, page.url) == (200, "/")


def test_a_viewer_reads_and_does_not_act(
    queue: QueueHarness, users: Users, browser: Browser
) -> None:
    queue_id = queue.accept()
    page = browser.log_in("vic", PASSWORD, f"/message/{queue_id}")
    assert "vic, viewer" in page.visible_text
    assert "/act/" not in page.text + browser.get("/search").text + browser.get("/").text
    assert "Header of" not in page.text
    for path in (f"/act/hold?id={queue_id}", f"/message/{queue_id}/header"):
        refused = browser.get(path)
        assert (refused.status, "role operator" in refused.visible_text) == (403, True)
    form = {"id": queue_id, "reason": "x", "expected": "1", "token": hidden(page, "token")}
    assert browser.post("/act/hold", **form).status == 403
    assert queue.state(queue_id) == State.QUEUED


def test_a_login_that_is_not_right_opens_nothing(users: Users, browser: Browser) -> None:
    """Each takes as long as for smtpd, so they run at once."""
    users.add("gone", HASH, role=Role.OPERATOR, actor=ACTOR)
    users.disable("gone", actor=ACTOR)
    wrong = [("ann", "wrong"), ("sam", PASSWORD), ("gone", PASSWORD), ("nix", PASSWORD), ("\0", "")]

    def status(given: tuple[str, str]) -> tuple[int, str]:
        another = Browser(browser.root)
        page = another.post("/login", name=given[0], password=given[1])
        assert not list(another.cookies)
        return page.status, page.visible_text

    with ThreadPoolExecutor(len(wrong)) as pool:
        pages = list(pool.map(status, wrong))
    assert [code for code, _ in pages] == [403] * len(wrong)
    assert all("The user or the password is wrong" in text for _, text in pages)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(status, [("ann", "wrong")] * 5))
    code, text = status(("ann", PASSWORD))
    assert (code, "Too many logins" in text) == (429, True), "even the right one tells nothing"


def test_cookie_is_for_this_site_and_no_script(users: Users, browser: Browser) -> None:
    page = browser.get("/login")
    assert page.status == 200
    with socket.create_connection(("127.0.0.1", int(browser.root.rpartition(":")[2]))) as client:
        body = f"name=ann&password={PASSWORD.replace(' ', '+')}&next=/".encode()
        client.sendall(
            b"POST /login HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/x-www-form-urlencoded\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        reply = b""
        while data := client.recv(65536):
            reply += data
    found = re.search(rb"(?im)^set-cookie: (.*)\r$", reply)
    assert found is not None
    value, *attributes = found[1].decode().split("; ")
    assert value.startswith(f"{COOKIE}=")
    assert sorted(map(str.lower, attributes)) == ["httponly", "path=/", "samesite=strict"]


def test_cookie_is_secure_over_tls(queue: QueueHarness, users: Users, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.sign("127.0.0.1").write(tmp_path / "tls")
    settings = load(SmtpdSettings, tls_certificate=certificate, tls_key=key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = web.server(queue.database, settings, CertificatePair(settings))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        until(lambda: server.started, what="the page is served")
        root = f"https://127.0.0.1:{listener.getsockname()[1]}"
        browser = Browser(root, authority.client_context())
        assert "ann, operator" in browser.log_in("ann", PASSWORD).visible_text
        [one] = browser.cookies
        assert one.secure
        server.should_exit = True
        thread.join(10)


@pytest.mark.parametrize(
    "end",
    [
        lambda users: users.disable("ann", actor=ACTOR),
        lambda users: users.remove("ann", actor=ACTOR),
        lambda users: users.set_password("ann", passwords.hash_new("another one"), actor=ACTOR),
    ],
    ids=["disabled", "removed", "new password"],
)
def test_a_session_ends_with_its_user(
    users: Users, browser: Browser, end: Callable[[Users], bool]
) -> None:
    page = browser.log_in("ann", PASSWORD)
    token = hidden(page, "token")
    assert end(users)
    assert browser.get("/").url == "/login"
    refused = browser.post("/act/pause", route="default", reason="x", token=token)
    assert (refused.status, "session has ended" in refused.visible_text) == (403, True)


def test_a_session_ends_in_time(
    queue: QueueHarness, users: Users, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELAY_WEB_SESSION", "1s")
    with browsing(queue) as browser:
        browser.log_in("ann", PASSWORD)
        until(lambda: browser.get("/search").url.startswith("/login"), what="the session is over")


def test_a_cookie_that_was_logged_out_or_changed_is_refused(users: Users, browser: Browser) -> None:
    page = browser.log_in("ann", PASSWORD)
    sent = cookie(browser)
    another = Browser(browser.root)
    assert "ann, operator" in another.get("/", Cookie=sent).visible_text
    name, issued, number, signature = sent.partition("=")[2].split(".")
    vic = b"vic".hex()
    changed = [
        f"{vic}.{issued}.{number}.{signature}",
        f"{name}.{int(issued) + 60}.{number}.{signature}",
        f"{name}.{int(issued) - 1}.{number}.{signature}",
        f"{name}.{issued}.{number[:-1]}0a.{signature}",
        f"{name}.{issued}.{number}.{'0' * len(signature)}",
        f"{name}.{issued}.{number}.",
        "zz.1.2.3",
        "....",
        "\xff",
        "",
    ]
    for value in changed:
        assert another.get("/", Cookie=f"{COOKIE}={value}").url == "/login", value
    browser.post("/logout", token=hidden(page, "token"))
    assert another.get("/", Cookie=sent).url == "/login"


def test_a_form_needs_the_token_of_its_session(
    queue: QueueHarness, users: Users, browser: Browser
) -> None:
    queue_id = queue.accept()
    page = browser.log_in("ann", PASSWORD)
    another = Browser(browser.root)
    theirs = hidden(another.log_in("ann", PASSWORD), "token")
    form = {"id": queue_id, "reason": "x", "expected": "1"}
    for token in ({}, {"token": ""}, {"token": theirs}, {"token": "\xe9"}):
        assert browser.post("/act/hold", **form, **token).status == 403
    assert browser.post("/logout", token=theirs).status == 403
    assert queue.state(queue_id) == State.QUEUED
    right = form | {"token": hidden(page, "token")}
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": browser.root},
    ):
        assert browser.post("/act/hold", headers, **right).status == 403
        assert browser.post("/login", headers, name="ann", password=PASSWORD).status == 403
    assert queue.state(queue_id) == State.QUEUED
    assert browser.post("/act/hold", {"Origin": browser.root}, **right).status == 200
    assert queue.state(queue_id) == State.HELD


def test_a_form_is_bounded(users: Users, browser: Browser) -> None:
    assert browser.post("/login", name="a" * 70_000).status == 413
    assert browser.post("/login", **{f"f{n}": "" for n in range(101)}).status == 400
    assert browser.post("/login", {"Content-Type": "multipart/form-data"}, name="a").status == 415


@pytest.fixture
def proxied(
    queue: QueueHarness, users: Users, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Browser]:
    monkeypatch.setenv("RELAY_WEB_USER_HEADER", "X-Remote-User")
    monkeypatch.setenv("RELAY_WEB_PROXY_NETWORKS", "127.0.0.1")
    with browsing(queue) as browser:
        yield browser


def test_a_trusted_proxy_names_the_user(queue: QueueHarness, proxied: Browser) -> None:
    queue_id = queue.accept()
    page = proxied.get("/", **{"X-Remote-User": "Ann"})
    assert "ann, operator" in page.visible_text
    assert "Log out" not in page.text
    preview = proxied.get(f"/act/hold?id={queue_id}", **{"X-Remote-User": "ann"})
    form = {"id": queue_id, "reason": "x", "expected": "1", "token": hidden(preview, "token")}
    assert proxied.post("/act/hold", {"X-Remote-User": "vic"}, **form).status == 403
    assert proxied.post("/act/hold", {"X-Remote-User": "ann"}, **form).status == 200
    assert queue.state(queue_id) == State.HELD
    for name in ("sam", "nix", "", "\xe9", "ann, vic"):
        refused = proxied.get("/", **{"X-Remote-User": name})
        assert (refused.status, "names no user" in refused.visible_text) == (403, True), name
    assert proxied.get("/").url == "/login", "without the header a password opens the page"


def test_failures_count_for_the_client_that_a_proxy_names(proxied: Browser) -> None:
    def status(client: str, password: str) -> int:
        headers = {"X-Forwarded-For": f"198.51.100.1, {client}"}
        another = Browser(proxied.root)
        return another.post("/login", headers, name="ann", password=password).status

    with ThreadPoolExecutor(10) as pool:
        tried = list(pool.map(status, ["203.0.113.1"] * 10, ["wrong"] * 10))
    assert tried == [403] * 10
    assert status("203.0.113.1", PASSWORD) == 429
    assert status("203.0.113.2", PASSWORD) == 200


def test_the_header_of_another_client_is_refused(
    queue: QueueHarness, users: Users, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELAY_WEB_USER_HEADER", "X-Remote-User")
    monkeypatch.setenv("RELAY_WEB_PROXY_NETWORKS", "192.0.2.0/24")
    with browsing(queue) as browser:
        for path in ("/", "/search", "/events"):
            refused = browser.get(path, **{"X-Remote-User": "ann"})
            assert (refused.status, "from a proxy only" in refused.visible_text) == (403, True)
        forwarded = {"X-Remote-User": "ann", "X-Forwarded-For": "192.0.2.1"}
        assert browser.get("/", **forwarded).status == 403, "the peer counts, not what it says"
        browser.log_in("ann", PASSWORD)
        assert browser.get("/", **{"X-Remote-User": "ann"}).status == 403


def test_a_header_needs_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_WEB_USER_HEADER", "X-Remote-User")
    with pytest.raises(SettingsError, match="needs RELAY_WEB_PROXY_NETWORKS"):
        load(Settings)
    monkeypatch.setenv("RELAY_WEB_USER_HEADER", "X Remote")
    with pytest.raises(SettingsError, match="is not the name of a header: write X-Remote-User"):
        load(Settings)


@pytest.mark.parametrize(
    ("peer", "headers", "takes", "secure"),
    [
        ("127.0.0.1", {}, True, False),
        ("::1", {}, True, False),
        ("203.0.113.7", {}, False, False),
        ("203.0.113.7", {"x-forwarded-proto": "https"}, False, False),
        ("192.0.2.1", {}, True, False),
        ("192.0.2.1", {"x-forwarded-proto": "https"}, True, True),
    ],
)
def test_a_password_is_taken_where_no_other_can_read_it(
    queue: QueueHarness, peer: str, headers: dict[str, str], takes: bool, secure: bool
) -> None:
    access = Access(queue.database, load(Settings, web_proxy_networks=("192.0.2.1",)))
    request = Request(
        {
            "type": "http",
            "scheme": "http",
            "server": ("192.0.2.9", 80),
            "path": "/login",
            "client": (peer, 1),
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    assert access.takes_passwords(request) is takes
    assert access.is_secure(request) is secure
