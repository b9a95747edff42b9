"""The pages in a real browser, wide and narrow, light and dark, with hostile text everywhere."""

import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from relay.queue.outcome import Outcome
from relay.spool.store import Spool
from tests.acceptance.console import HOSTILE, LONG, Browser, Scenario, browsing, scenario
from tests.integration.harness import opened
from tests.integration.typed import typed_at
from tests.services import end, spawn

REPLY = (
    "451 4.7.1 <somebody-else@mail-cluster-west.example.net>: greylisted by policy-daemon-2, see"
    " http://x.example/a-b"
)
PEOPLE = (
    "firstname.lastname-billing@mail-cluster-west.example.com",
    "some-body@a-sub-domain.of-a.example.org",
)
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
    .filter(e => e.clientWidth && !e.closest('input, select'))
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
    assert "queued" in pressed("Tab")
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
    for width, furthest in ((360, 300), (375, 300), (1280, 300)):
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
    assert len(texts) >= 7 + 2 * 4, "both axes of both graphs"
    for left, right, _, pixels in texts:
        assert 0 <= left < right <= width
        assert pixels >= 11
    for kind in ("delivered", "deferred", "failed", "uncertain"):
        assert f" {kind}" in chromium.tells("document.querySelector('figcaption').innerText")
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
