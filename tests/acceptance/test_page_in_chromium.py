"""The pages in a real browser, wide and narrow, light and dark, with hostile text everywhere."""

import json
import os
import select
import shutil
import subprocess
import threading
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from relay import passwords
from relay.queue.operations import QueueOperations
from relay.queue.outcome import Outcome
from relay.report.queries import QueueReader
from relay.report.records import WorkerRow
from relay.spool.store import Spool
from relay.users import Role, Users
from tests.acceptance.console import HOSTILE, LONG, Browser, Scenario, browsing, scenario
from tests.integration.harness import opened
from tests.integration.typed import typed_at
from tests.services import end, spawn
from tests.waiting import until

REPLY = (
    "451 4.7.1 <somebody-else@mail-cluster-west.example.net>: greylisted by policy-daemon-2, see"
    " http://x.example/a-b"
)
PEOPLE = (
    "firstname.lastname-billing@mail-cluster-west.example.com",
    "some-body@a-sub-domain.of-a.example.org",
)
PASSWORD = "correct horse"
HASH = passwords.hash_new(PASSWORD)
AXE = files("axe_core_python").joinpath("axe.min.js").read_text()
# The rules of axe-core that a page breaks, with the elements: all rules, or those about colours.
ALL_RULES = """axe.run(document, {resultTypes: ['violations']}).then(found => found.violations
    .map(rule => rule.id + ': ' + rule.nodes.map(node => node.html.slice(0, 120)).join(' | ')))"""
RULES_OF_COLOUR = ALL_RULES.replace("{", "{runOnly: ['color-contrast', 'link-in-text-block'], ", 1)
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# The text of elements whose contrast is less than WCAG 2.1 requires (section 1.4.3).
FAINT = """(() => {
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        return 0.2126*r + 0.7152*g + 0.0722*b }
    const behind = e => { const c = getComputedStyle(e).backgroundColor;
        return c == 'rgba(0, 0, 0, 0)' ? behind(e.parentElement) : c }
    return [...document.querySelectorAll('main *, nav *')]
        .filter(e => e.innerText?.trim() && !e.closest('svg'))
        .filter(e => {
            const both = [light(getComputedStyle(e).color), light(behind(e))]
            const [a, b] = both.sort((x, y) => y - x)
            return (a + 0.05) / (b + 0.05) < 4.5 })
        .map(e => e.className + ': ' + e.innerText.slice(0, 40)) })()"""


# Elements that do not fit: boxes that hide a part of their content, and elements beyond the right
# edge of the screen.
HIDDEN = """[...document.querySelectorAll('main *')]
    .filter(e => e.clientWidth && !e.closest('input, select, .unseen'))
    .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline'
        || e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < 0)
    .map(e => e.tagName + '.' + e.className.toString() + ': ' + e.textContent.slice(0, 40))"""
# Lines that end at a hyphen within a word.
TORN = """(() => { const found = [], range = document.createRange()
    const at = (n, i) => { range.setStart(n, i); range.setEnd(n, i + 1)
        return range.getBoundingClientRect().top }
    for (const e of document.querySelectorAll('main th, main td, main p, main dd, main .words')) {
        const all = [], walk = document.createTreeWalker(e, NodeFilter.SHOW_TEXT)
        while (walk.nextNode())
            for (let i = 0; i < walk.currentNode.data.length; i++) all.push([walk.currentNode, i])
        all.forEach(([n, i], k) => { const [m, j] = all[k + 1] ?? [null, 0]
            if (n.data[i] == '-' && m && /\\S/.test(m.data[j]) && at(m, j) > at(n, i) + 5)
                found.push(e.textContent.slice(0, 60)) }) }
    return found })()"""


