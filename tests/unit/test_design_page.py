"""docs/design.md: the functions on the road of a message exist, and each list of them is short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROAD = (ROOT / "docs" / "design.md").read_text().split("\n## The road of a message\n")[1]
LISTS = {
    title: re.findall(r"^- `([\w/]+\.py):([\w.]+)`", text, re.MULTILINE)
    for title, text in re.findall(
        r"^### (.+?)\n(.*?)(?=^##)", ROAD.split("\n## ")[0] + "\n## ", re.MULTILINE | re.DOTALL
    )
}
LONGEST = {
    "From the socket to 250": 16,
    "From 250 to K": 30,
    "From Z to the retry": 10,
    "From D to the DSN": 10,
}


def functions(path: Path) -> set[str]:
    """The functions of a module by name, methods as `Class.name`."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        names |= {
            prefix + each.name
            for each in inner
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
        }
    return names


def test_the_page_has_the_four_lists():
    assert set(LISTS) == set(LONGEST)


@pytest.mark.parametrize("title", LONGEST)
def test_a_list_is_neither_empty_nor_long(title: str):
    assert 2 < len(LISTS[title]) <= LONGEST[title]


@pytest.mark.parametrize(("file", "name"), sorted({hop for hops in LISTS.values() for hop in hops}))
def test_each_function_of_the_lists_exists(file: str, name: str):
    assert name in functions(ROOT / file)
