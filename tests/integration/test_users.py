"""Users: their rows on both databases, the commands that change them, and the audit."""

from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from commands.ops import users as commands
from relay import passwords
from relay.db.engine import reading
from relay.spool.store import Spool
from relay.users import Role, User, Users, sender_pattern, user_name
from tests.integration.harness import QueueHarness
from tests.integration.typed import Typed, lines, typed_at

PASSWORD = "correct horse"


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    return typed_at(queue, spool, monkeypatch)


def audit(engine: Engine) -> list[tuple[str, str, str, str]]:
    with reading(engine) as connection:
        rows = connection.execute(text("SELECT actor, operation, reason, filter FROM audit"))
        return sorted(tuple(row) for row in rows)


def only(users: Users) -> User:
    [user] = users.all()
    return user


def test_a_user_is_kept_as_it_was_added(engine: Engine) -> None:
    users = Users(engine)
    assert users.add(
        "ann",
        "a hash",
        role=Role.OPERATOR,
        senders=["*@example.org", "ann@example.net"],
        messages_per_minute=60,
        actor="me@here",
        reason="new",
    )
    user = only(users)
    assert (user.name, user.role, user.senders) == (
        "ann",
        Role.OPERATOR,
        ("*@example.org", "ann@example.net"),
    )
    assert (user.messages_per_minute, user.disabled_at, user.last_seen_at) == (60, None, None)
    assert user.created_at.tzinfo is not None
    assert user.password_hash == "", "a listing does not read it"
    assert users.find(["ann", "bob"])["ann"].password_hash == "a hash"
    assert "a hash" not in repr(users.find(["ann"]))
    assert not users.add("ann", "another", actor="me@here")
    assert users.find(["ann"])["ann"].password_hash == "a hash"
    shown = "--role operator --sender *@example.org --sender ann@example.net"
    shown += " --messages-per-minute 60"
    assert audit(engine) == [("me@here", "user add ann", "new", shown)]


def test_each_change_happens_once_and_is_recorded(engine: Engine) -> None:
    users = Users(engine)
    users.add("ann", "a hash", actor="me@here")
    for change, again in ((users.disable, False), (users.enable, False), (users.remove, False)):
        assert change("ann", actor="me@here", reason="why")
        assert change("ann", actor="me@here", reason="why") is again
    assert users.all() == []
    assert not users.set_password("ann", "a hash", actor="me@here")
    operations = [operation for _, operation, _, _ in audit(engine)]
    assert operations == ["user add ann", "user disable ann", "user enable ann", "user remove ann"]


def test_a_change_keeps_what_it_does_not_name(engine: Engine) -> None:
    users = Users(engine)
    users.add("ann", "a hash", senders=["ann@example.org"], messages_per_minute=5, actor="me@here")
    assert users.change("ann", senders=["*@example.org", "*@example.net"], actor="me@here")
    user = only(users)
    assert (user.role, user.messages_per_minute) == (Role.SENDER, 5)
    assert user.senders == ("*@example.org", "*@example.net")
    assert users.change("ann", role=Role.VIEWER, messages_per_minute=9, actor="me@here")
    user = only(users)
    assert (user.role, user.messages_per_minute) == (Role.VIEWER, 9)
    assert user.senders == ("*@example.org", "*@example.net")
    assert users.change("ann", messages_per_minute=0, actor="me@here", reason="why")
    assert only(users).messages_per_minute is None
    assert users.find(["ann"])["ann"].password_hash == "a hash"
    assert not users.change("bob", role=Role.VIEWER, actor="me@here")
    changes = [(reason, options) for _, what, reason, options in audit(engine) if " set " in what]
    assert sorted(changes) == [
        ("", "--role viewer --messages-per-minute 9"),
        ("", "--sender *@example.org --sender *@example.net"),
        ("why", "--messages-per-minute 0"),
    ]


def test_the_database_records_when_users_were_seen(engine: Engine) -> None:
    users = Users(engine)
    for name in ("ann", "bob"):
        users.add(name, "a hash", actor="me@here")
    users.note_seen(["ann", "carol"])
    seen = {user.name: user.last_seen_at is not None for user in users.all()}
    assert seen == {"ann": True, "bob": False}
    assert len(audit(engine)) == 2, "it is no operation of an operator"


@pytest.mark.parametrize("name", ["", "ann bob", "-ann", "ann\n", "jos\u00e9", "x" * 129, "a'b"])
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a user's name: write"):
        user_name(name)


def test_a_name_is_lower_case() -> None:
    assert user_name("Ann@Example.ORG") == "ann@example.org"


@pytest.mark.parametrize("pattern", ["", "ann", "*example.org", "a b@example.org", "ann@", "<>"])
def test_a_pattern_that_cannot_be_one_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="is not a pattern of senders: write"):
        sender_pattern(pattern)


def add(typed: Typed, *arguments: str, status: int = 0, password: str = PASSWORD) -> str:
    done = typed("user", "add", *arguments, "--password-file=-", status=status, answer=password)
    return done.output


