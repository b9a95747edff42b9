"""Text of peers on the pages: no line ends inside an address, in time linear in its length."""

import pytest

from commands.web.text import unbroken
from tests.scaling import growth


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a-b", 'a<span class="joined">-b</span>'),
        ("a--:b-", 'a<span class="joined">--:b</span>-'),
        ("-- x", "-- x"),
        ("a-<b", 'a<span class="joined">-&lt;</span>b'),
        ("-&", '<span class="joined">-&amp;</span>'),
    ],
)
def test_hyphens_are_joined_to_what_follows(text: str, html: str) -> None:
    assert unbroken(text) == html


@pytest.mark.parametrize("piece", ["-", "-:", "a-", "- ", "-<", "-&"])
def test_joining_is_linear(piece: str) -> None:
    assert growth(unbroken, piece * 1000, piece * 16_000) < 64, (
        "16 times as much takes 16 times as long, not 256"
    )