class Chromium:
    """A browser that is spoken to in its own protocol, over pipes."""

    def __init__(self, program: str, directory: str) -> None:
        (theirs, self._to), (self._from, answers) = os.pipe(), os.pipe()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
        ]
        options.append(f"--user-data-dir={directory}")
        self.child = spawn(
            ["bash", "-c", f'exec "$0" "$@" 3<&{theirs} 4>&{answers}', program, *options],
            pass_fds=(theirs, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(answers)
        self._read, self._number, self._session = b"", 0, {}
        self.loads = 0  # pages that were loaded
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {
            "sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)[
                "sessionId"
            ]
        }
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        command = {"id": self._number, "method": method, "params": params} | self._session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        while (message := self._read_message()).get("id") != self._number:
            pass
        return message["result"]

    def until_loaded(self, before: int) -> None:
        """Wait until more pages were loaded than `before`."""
        while self.loads == before:
            self._read_message()

    def _read_message(self) -> Any:
        while b"\0" not in self._read:
            assert select.select([self._from], [], [], 30)[0], "the browser sends nothing"
            more = os.read(self._from, 1 << 16)
            assert more, "the browser has ended"
            self._read += more
        one, _, self._read = self._read.partition(b"\0")
        message = json.loads(one)
        assert message.get("method") != "Page.javascriptDialogOpening", "a script of a peer runs"
        self.loads += message.get("method") == "Page.loadEventFired"
        return message

    def look(self, url: str, width: int, scheme: str) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        before = self.loads
        self.call("Page.navigate", url=url)
        self.until_loaded(before)

    def tells(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)[
            "result"
        ].get("value")

    def answers(self, expression: str) -> Any:
        """The value of a promise."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def log_in(self, browser: Browser, name: str, password: str) -> None:
        """Take over the session of a login."""
        browser.log_in(name, password)
        for one in browser.cookies:
            self.call("Network.setCookie", name=one.name, value=one.value, url=browser.root)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no chromium on this machine")
    browser = Chromium(program, str(tmp_path_factory.mktemp("chromium")))
    yield browser
    end(browser.child)


@pytest.fixture
def seen(
    sqlite_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Scenario, Browser]]:
    with opened(sqlite_url) as queue:
        typed_at(queue, spool, monkeypatch)
        created = scenario(queue, spool)
        usual = queue.accept(PEOPLE[1], sender=PEOPLE[0])
        queue.complete(queue.claim(usual)[0], Outcome.DEFERRED, reply=REPLY)
        created.add("deferred", usual)
        queue.change(
            "INSERT INTO open_circuits (worker, server, why) VALUES (@id(:id),"
            " 'qmqp-2.mail-cluster-west.example.net:628', 'it is-away')",
            id=queue.worker,
        )
        with browsing(queue) as browser:
            yield created, browser


@pytest.mark.parametrize(
    ("width", "scheme"),
    [(360, "light"), (375, "dark"), (800, "light"), (1280, "light"), (1280, "dark")],
)
def test_page_fits_the_screen_and_shows_its_content(
    chromium: Chromium, seen: tuple[Scenario, Browser], width: int, scheme: str
) -> None:
    created, browser = seen
    shown = {
        "/": "The oldest unfinished message",
        "/search": HOSTILE[-9:],
        f"/search?sender={LONG}": "sub.example.com",
        "/search?sender=unknown": "No mail matches",
        "/nothing": "Not found",
        "/search?id=zz": "is not a queue id",
    } | {f"/message/{ids[-1]}": state for state, ids in created.ids.items()}
    for path, expected in shown.items():
        chromium.look(browser.root + path, width, scheme)
        assert expected in chromium.tells("document.body.innerText"), path
        assert chromium.tells("document.documentElement.scrollWidth") <= width, (
            f"{path} runs out of the screen"
        )
        assert chromium.tells(HIDDEN) == [], path
        assert chromium.tells(TORN) == [], path
        assert chromium.tells(FAINT) == [], path
        assert chromium.tells("document.querySelectorAll('th:not([scope])').length") == 0, path
        assert chromium.tells("[...document.scripts].map(e => e.getAttribute('src'))") == [
            "/live.js"
        ], path
        assert chromium.tells("document.images.length") == 0, path


def test_the_keyboard_is_enough(chromium: Chromium, seen: tuple[Scenario, Browser]) -> None:
    created, browser = seen
    chromium.look(f"{browser.root}/", 1280, "light")

    def pressed(key: str) -> str:
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Tab": 9, "Enter": 13}[key]
        chromium.call(
            "Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text
        )
        chromium.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)
        return str(chromium.tells("document.activeElement.innerText"))

    assert [pressed("Tab") for _ in range(3)] == ["Skip to the content", "Queue", "Search"]
    assert [pressed("Tab") for _ in range(2)] == ["Operators", "Live: on"]
    text = next(text for _ in range(30) if "Show" not in (text := pressed("Tab")))  # the problems
    assert "queued" in text
    assert chromium.tells("getComputedStyle(document.activeElement).outlineStyle") == "solid", (
        "one sees where one is"
    )
    before = chromium.loads
    pressed("Enter")
    chromium.until_loaded(before)
    assert created.ids["queued"][0][-12:] in chromium.tells("document.body.innerText")
    pressed("Tab")
    pressed("Enter")
    assert chromium.tells("document.activeElement.id") == "main", "one is where one skipped to"


def test_results_and_reasons_are_visible_without_scrolling(
    chromium: Chromium, seen: tuple[Scenario, Browser]
) -> None:
    _, browser = seen
    for width, furthest in ((360, 300), (375, 300), (1280, 360)):
        chromium.look(f"{browser.root}/search?reply=greylisted", width, "light")
        left, right, wide, high = (
            chromium.tells("""(({left, right, width, height}) => [left, right, width, height])
            (document.querySelector('.results td.reason').getBoundingClientRect())""")
        )
        assert 0 <= left < right <= width, "the reason is on the screen"
        assert wide > 250, "and not in a gutter"
        assert high < 200
        assert (
            chromium.tells("document.querySelector('.results tbody').getBoundingClientRect().top")
            < furthest
        )
    chromium.look(f"{browser.root}/search?reply=greylisted", 360, "light")
    assert chromium.tells("document.querySelector('form').checkVisibility()") is False
    chromium.tells("document.querySelector('summary').click()")
    assert chromium.tells("document.querySelector('form').checkVisibility()") is True
    chromium.look(f"{browser.root}/search?reply=never-replied", 360, "light")
    assert chromium.tells("document.querySelector('form').checkVisibility()") is True


@pytest.fixture
def operated(seen: tuple[Scenario, Browser], sqlite_url: str, chromium: Chromium) -> Iterator[None]:
    """An operator has logged in, a route is paused, and a server fails."""
    with opened(sqlite_url, registered=False) as queue:
        Users(queue.database).add("ann", HASH, role=Role.OPERATOR, actor="me@here")
        operations = QueueOperations(queue.database, sends_dsns=True)
        operations.pause("route:default", actor="ann@mx-1", reason="ticket 812")
    chromium.log_in(seen[1], "ann", PASSWORD)
    yield
    chromium.call("Network.clearBrowserCookies")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.usefixtures("operated")
def test_axe_finds_nothing(
    chromium: Chromium, seen: tuple[Scenario, Browser], width: int, scheme: str
) -> None:
    created, browser = seen
    message = f"/message/{created.ids['deferred'][-1]}"
    # The schemes are two sets of colours on the same page.
    violations = ALL_RULES if scheme == "light" else RULES_OF_COLOUR
    for path in (
        "/",
        "/?span=7d",
        "/search",
        "/search?state=deferred&newer_than=1d",
        "/search?unfinished=1&count_by=reason",
        message,
        f"{message}/header",
        "/operators",
        "/act/bounce?state=deferred",
        "/act/hold",
        "/act/pause?route=default",
        "/login",
        "/nothing",
    ):
        chromium.look(browser.root + path, width, scheme)
        assert chromium.tells("document.documentElement.scrollWidth") <= width, path
        assert chromium.tells(HIDDEN) == [], path
        chromium.tells(AXE)
        assert chromium.answers(violations) == [], path


@pytest.mark.parametrize(("broken", "verdict"), [(True, "critical"), (False, "fine")])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_verdict_is_seen_first(
    chromium: Chromium,
    sqlite_url: str,
    spool: Spool,
    monkeypatch: pytest.MonkeyPatch,
    broken: bool,
    verdict: str,
    scheme: str,
) -> None:
    """It is the largest text, and in colour; red is told from green without colour by its words."""
    with opened(sqlite_url) as queue:
        typed_at(queue, spool, monkeypatch)
        if broken:
            queue.rescuer.publish_open_circuits(queue.worker, {"a:628": "connect: refused"})
        with browsing(queue) as browser:
            chromium.look(f"{browser.root}/", 390, scheme)
            box = chromium.tells(
                "(({top, width, height}) => [top, width, height])"
                "(document.querySelector('.verdict').getBoundingClientRect())"
            )
            assert box[0] < 120
            assert box[1] > 340
            assert chromium.tells("document.querySelector('.verdict').className").split()[-1] == (
                verdict
            )
            words = chromium.tells("document.querySelector('h1').innerText")
            assert words == ("1 problem" if broken else "Nothing is wrong")
            sizes = chromium.tells(
                "[...document.querySelectorAll('main *')]"
                ".map(e => parseFloat(getComputedStyle(e).fontSize))"
            )
            assert max(sizes) == chromium.tells(
                "parseFloat(getComputedStyle(document.querySelector('h1')).fontSize)"
            )
            red, green, _ = map(
                int,
                chromium.tells(
                    "getComputedStyle(document.querySelector('h1')).color.match(/\\d+/g)"
                ),
            )
            assert (red > green) is broken
            assert chromium.tells("document.title").startswith("(1) " if broken else "Queue")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The overview is read often, and streams look often."""
    monkeypatch.setattr("commands.web.overview.KEPT", 0.2)
    monkeypatch.setattr("commands.web.overview.SLOWNESS", 0)
    monkeypatch.setattr("commands.web.live.INTERVAL", 0.05)


def queued(chromium: Chromium) -> int:
    return int(chromium.tells("document.querySelector('.tile:has(.queued) b').innerText"))


@pytest.mark.usefixtures("quick")
def test_a_page_is_live_until_it_is_switched_off(
    chromium: Chromium, sqlite_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(sqlite_url) as queue:
        typed_at(queue, spool, monkeypatch)
        queue.accept()
        with browsing(queue) as browser:
            chromium.look(f"{browser.root}/", 1280, "light")
            loads, switch = chromium.loads, "document.getElementById('live')"
            assert queued(chromium) == 1
            until(lambda: chromium.tells(f"{switch}.innerText") == "Live: on", what="it is live")
            assert chromium.tells(f"{switch}.getAttribute('aria-checked')") == "true"
            link = "document.querySelector('.spans a')"
            chromium.tells(f"{link}.focus(); document.querySelector('summary')?.click()")
            queue.accept()
            until(lambda: queued(chromium) == 2, what="the page shows it")
            assert chromium.tells(f"document.activeElement === {link}"), "the focus stays"
            assert chromium.loads == loads, "the page was not loaded again"
            chromium.tells(f"{switch}.click()")
            assert chromium.tells(f"{switch}.innerText") == "Live: off"
            assert chromium.tells(f"{switch}.getAttribute('aria-checked')") == "false"
            queue.accept()
            until(lambda: "<b>3</b>" in browser.get("/").text, what="a new page shows it")
            assert queued(chromium) == 2
            chromium.look(f"{browser.root}/", 1280, "light")
            assert queued(chromium) == 3, "a reload shows it"
            assert chromium.tells(f"{switch}.innerText") == "Live: off", "it is remembered"
            chromium.tells(f"{switch}.click()")
            until(lambda: chromium.tells(f"{switch}.innerText") == "Live: on", what="it is live")


@pytest.mark.usefixtures("quick")
def test_a_live_page_recovers_from_failures(
    chromium: Chromium, sqlite_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = threading.Event()

    class Full(int):
        """A limit of streams that leaves no room. A browser never repeats a refused request."""

        def __le__(self, other: object) -> bool:
            refused.set()
            return True

    def fail(_reader: QueueReader) -> list[WorkerRow]:
        raise HTTPException(503, "The database does not answer in time.")

    with opened(sqlite_url) as queue:
        typed_at(queue, spool, monkeypatch)
        queue.accept()
        with browsing(queue) as browser:
            chromium.look(f"{browser.root}/", 1280, "light")
            switch = "document.getElementById('live').innerText"
            until(lambda: chromium.tells(switch) == "Live: on", what="it is live")
            loads = chromium.loads
            with monkeypatch.context() as patch:
                patch.setattr(QueueReader, "workers", fail)
                patch.setattr("commands.web.live.MAX_STREAMS", Full())
                until(refused.is_set, 20, what="the stream is refused")
                until(lambda: chromium.tells(switch) == "Live: waiting", what="it fails")
                queue.accept()
            until(lambda: queued(chromium) == 2, 20, what="the page shows it")
            until(lambda: chromium.tells(switch) == "Live: on", 20, what="it is live again")
            assert chromium.loads == loads, "the page was not loaded again"


@pytest.mark.usefixtures("quick")
def test_a_form_is_not_replaced_while_it_is_filled_in(
    chromium: Chromium, sqlite_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(sqlite_url) as queue:
        typed_at(queue, spool, monkeypatch)
        first = queue.accept()
        with browsing(queue) as browser:
            chromium.look(f"{browser.root}/search", 1280, "light")
            field = "document.getElementById('sender')"
            chromium.tells(f"{field}.focus(); {field}.value = 'half an addr'")
            second = queue.accept()
            events = "new Promise(done => { let n = 0; const s = new EventSource('/events');"
            events += " s.onmessage = () => { if (++n == 4) { s.close(); done(n) } } })"
            assert chromium.answers(events) == 4
            assert chromium.tells(f"{field}.value") == "half an addr"
            assert second[-12:] not in chromium.tells("document.body.innerText")
            chromium.tells(f"{field}.value = ''; {field}.blur()")
            shown = "document.getElementById('main').innerText"
            until(lambda: second[-12:] in chromium.tells(shown), what="it is shown afterwards")
            assert first[-12:] in chromium.tells(shown)


def test_the_page_works_without_scripts(chromium: Chromium, seen: tuple[Scenario, Browser]) -> None:
    _, browser = seen
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.look(f"{browser.root}/", 1280, "light")
        assert chromium.tells("document.getElementById('live').checkVisibility()") is False
        assert "reload" in chromium.tells("document.getElementById('main').innerText")
    finally:
        chromium.call("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_graphs_can_be_read(
    chromium: Chromium, seen: tuple[Scenario, Browser], width: int, scheme: str
) -> None:
    _, browser = seen
    chromium.look(f"{browser.root}/", width, scheme)
    texts = chromium.tells("""[...document.querySelectorAll('svg text')]
        .map(e => [e.getBoundingClientRect(), e])
        .map(([box, e]) => [box.left, box.right, box.height,
            parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a])""")
    assert len(texts) >= 3 + 3 + 4 + 3 * 4, "both axes of each graph"
    for left, right, _, pixels in texts:
        assert 0 <= left < right <= width
        assert pixels >= 11
    captions = chromium.tells(
        "[...document.querySelectorAll('figcaption')].map(e => e.innerText).join(' ')"
    )
    for kind in ("in", "delivered", "deferred", "failed", "uncertain"):
        assert f" {kind}" in captions
    fills = chromium.tells(
        "[...document.querySelectorAll('.plot rect')].map(e => getComputedStyle(e).fill)"
    )
    assert len(set(fills)) == 4, "each kind has a colour or a pattern of its own"
    assert sum("url(" in fill for fill in fills) > 0
    shades = """(() => { const light = c => {
            const v = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2] }
        const paper = light(getComputedStyle(document.body).backgroundColor)
        return [...document.querySelectorAll('svg text, svg rect[class], circle')]
            .map(e => getComputedStyle(e).fill).map(light)
            .map(c => (Math.max(c, paper) + 0.05) / (Math.min(c, paper) + 0.05)) })()"""
    assert min(chromium.tells(shades)) >= 4.5


def test_tiles_stand_in_columns(chromium: Chromium, seen: tuple[Scenario, Browser]) -> None:
    _, browser = seen
    for width in (360, 1280):
        chromium.look(f"{browser.root}/", width, "light")
        boxes = chromium.tells(
            "[...document.querySelectorAll('.tile')].map(e => e.getBoundingClientRect())"
            ".map(({left, width, height}) => [left, width, height])"
        )
        assert len(boxes) == 9
        assert (
            len({round(wide) for _, wide, _ in boxes})
            == len({round(high) for *_, high in boxes})
            == 1
        )
        assert len({round(left) for left, *_ in boxes}) == (3 if width == 360 else 9)
    assert chromium.tells("document.querySelector('.tile:has(.split)').href") is None, (
        "it has no recipients to search for"
    )
