"""docker-compose.yml, Dockerfile and the settings agree. `.ci/compose` runs them with an engine."""

import re
import tomllib
from pathlib import Path

import pytest

from relay.settings import SmtpdSettings, load, names, seconds

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
CODE = "\n".join(
    line for line in TEXT.splitlines() if line.strip() and not line.lstrip().startswith("#")
)
DOCKERFILE = (ROOT / "Dockerfile").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()
# The settings that the image fixes for all its containers; the spool is below STATE_DIR.
IN_THE_IMAGE = {"RELAY_STATE_DIR", "RELAY_SPOOL_DIR", "RELAY_SMTP_LISTEN"}


def fields(block: str) -> dict[str, str]:
    """The keys of a YAML mapping as this file writes them, each with the text of its value."""
    lines = block.strip("\n").splitlines()
    width, found, key = len(lines[0]) - len(lines[0].lstrip()), dict[str, str](), ""
    for line in lines:
        if line[width] == " ":
            found[key] += "\n" + line
        else:
            key, _, value = line.strip().partition(":")
            found[key] = re.sub(r"^&\S+", "", value.strip())
    return found


TOP = fields(CODE)
RELAY = fields(TOP["x-relay"])
OWN = {name: fields(block) for name, block in fields(TOP["services"]).items()}
SERVICES = {name: (RELAY if own.get("<<") == "*relay" else {}) | own for name, own in OWN.items()}
OURS = [name for name, service in SERVICES.items() if "build" in service]


def test_every_setting_reaches_the_containers_or_is_fixed_there():
    passed, settled = set[str](), dict.fromkeys(IN_THE_IMAGE, "fixed")
    for given, value in re.findall(r"^ +(RELAY_[A-Z_]+):(?: (.*))?$", CODE, re.MULTILINE):
        name = given if given in names() else given.removesuffix("_FILE")
        if not value:
            passed.add(name)
        else:
            default = re.fullmatch(rf"\$\{{{name}:-(.*)\}}", value)
            settled[name] = default[1] if default else "fixed"
    assert passed | set(settled) == names()
    marked = re.findall(r"^# .*\. Compose: (.*)\n#(RELAY_[A-Z_]+)=", EXAMPLE, re.MULTILINE)
    assert {name: mark for mark, name in marked} == settled


