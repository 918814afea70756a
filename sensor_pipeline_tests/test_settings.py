"""Every setting: its default, what it may be, and what a person is told when it is something else."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.settings import (
    _RESERVED_PROPERTIES,
    _VARIABLES,
    SECRETS,
    Settings,
    check_order,
    parse_duration,
    parse_moment,
    with_secrets,
)

DEFAULTS: dict[str, Any] = {
    "KAFKA_BOOTSTRAP_SERVERS": "localhost:9092",
    "KAFKA_TOPIC": ("machine.sensor.readings",),
    "KAFKA_GROUP_ID": "sensor-consumer-group",
    "POSTGRES_HOST": "localhost",
    "POSTGRES_PORT": 5432,
    "POSTGRES_USER": "sensor_user",
    "POSTGRES_PASSWORD": "sensor_password",
    "POSTGRES_DB": "sensor_data",
    "POSTGRES_SSLMODE": None,
    "POSTGRES_SSLROOTCERT": None,
    "BATCH_SIZE": 250_000,
    "COMMIT_INTERVAL_MS": 5_000,
    "LANES": 1,
    "START_FROM": "earliest",
    "MAX_FUTURE": timedelta(days=1),
    "MAX_MESSAGE_BYTES": 1_048_576,
    "MAX_REJECTED_SHARE": None,
    "NAIVE_TIMESTAMP_TZ": ZoneInfo("UTC"),
    "STALE_AFTER": timedelta(minutes=10),
    "SILENT_AFTER": timedelta(hours=1),
    "READINGS_KEPT_DAYS": None,
    "RUNS_KEPT_DAYS": 14,
    "BATCHES_KEPT_DAYS": 90,
    "ALERT_WEBHOOK_URL": None,
    "ALERT_MAX_AGE": timedelta(days=1),
    "ALERT_REPEAT": timedelta(hours=1),
    "ALERT_BEHIND_AFTER": timedelta(minutes=15),
    "ALERT_REJECTED": 100,
    "NOTICES_KEPT_DAYS": 7,
}

SSL_MODES = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
VALID: list[tuple[str, str, Any]] = [
    ("KAFKA_BOOTSTRAP_SERVERS", "kafka.example.com:9093", "kafka.example.com:9093"),
    ("KAFKA_BOOTSTRAP_SERVERS", " a:1, b:65535 ", "a:1, b:65535"),
    ("KAFKA_BOOTSTRAP_SERVERS", "[::1]:9092", "[::1]:9092"),
    ("KAFKA_TOPIC", "one", ("one",)),
    ("KAFKA_TOPIC", " b , a.x_y-Z9 ,, b", ("b", "a.x_y-Z9")),
    ("KAFKA_TOPIC", "t" * 249, ("t" * 249,)),
    ("KAFKA_GROUP_ID", "my group", "my group"),
    ("POSTGRES_HOST", "db.example.com", "db.example.com"),
    ("POSTGRES_PORT", "1", 1),
    ("POSTGRES_PORT", " 65535 ", 65535),
    ("POSTGRES_USER", "me", "me"),
    ("POSTGRES_PASSWORD", " with spaces ", " with spaces "),
    ("POSTGRES_DB", "other", "other"),
    *(("POSTGRES_SSLMODE", mode, mode) for mode in SSL_MODES),
    ("POSTGRES_SSLROOTCERT", "system", "system"),
    ("POSTGRES_SSLROOTCERT", __file__, __file__),
    ("BATCH_SIZE", "1", 1),
    ("BATCH_SIZE", "10000000", 10_000_000),
    ("COMMIT_INTERVAL_MS", "1", 1),
    ("COMMIT_INTERVAL_MS", "86400000", 86_400_000),
    ("LANES", "1024", 1024),
    ("START_FROM", "earliest", "earliest"),
    ("START_FROM", "latest", "latest"),
    ("START_FROM", "group", "group"),
    ("START_FROM", "2026-01-01", datetime(2026, 1, 1, tzinfo=UTC)),
    ("START_FROM", "2026-01-01T12:00:00+01:00", datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=1)))),
    ("STALE_AFTER", "90 s", timedelta(seconds=90)),
    ("SILENT_AFTER", "2 days", timedelta(days=2)),
    ("READINGS_KEPT_DAYS", "365", 365),
    ("RUNS_KEPT_DAYS", "1", 1),
    ("BATCHES_KEPT_DAYS", "100000", 100_000),
    ("MAX_FUTURE", "0s", timedelta(0)),
    ("MAX_FUTURE", "90 seconds", timedelta(seconds=90)),
    ("MAX_FUTURE", "999999999 days", timedelta(days=999_999_999)),
    ("MAX_MESSAGE_BYTES", "100000000", 100_000_000),
    ("MAX_REJECTED_SHARE", "0", 0.0),
    ("MAX_REJECTED_SHARE", ".29", 0.29),
    ("MAX_REJECTED_SHARE", "1.0", 1.0),
    ("MAX_REJECTED_SHARE", "2.9 %", 0.029),
    ("MAX_REJECTED_SHARE", "100%", 1.0),
    ("NAIVE_TIMESTAMP_TZ", "Europe/Berlin", ZoneInfo("Europe/Berlin")),
    ("ALERT_WEBHOOK_URL", "https://hooks.example.com/services/T/B/x", "https://hooks.example.com/services/T/B/x"),
    ("ALERT_WEBHOOK_URL", " http://user:word@[::1]:8065/hooks?a=b ", "http://user:word@[::1]:8065/hooks?a=b"),
    ("ALERT_MAX_AGE", "0s", timedelta(0)),
    ("ALERT_MAX_AGE", "3650 days", timedelta(days=3650)),
    ("ALERT_REPEAT", "10 min", timedelta(minutes=10)),
    ("ALERT_BEHIND_AFTER", "60s", timedelta(minutes=1)),
    ("ALERT_REJECTED", "0", 0),
    ("NOTICES_KEPT_DAYS", "3650", 3650),
]

PORTS = "host:port, comma-separated for several"
TOPICS = "topic names, comma-separated"
WHOLE = "a whole number from"
DURATION = "a duration such as 30s, 15min, 12h, 1 day or 2w"
SHARE = "a share such as 0.2 or 20%, from 0 to 1"
INVALID: list[tuple[str, str, str]] = [
    ("STALE_AFTER", "soon", "must be a duration"),
    ("SILENT_AFTER", "1", "must be a duration"),
    ("READINGS_KEPT_DAYS", "0", "must be a whole number from 1"),
    ("RUNS_KEPT_DAYS", "0", "must be a whole number from 1"),
    ("BATCHES_KEPT_DAYS", "1.5", "must be a whole number from 1"),
    ("POSTGRES_SSLROOTCERT", "/no/such/file", "must be a file of PEM certificates"),
    ("POSTGRES_SSLROOTCERT", "/tmp", "must be a file of PEM certificates"),
    ("KAFKA_BOOTSTRAP_SERVERS", "localhost", PORTS),
    ("KAFKA_BOOTSTRAP_SERVERS", ":9092", PORTS),
    ("KAFKA_BOOTSTRAP_SERVERS", "localhost:", PORTS),
    ("KAFKA_BOOTSTRAP_SERVERS", "localhost:0", PORTS),
    ("KAFKA_BOOTSTRAP_SERVERS", "localhost:65536", PORTS),
    ("KAFKA_BOOTSTRAP_SERVERS", "localhost:x", PORTS),
    ("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092,", PORTS),
    ("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092\u00b2", PORTS),
    ("KAFKA_TOPIC", ",", TOPICS),
    ("KAFKA_TOPIC", "a b", TOPICS),
    ("KAFKA_TOPIC", "good,b/d", TOPICS),
    ("KAFKA_TOPIC", "..", TOPICS),
    ("KAFKA_TOPIC", "t" * 250, TOPICS),
    ("KAFKA_TOPIC", "\u00fcber", TOPICS),
    ("POSTGRES_PORT", "0", f"{WHOLE} 1 to 65535"),
    ("POSTGRES_PORT", "65536", f"{WHOLE} 1 to 65535"),
    ("POSTGRES_PORT", "54 32", f"{WHOLE} 1 to 65535"),
    ("POSTGRES_PORT", "postgres", f"{WHOLE} 1 to 65535"),
    ("POSTGRES_SSLMODE", "on", "one of " + ", ".join(SSL_MODES)),
    ("POSTGRES_SSLMODE", "REQUIRE", "one of disable"),
    ("BATCH_SIZE", "0", f"{WHOLE} 1 to 10000000"),
    ("BATCH_SIZE", "-5", f"{WHOLE} 1 to 10000000"),
    ("BATCH_SIZE", "10000001", f"{WHOLE} 1 to 10000000"),
    ("BATCH_SIZE", "1e5", f"{WHOLE} 1 to 10000000"),
    ("BATCH_SIZE", "1_000", f"{WHOLE} 1 to 10000000"),
    ("BATCH_SIZE", "\u0661\u0660", f"{WHOLE} 1 to 10000000"),
    ("BATCH_SIZE", "9" * 5_000, f"{WHOLE} 1 to 10000000"),
    ("COMMIT_INTERVAL_MS", "0", f"{WHOLE} 1 to 86400000"),
    ("COMMIT_INTERVAL_MS", "5s", f"{WHOLE} 1 to 86400000"),
    ("COMMIT_INTERVAL_MS", "86400001", f"{WHOLE} 1 to 86400000"),
    ("LANES", "0", f"{WHOLE} 1 to 1024"),
    ("LANES", "1025", f"{WHOLE} 1 to 1024"),
    ("START_FROM", "beginning", "earliest, latest, group or an ISO 8601 timestamp"),
    ("START_FROM", "Earliest", "earliest, latest, group or an ISO 8601 timestamp"),
    ("START_FROM", "2026-02-30", "earliest, latest, group or an ISO 8601 timestamp"),
    ("MAX_FUTURE", "1", DURATION),
    ("MAX_FUTURE", "-1 day", DURATION),
    ("MAX_FUTURE", "1 month", DURATION),
    ("MAX_FUTURE", "1e3 s", DURATION),
    ("MAX_FUTURE", "1000000000 days", "at most 999999999 days"),
    ("MAX_FUTURE", "9" * 400 + " s", "at most 999999999 days"),
    ("MAX_MESSAGE_BYTES", "0", f"{WHOLE} 1 to 100000000"),
    ("MAX_MESSAGE_BYTES", "1MB", f"{WHOLE} 1 to 100000000"),
    ("MAX_REJECTED_SHARE", "1.01", SHARE),
    ("MAX_REJECTED_SHARE", "101%", SHARE),
    ("MAX_REJECTED_SHARE", "-0.1", SHARE),
    ("MAX_REJECTED_SHARE", "half", SHARE),
    ("MAX_REJECTED_SHARE", "1e-1", SHARE),
    ("MAX_REJECTED_SHARE", "9" * 400, SHARE),
    ("NAIVE_TIMESTAMP_TZ", "Berlin", "a time zone of the IANA database"),
    ("NAIVE_TIMESTAMP_TZ", "Europe", "a time zone of the IANA database"),
    ("NAIVE_TIMESTAMP_TZ", "+01:00", "a time zone of the IANA database"),
    ("NAIVE_TIMESTAMP_TZ", "../../etc/passwd", "a time zone of the IANA database"),
    ("NAIVE_TIMESTAMP_TZ", "x" * 5_000, "a time zone of the IANA database"),
    ("NAIVE_TIMESTAMP_TZ", "a\x00b", "a time zone of the IANA database"),
    ("ALERT_MAX_AGE", "1", DURATION),
    ("ALERT_MAX_AGE", "3651 days", "a duration from 0s to 3650 days"),
    ("ALERT_REPEAT", "often", DURATION),
    ("ALERT_BEHIND_AFTER", "59s", "a duration from 60s to 3650 days"),
    ("ALERT_REJECTED", "1%", f"{WHOLE} 0 to 1000000000"),
    ("NOTICES_KEPT_DAYS", "0", f"{WHOLE} 1 to 3650"),
]
# Any text will do; whether it is the right one, the server says.
FREE_TEXT = {"KAFKA_GROUP_ID", "POSTGRES_HOST", "POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB"}
# It is a secret, and is not said when it is wrong.
WRONG_URLS = [
    "hooks.example.com/x",
    "ftp://a/x",
    "https://",
    "https:///x",
    "https://a:0/x",
    "https://a:x/",
    "http://a b/",
    "http://\u00fc/x",
]


def value(settings: Settings, name: str) -> Any:
    return getattr(settings, _VARIABLES[name][0])


def message_of(env: dict[str, str]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_env(env)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_every_variable_is_tested_here_valid_and_invalid() -> None:
    assert DEFAULTS.keys() == _VARIABLES.keys()
    assert {name for name, _, _ in VALID} == set(_VARIABLES)
    assert {name for name, _, _ in INVALID} == set(_VARIABLES) - FREE_TEXT - {"ALERT_WEBHOOK_URL"}
    attributes = {attribute for attribute, _ in _VARIABLES.values()} | {"kafka_client"}
    assert attributes == set(Settings.__dataclass_fields__)


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_a_variable_that_is_unset_or_blank_takes_its_default(name: str, default: Any) -> None:
    # A password may be blank, and is taken as it is.
    blank = default if name != "POSTGRES_PASSWORD" else "   "
    assert value(Settings(), name) == default
    assert value(Settings.from_env({}), name) == default
    assert value(Settings.from_env({name: ""}), name) == default
    assert value(Settings.from_env({name: "   "}), name) == blank


@pytest.mark.parametrize(("name", "text", "expected"), VALID)
def test_a_valid_value_is_taken_and_changes_nothing_else(name: str, text: str, expected: Any) -> None:
    settings = Settings.from_env({name: text})
    assert value(settings, name) == expected
    for other in DEFAULTS.keys() - {name}:
        assert value(settings, other) == DEFAULTS[other]


@pytest.mark.parametrize(("name", "text", "may_be"), INVALID, ids=lambda text: ascii(text)[:40])
def test_a_wrong_value_is_named_with_what_it_may_be(name: str, text: str, may_be: str) -> None:
    said = message_of({name: text})
    assert said.startswith(f"wrong setting: {name}=")
    assert repr(text)[1:40] in said
    assert "must be" in said
    assert may_be in said


@pytest.mark.parametrize("url", WRONG_URLS)
def test_a_wrong_address_of_a_webhook_is_named_and_not_said(url: str) -> None:
    said = message_of({"ALERT_WEBHOOK_URL": url})
    assert said == (
        "wrong setting: ALERT_WEBHOOK_URL: must be an address such as https://hooks.example.com/services/..."
    )


def test_several_wrong_values_are_named_at_once() -> None:
    env = {"LANES": "none", "BATCH_SIZE": "2", "START_FROM": "now", "KAFKA_CLIENT_GROUP_ID": "x", "MAX_FUTURE": "soon"}
    said = message_of(env)
    for name in ("LANES='none'", "START_FROM='now'", "MAX_FUTURE='soon'", "KAFKA_CLIENT_GROUP_ID"):
        assert name in said
    assert "BATCH_SIZE" not in said


def test_unknown_variables_are_nobodys_business() -> None:
    assert Settings.from_env({"PATH": "/bin", "KAFKA_TOPICS": "x", "POSTGRES": "x"}) == Settings()


def test_secrets_are_in_no_repr_and_in_no_error() -> None:
    secrets = {
        "POSTGRES_PASSWORD": "hunter2",
        "KAFKA_CLIENT_SASL_PASSWORD": "hunter2",
        "KAFKA_CLIENT_SSL_KEY_PASSWORD": "hunter2",
        "ALERT_WEBHOOK_URL": "https://hooks.example.com/hunter2",
    }
    settings = Settings.from_env(secrets)
    assert settings.postgres_password == settings.kafka_client["sasl.password"] == "hunter2"
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings)
    said = message_of({**secrets, "LANES": "0", "KAFKA_CLIENT_GROUP_ID": "hunter2"})
    assert "hunter2" not in said


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_secret_may_be_a_file(name: str, end: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(f"https://a/hunter2{end}".encode())
    env = {f"{name}_FILE": f" {tmp_path / 'secret'} "}
    assert with_secrets(env) == {name: "https://a/hunter2"}
    assert Settings.from_env(env) == Settings.from_env({name: "https://a/hunter2"})
    assert env.keys() == {f"{name}_FILE"}


def test_of_a_secrets_file_only_the_line_end_is_not_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(" w\u00f6rd \n\n")
    assert with_secrets({"POSTGRES_PASSWORD_FILE": str(tmp_path / "secret")}) == {"POSTGRES_PASSWORD": " w\u00f6rd \n"}
    assert with_secrets({"POSTGRES_PASSWORD_FILE": " ", "POSTGRES_PASSWORD": "x"}) == {"POSTGRES_PASSWORD": "x"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory); name a file that this process's user may read"),
        (b"", "is empty; write the secret into it"),
        (b"\n", "is empty; write the secret into it"),
        (b"\xff\xfe", "is not UTF-8 text; name the file that holds the secret"),
    ],
)
def test_a_secrets_file_that_does_not_serve_is_named_with_what_to_do(
    content: bytes | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    assert message_of({"POSTGRES_PASSWORD_FILE": str(path)}) == f"POSTGRES_PASSWORD_FILE={path} {said}"


def test_a_secret_is_given_once(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2")
    env = {"POSTGRES_PASSWORD": "hunter2", "POSTGRES_PASSWORD_FILE": str(tmp_path / "secret")}
    assert message_of(env) == "both POSTGRES_PASSWORD and POSTGRES_PASSWORD_FILE are set; unset one of them"


def test_any_librdkafka_property_can_be_set() -> None:
    env = {
        "KAFKA_CLIENT_SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA_CLIENT_SASL_MECHANISM": "PLAIN",
        "KAFKA_CLIENT_FETCH_MAX_BYTES": "1000",
        "KAFKA_CLIENT_CLIENT_ID": "  kept as it is ",
        "KAFKA_CLIENT_SSL_CA_LOCATION": "",
        "KAFKA_CLIENTELE": "x",
    }
    assert Settings.from_env(env).kafka_client == {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "PLAIN",
        "fetch.max.bytes": "1000",
        "client.id": "  kept as it is ",
    }


@pytest.mark.parametrize("property_name", sorted(_RESERVED_PROPERTIES))
def test_a_property_that_carries_a_guarantee_may_not_be_set(property_name: str) -> None:
    name = "KAFKA_CLIENT_" + property_name.upper().replace(".", "_")
    said = message_of({name: "x"})
    assert name in said
    assert "may not be set here" in said


def test_the_properties_that_carry_a_guarantee_are_these() -> None:
    assert {
        "bootstrap.servers",
        "group.id",
        "enable.auto.commit",
        "enable.auto.offset.store",
        "auto.offset.reset",
        "isolation.level",
        "enable.partition.eof",
    } <= _RESERVED_PROPERTIES.keys()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("30 sec", 30),
        ("1 second", 1),
        ("1.5 seconds", 1.5),
        ("15min", 900),
        ("1 minute", 60),
        ("2 minutes", 120),
        ("12h", 43_200),
        ("1 hour", 3_600),
        ("12 Hours", 43_200),
        ("1d", 86_400),
        ("0.5 day", 43_200),
        ("3 days", 259_200),
        (" 2w ", 1_209_600),
        ("1 week", 604_800),
        ("2 weeks", 1_209_600),
    ],
)
def test_a_duration_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "s", "1", "1 2 s", "1 sx", "-1s", "1,5 s", "nan s", "inf s", "1 y", "1 ms"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="must be a duration"):
        parse_duration(text)


NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-01T12:00:00+01:00", datetime(2026, 1, 1, 11, tzinfo=UTC)),
        ("2026-01-01T12:00:00", datetime(2026, 1, 1, 12, tzinfo=UTC)),
        ("2026-01-01", datetime(2026, 1, 1, tzinfo=UTC)),
        ("7 days", datetime(2026, 2, 22, 12, tzinfo=UTC)),
        ("90s", datetime(2026, 3, 1, 11, 58, 30, tzinfo=UTC)),
    ],
)
def test_a_moment_is_a_time_or_a_duration_that_lies_back(text: str, moment: datetime) -> None:
    assert parse_moment(text, NOW) == moment


@pytest.mark.parametrize("text", ["soon", "", "-1 day", "999999999 days", "2026-13-01"])
def test_anything_else_is_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is neither an ISO 8601 time nor a duration"):
        parse_moment(text, NOW)


def test_a_time_may_not_end_before_it_begins() -> None:
    for since, until in [(None, None), (NOW, None), (None, NOW), (NOW, NOW)]:
        check_order(since, until)
    with pytest.raises(ConfigurationError, match=r"since \(2026-03-01T12:00:00\+00:00\) lies after until"):
        check_order(NOW, datetime(2026, 2, 1, tzinfo=UTC))


def test_what_the_settings_allow_at_most_is_said_in_one_sentence() -> None:
    settings = Settings.from_env({"BATCH_SIZE": "100", "LANES": "3", "COMMIT_INTERVAL_MS": "10000"})
    assert settings.interval_seconds == 10
    # Four batches of a lane planned at each look.
    assert settings.most_readings_per_second == 3 * 4 * 100 / 10
    assert settings.capacity_note().endswith("allow at most 120 readings/s")
    # The daemon looks every five seconds at best.
    assert Settings.from_env({"COMMIT_INTERVAL_MS": "1"}).interval_seconds == 5
