"""docker-compose.yml, Dockerfile and the settings agree; what they do together, `.ci/compose` proves with an engine."""

import re
from pathlib import Path

import pytest

from relay.settings import names

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
CODE = "\n".join(line for line in TEXT.splitlines() if not line.lstrip().startswith("#"))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
# What the image settles for all its containers.
IN_THE_IMAGE = {"RELAY_STATE_DIR", "RELAY_SPOOL_DIR", "RELAY_SMTP_LISTEN"}


def test_every_setting_reaches_the_containers():
    passed = set(re.findall(r"^ +(RELAY_[A-Z_]+):", CODE, re.MULTILINE))
    assert {name for name in names() if not {name, name + "_FILE"} & passed} == IN_THE_IMAGE


def test_nothing_is_passed_that_is_no_setting():
    known = names() | {name + "_FILE" for name in names()}
    assert set(re.findall(r"\bRELAY_[A-Z_]+", CODE + DOCKERFILE)) <= known


@pytest.mark.parametrize(
    "newer", ["container_name:", "start_interval:", "required:", "restart: true", "include:", "develop:", "!reset"]
)
def test_compose_1_29_can_read_it_and_services_can_be_scaled(newer: str):
    assert newer not in CODE


def test_only_smtp_is_published_and_the_page_to_this_host():
    assert re.findall(r"ports:\n((?: +- .*\n)+)", CODE) == [
        '      - "${RELAY_PUBLISH:-127.0.0.1:2525}:2525"\n',
        '      - "127.0.0.1:8025:8025"\n',
    ]


def test_the_default_password_is_the_same_in_both_files():
    password = (ROOT / "compose" / "database-password").read_text().strip()
    assert (ROOT / "compose" / "database-url").read_text().strip() == f"postgresql://relay:{password}@postgres/relay"


def test_the_lock_names_what_the_image_leaves_behind():
    """A name that left the lock would make the list a lie; pip would only warn."""
    listed = re.search(r"uninstall -q -y \\\n +(.*) \\\n", DOCKERFILE)
    assert listed
    locked = re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert set(listed[1].split()) <= set(locked)