def test_variables_of_compose_are_in_the_example_with_their_defaults():
    read = re.findall(r"\$\{(?!RELAY_)([A-Z_]+):-([^}]*)\}", CODE)
    assert set(read) == set(re.findall(r"^#((?!RELAY_)[A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE))


def test_the_image_fixes_its_settings():
    assert set(re.findall(r"\bRELAY_[A-Z_]+", DOCKERFILE)) == IN_THE_IMAGE - {"RELAY_SPOOL_DIR"}


def test_nothing_is_passed_that_is_no_setting():
    known = names() | {name + "_FILE" for name in names()}
    assert set(re.findall(r"\bRELAY_[A-Z_]+", CODE + DOCKERFILE)) <= known


@pytest.mark.parametrize(
    "newer",
    [
        "container_name:",
        "start_interval:",
        "required:",
        "restart: true",
        "include:",
        "develop:",
        "!reset",
        "env_file:",
        "pull_policy:",
        "version:",
    ],
)
def test_compose_1_29_can_read_it_and_services_can_be_scaled(newer: str):
    assert newer not in CODE


def test_top_level_has_no_newer_keys_and_secrets_are_files():
    assert [name for name in TOP if not name.startswith("x-")] == ["services", "secrets", "volumes"]
    assert {name: fields(secret) for name, secret in fields(TOP["secrets"]).items()} == {
        file.name: {"file": f"${{SECRETS_DIR:-./compose}}/{file.name}"}
        for file in (ROOT / "compose").iterdir()
    }


def test_only_smtp_is_published_and_page_and_prometheus_to_this_host():
    assert {
        name: service["ports"].split() for name, service in SERVICES.items() if "ports" in service
    } == {
        "smtpd": ["-", '"${RELAY_PUBLISH:-127.0.0.1:2525}:2525"'],
        "web": ["-", '"127.0.0.1:8025:8025"'],
        "prometheus": ["-", '"127.0.0.1:9090:9090"'],
    }
    profiles = {
        name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service
    }
    assert profiles == {
        "web": "[web]",
        "page-login": "[web]",
        "sink": "[demo]",
        "prometheus": "[metrics]",
    }


def test_every_service_is_started_again_and_its_log_bounded():
    again = {name: service["restart"] for name, service in SERVICES.items()}
    assert again == dict.fromkeys(SERVICES, "unless-stopped") | dict.fromkeys(
        ["migrate", "page-login"], "on-failure"
    )
    assert {service["logging"] for service in SERVICES.values()} == {"*logging"}
    assert re.search(r"max-size: 20m\n +max-file: \"5\"", TOP["x-logging"])


def test_services_may_write_nothing_but_volumes_and_may_do_nothing_else():
    confined = {
        "read_only": "true",
        "cap_drop": "[ALL]",
        "security_opt": '["no-new-privileges:true"]',
    }
    assert {
        name: {key: service.get(key) for key in confined} for name, service in SERVICES.items()
    } == dict.fromkeys(SERVICES, confined)
    assert "cap_add" not in CODE
    assert set(OURS) == {"migrate", "smtpd", "worker", "sink", "web"}
    assert {SERVICES[name]["init"] for name in OURS} == {"true"}
    assert {name: service["tmpfs"] for name, service in SERVICES.items()} == dict.fromkeys(
        SERVICES, "/tmp"
    ) | {"redis": "/data", "page-login": "[/tmp, /var/lib/postgresql/data]"}


def test_no_service_is_started_by_root():
    users = {name: service["user"] for name, service in SERVICES.items() if name not in OURS}
    assert users == {
        "postgres": "postgres",
        "page-login": "postgres",
        "redis": "redis",
        "prometheus": "nobody",
    }
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.MULTILINE)


def test_memory_and_processes_of_the_database_and_of_the_broker_are_bounded():
    bounds = {
        name: (service["mem_limit"], service["pids_limit"])
        for name, service in SERVICES.items()
        if "mem_limit" in service
    }
    assert bounds == {"postgres": ("${POSTGRES_MEMORY:-2g}", "200"), "redis": ("256m", "100")}


def test_prometheus_reads_the_files_of_the_repository_and_no_secret() -> None:
    service = SERVICES["prometheus"]
    mounted = re.findall(r"- (\./\S+):/etc/prometheus/(\S+):ro", service["volumes"])
    assert [name for _, name in mounted] == ["prometheus.yml", "alerts.yml"]
    assert all((ROOT / source).is_file() for source, _ in mounted)
    assert not {"secrets", "environment"} & set(service)
    configuration = (ROOT / mounted[0][0]).read_text()
    guide = (ROOT / "docs" / "operate.md").read_text()
    (shown,) = re.findall(r"```yaml\n(rule_files:.*?)```", guide, re.DOTALL)
    assert configuration.endswith(f"\n{shown}"), "the guide shows it"


def test_the_page_has_a_login_of_its_own_and_no_message():
    page, settings = SERVICES["web"], fields(TOP["x-settings"])
    assert (page["secrets"], page["volumes"]) == ("[page-url]", "[]")
    environment = fields(page["environment"])
    assert (environment["<<"], environment["RELAY_DATABASE_URL_FILE"]) == (
        "*settings",
        "/run/secrets/page-url",
    )
    assert not {"RELAY_DATABASE_URL_FILE", "RELAY_BROKER_URL_FILE", "RELAY_BROKER_URL"} & set(
        settings
    )
    assert "GRANT qmqp_relay_reader TO page;" in SERVICES["page-login"]["entrypoint"]


def test_stop_grace_period_is_longer_than_the_drain_timeout():
    grace = {SERVICES[name]["stop_grace_period"] for name in OURS}
    assert grace == {"${STOP_GRACE:-45s}"}
    assert seconds("45s") == load(SmtpdSettings).drain_timeout + 15
    assert "stop_grace_period" in SERVICES["postgres"]


def test_the_broker_keeps_nothing_and_forgets_nothing_that_it_has_taken():
    assert " ".join(SERVICES["redis"]["command"].split()) == (
        '[redis-server, --include, /run/secrets/redis-conf, --save, "", --appendonly, "no",'
        " --maxmemory, 128mb, --maxmemory-policy, noeviction]"
    )


def test_services_are_healthy_within_five_seconds():
    every = fields(TOP["x-health"])
    assert seconds(every["interval"]) == 4
    assert int(every["retries"]) * 4 >= 60, "a busy minute makes none unhealthy"
    checks = {
        name: service["healthcheck"]
        for name, service in SERVICES.items()
        if "healthcheck" in service
    }
    assert set(checks) == {"postgres", "redis", "smtpd", "worker"}
    for check in checks.values():
        assert fields(check)["<<"] == "*health"
        assert not {"interval", "retries"} & set(fields(check))


def test_services_depend_on_started_services_only():
    assert set(re.findall(r"condition: (\w+)", CODE)) == {"service_started"}


def test_the_default_passwords_are_the_same_in_both_files():
    said = {file.name: file.read_text().strip() for file in (ROOT / "compose").iterdir()}
    assert said == {
        "database-password": "relay",
        "database-url": "postgresql://relay:relay@postgres/relay",
        "redis-conf": "requirepass relay",
        "broker-url": "redis://:relay@redis:6379/0",
        "page-password": "page",
        "page-url": "postgresql://page:page@postgres/relay",
    }


def test_the_example_names_the_files_with_passwords():
    (names,) = re.findall(r"^# Directory with (.*)\.\n#SECRETS_DIR=", EXAMPLE, re.MULTILINE)
    assert set(names.split(", ")) == {file.name for file in (ROOT / "compose").iterdir()}


def test_the_lock_names_what_the_image_leaves_behind():
    """A name that left the lock would make the list a lie; pip would only warn."""
    listed = re.search(r"uninstall -q -y \\\n +(.*) \\\n", DOCKERFILE)
    assert listed
    locked = re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert set(listed[1].split()) <= set(locked)


def test_the_image_is_made_of_every_package_of_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert [name for name in packages if f"!{name}" not in ignored] == []


def test_the_example_of_an_override_mounts_routes_into_smtpd_and_workers() -> None:
    text = (ROOT / "docker-compose.override.example.yml").read_text()
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    override = fields("\n".join(lines))
    assert set(fields(override["services"])) == {"smtpd", "worker"}
    mounted = fields(override["x-config"])
    assert re.search(r"- \./config:/etc/qmqp-relay:ro$", mounted["volumes"])
    assert set(re.findall(r"\bRELAY_[A-Z_]+", text)) <= names()
    # The entrypoint of docker-compose.yml would write to the routes file.
    assert "RELAY_ROUTES" in SERVICES["worker"]["entrypoint"]
    assert fields(fields(override["services"])["worker"])["entrypoint"] == "[qmqp-relay]"


def test_the_override_of_the_page_names_what_compose_has():
    text = (ROOT / "docker-compose.page.yml").read_text()
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    web = fields(fields(fields(code)["services"])["web"])
    assert set(web) == {"environment", "secrets", "volumes"}
    assert set(web["secrets"].strip("[]").split(", ")) <= set(fields(TOP["secrets"]))
    assert re.findall(r"- (\w+):", web["volumes"]) == ["spool"]
    assert "spool" in fields(TOP["volumes"])
    given = set(re.findall(r"^ +(RELAY_[A-Z_]+):", code, re.MULTILINE))
    assert given == {"RELAY_DATABASE_URL_FILE", "RELAY_WEB_PROXY_NETWORKS"}
    assert {name.removesuffix("_FILE") for name in given} <= names()
