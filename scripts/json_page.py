"""Writes the tables of docs/json.md from the schemas: `python scripts/json_page.py`.

With `--check` it writes nothing, and exits with status 1 if the page differs.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
SCHEMAS = DOCS / "schemas"
PAGE = DOCS / "json.md"
# The order of the page: commands that look, that change, that check, and those for users.
ORDER = (
    *("list", "count", "show", "uncommitted", "why", "stats", "problems", "actions"),
    *("operation", "pause", "check", "probe", "plugin", "fsck", "rebuild", "user-list", "user"),
    *("event", "replay", "webhook-list", "webhook-test", "webhook"),
)
BEGIN = "<!-- made by scripts/json_page.py: begin -->\n"
END = "<!-- end -->\n"


def schemas() -> dict[str, Any]:
    """The schemas by the names of their files, in the order of the page."""
    files = {path.stem: path for path in SCHEMAS.glob("*.json")}
    return {
        name: json.loads(files[name].read_text())
        for name in sorted(files, key=lambda name: (name not in ORDER, _place(name), name))
    }


def _place(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def page() -> str:
    """The page as it is, with the tables of today."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    tables = "".join(section(name, schema) for name, schema in schemas().items())
    return f"{before}{BEGIN}{tables}\n{END}{rest.partition(END)[2]}"


def section(name: str, schema: Mapping[str, Any]) -> str:
    """A heading and a table for a schema, or one for each of its kinds."""
    text = f"\n## {schema['title'].removeprefix('qmqp-relay ').replace('|', ', ')}\n\n"
    if description := schema.get("description"):
        text += f"{description} "
    text += f"Schema: [{name}.json](schemas/{name}.json).\n"
    if "properties" in schema:
        return text + "\n" + "\n".join(table(schema)) + "\n"
    for kind in schema["oneOf"]:
        text += f"\n**`{kind['properties']['kind']['const']}`**: {kind['title']}\n\n"
        text += "\n".join(table(kind)) + "\n"
    return text


def table(schema: Mapping[str, Any]) -> Iterator[str]:
    """The rows of a table of properties; those of nested objects have their path."""
    yield "| property | type | is |"
    yield "|---|---|---|"
    yield from _rows("", schema)


def _rows(path: str, schema: Mapping[str, Any]) -> Iterator[str]:
    for name, value in schema["properties"].items():
        optional = "" if name in schema["required"] else ", not always there"
        yield f"| `{path}{name}` | {_type(value)} | {value.get('description', '')}{optional} |"
        for below, nested in (("", value), ("[]", value.get("items", {}))):
            if "properties" in nested:
                yield from _rows(f"{path}{name}{below}.", nested)


def _type(value: Mapping[str, Any]) -> str:
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return " or ".join(f"`{each}`" for each in value["enum"])
    names: list[str] = value["type"] if isinstance(value["type"], list) else [value["type"]]
    shown = {"string": "time"} if value.get("format") == "date-time" else {}
    return " or ".join(shown.get(name, name) for name in names)


if __name__ == "__main__":
    made = page()
    if sys.argv[1:] == ["--check"]:
        sys.exit(int(PAGE.read_text() != made))
    PAGE.write_text(made)