def test_the_commands_change_and_list_users(typed: Typed, queue: QueueHarness) -> None:
    assert typed("user", "list", status=1).stderr.endswith("`qmqp-relay user add NAME` adds one\n")
    assert add(typed, "Ann", "--sender", "*@example.org", "--sender", "*@example.net") == (
        "user ann added\n"
    )
    assert add(typed, "boss", "--role", "viewer", "--json") == (
        '{"verb": "add", "user": "boss", "done": true}\n'
    )
    ann, boss = lines(typed("user", "list", "--json"))
    assert (ann["name"], ann["role"], ann["senders"]) == (
        "ann",
        "sender",
        ["*@example.org", "*@example.net"],
    )
    assert (boss["name"], boss["role"], boss["senders"]) == ("boss", "viewer", ["*"])
    assert set(ann) == {
        "name",
        "role",
        "senders",
        "messages_per_minute",
        "created_at",
        "disabled_at",
        "last_seen_at",
    }
    assert "*@example.org *@example.net" in typed("user", "list").stdout
    assert typed("user", "set", "ANN", "--sender", "ann@example.org").stdout == "user ann changed\n"
    typed("user", "set", "ann", "--role=operator", "--messages-per-minute=7", "--reason=promoted")
    ann = lines(typed("user", "list", "--json"))[0]
    assert (ann["role"], ann["senders"]) == ("operator", ["ann@example.org"])
    assert ann["messages_per_minute"] == 7
    typed("user", "set", "ann", "--messages-per-minute=0")
    assert lines(typed("user", "list", "--json"))[0]["messages_per_minute"] is None
    typed("user", "disable", "ann", "--reason", "left us")
    assert "it is disabled already" in typed("user", "disable", "ann", status=1).stderr
    assert lines(typed("user", "list", "--json"))[0]["disabled_at"]
    typed("user", "enable", "ann")
    typed("user", "remove", "boss")
    assert [row["name"] for row in lines(typed("user", "list", "--json"))] == ["ann"]
    entries = [(operation, reason) for _, operation, reason, _ in audit(queue.database)]
    assert ("user disable ann", "left us") in entries
    assert ("user set ann", "promoted") in entries
    assert ("user remove boss", "") in entries


def test_a_password_is_read_from_a_file_and_hashed(
    typed: Typed, queue: QueueHarness, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\r\n")
    typed("user", "add", "ann", "--password-file", str(file))
    users = Users(queue.database)
    assert passwords.verify(users.find(["ann"])["ann"].password_hash, PASSWORD)
    typed("user", "passwd", "ANN", "--password-file=-", answer="another one\n")
    assert passwords.verify(users.find(["ann"])["ann"].password_hash, "another one")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"short\n", "at least 8 characters"),
        (b"", "the password is empty"),
        (b"two whole\nlines of it\n", "has several lines"),
        (b"correct\xff horse", "is not UTF-8 text"),
        (None, "No such file"),
    ],
)
def test_a_file_without_a_password_is_named(
    typed: Typed, tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    refused = typed("user", "add", "ann", "--password-file", str(file), status=2)
    assert complaint in refused.stderr
    assert refused.stdout == ""
    typed("user", "list", status=1)


def test_a_password_is_typed_twice(
    typed: Typed, queue: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([PASSWORD, "something else", PASSWORD, PASSWORD])
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return next(answers)

    monkeypatch.setattr("getpass.getpass", ask)
    monkeypatch.setattr(commands, "_has_terminal", lambda: True)
    assert "the two passwords differ" in typed("user", "add", "ann", status=2).stderr
    typed("user", "add", "ann")
    assert asked == ["Password for ann: ", "Again: "] * 2
    assert passwords.verify(Users(queue.database).find(["ann"])["ann"].password_hash, PASSWORD)


def test_wrong_use_of_users_is_named(typed: Typed) -> None:
    assert "add --password-file" in typed("user", "add", "ann", status=2).stderr
    add(typed, "ann")
    assert "`qmqp-relay user passwd ann`" in add(typed, "ann", status=1)
    assert "choose one of sender, viewer, operator" in add(typed, "x", "--role=boss", status=2)
    assert "is not a user's name" in add(typed, "a b", status=2)
    assert "is not a pattern of senders" in add(typed, "x", "--sender=example.org", status=2)
    assert "nothing to change: add --role" in typed("user", "set", "ann", status=2).stderr
    assert "no role boss" in typed("user", "set", "ann", "--role=boss", status=2).stderr
    wrong_pattern = typed("user", "set", "ann", "--sender=example.org", status=2)
    assert "is not a pattern of senders" in wrong_pattern.stderr
    for verb, options in {
        "passwd": ["--password-file=-"],
        "set": ["--role=viewer"],
        "disable": [],
        "enable": [],
        "remove": [],
    }.items():
        missing = typed("user", verb, "bob", *options, status=1, answer=PASSWORD)
        assert "there is no user bob; `qmqp-relay user list`" in missing.stderr
        assert "is not a user's name" in typed("user", verb, "b b", *options, status=2).stderr
    assert "it is enabled already" in typed("user", "enable", "ann", status=1).stderr
