"""docs/glossary.md points to names that exist, and a class name stands once in the tree."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = (
    "relay",
    "reception",
    "plugins",
    "qmqp_relay",
    "smtpd",
    "qmqpd",
    "worker",
    "qmqp",
    "commands",
    "migrations",
    "bench",
    "tests",
)
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "glossary.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| term |")
]
PLACES = [place for row in ROWS for place in re.findall(r"`([^`:]+):([^`]+)`", row[2])]


def target_names(node: ast.AST) -> list[str]:
    """The names that a statement binds."""
    match node:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return [node.name]
        case ast.ImportFrom():
            return [alias.asname for alias in node.names if alias.asname]
        case ast.Assign():
            return [target.id for target in node.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.TypeAlias(name=ast.Name(id=name)):
            return [name]
    return []


def member_names(node: ast.AST) -> list[str]:
    """The attributes of a class, or the columns of a table."""
    match node:
        case ast.ClassDef():
            return [name for each in node.body for name in target_names(each)]
        case ast.Assign(value=ast.Call(func=ast.Name(id="Table"), args=arguments)):
            return [
                column.value
                for argument in arguments
                if isinstance(argument, ast.Call)
                and argument.args
                and isinstance(column := argument.args[0], ast.Constant)
                and isinstance(column.value, str)
            ]
    return []


@cache
def names(path: Path) -> frozenset[str]:
    """The names that a module defines; members of classes and columns of tables with the name
    before."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        for name in target_names(node):
            found |= {name} | {f"{name}.{member}" for member in member_names(node)}
    return frozenset(found)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_has_four_cells_and_a_place(row: list[str]):
    assert len(row) == 4
    assert re.fullmatch(r"`[\w/]+\.py:[\w.]+`(, `[\w/]+\.py:[\w.]+`)*", row[2])


@pytest.mark.parametrize(("file", "name"), sorted(set(PLACES)))
def test_a_place_exists(file: str, name: str):
    assert name in names(ROOT / file)


def test_terms_are_sorted_and_different():
    terms = [row[0].lower() for row in ROWS]
    assert terms == sorted(set(terms))


def test_a_class_name_stands_once():
    classes = Counter(
        node.name
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert classes["Session"] == 1
    assert {name for name, count in classes.items() if count > 1} == set()
