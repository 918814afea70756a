"""Every setting: its environment variable, its default, and what it may be.

Read once, at the start, by the definitions and the command line; everything else gets values as arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from sensor_pipeline.errors import ConfigurationError

KAFKA_CLIENT_PREFIX = "KAFKA_CLIENT_"

# The daemon looks at a sensor at best this often, whatever the sensor asks for.
DAEMON_TICK_SECONDS = 5

# Of a lane, this many batches are in flight: one writes, the next one starts up, drains and waits for it.
BATCHES_IN_FLIGHT = 2
# Under a backlog so many, in flight included, are planned: one that ends is followed at once and not at the next look.
BATCHES_PLANNED = 4

# What happened longer ago is recorded when it is found, and nobody is told.
ALERT_MAX_AGE = timedelta(days=1)

# Each may be given in a file instead, named by the variable with _FILE at its end.
SECRETS = ("POSTGRES_PASSWORD", "ALERT_WEBHOOK_URL", "KAFKA_CLIENT_SASL_PASSWORD", "KAFKA_CLIENT_SSL_KEY_PASSWORD")

_SLOW_READINGS_PER_SECOND = 10_000

# librdkafka properties that carry a guarantee; the pipeline sets them itself.
_RESERVED_PROPERTIES = {
    "bootstrap.servers": "set KAFKA_BOOTSTRAP_SERVERS",
    "metadata.broker.list": "set KAFKA_BOOTSTRAP_SERVERS",
    "group.id": "set KAFKA_GROUP_ID",
    "enable.auto.commit": "offsets are committed after the database, never on a timer",
    "enable.auto.offset.store": "offsets are committed after the database, never on a timer",
    "auto.offset.reset": "offsets are never reset; see START_FROM",
    "isolation.level": "the pipeline reads committed records only",
    "enable.partition.eof": "the pipeline needs it on",
}

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|sec|seconds?|min|minutes?|h|hours?|d|days?|w|weeks?)")
# PostgreSQL counts back from now with it.
_TEN_YEARS = timedelta(days=3650)
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

StartFrom = Literal["earliest", "latest", "group"] | datetime
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Validated settings. `from_env` makes them; secrets are left out of `repr`."""

    kafka_bootstrap_servers: str = "localhost:9092"
    kafka_topics: tuple[str, ...] = ("machine.sensor.readings",)
    kafka_group_id: str = "sensor-consumer-group"
    kafka_client: Mapping[str, str] = field(default_factory=dict, repr=False)
    postgres_host: str = "localhost"
    postgres_port: int = 5432
    postgres_user: str = "sensor_user"
    postgres_password: str = field(default="sensor_password", repr=False)
    postgres_db: str = "sensor_data"
    postgres_sslmode: str | None = None
    postgres_sslrootcert: str | None = None
    batch_size: int = 250_000
    commit_interval_ms: int = 5_000
    lanes: int = 1
    start_from: StartFrom = "earliest"
    max_future: timedelta = timedelta(days=1)
    max_message_bytes: int = 1_048_576
    max_rejected_share: float | None = None
    naive_timestamp_tz: ZoneInfo = field(default_factory=lambda: ZoneInfo("UTC"))
    stale_after: timedelta = timedelta(minutes=10)
    silent_after: timedelta = timedelta(hours=1)
    readings_kept_days: int | None = None
    runs_kept_days: int = 14
    batches_kept_days: int = 90
    alert_webhook_url: str | None = field(default=None, repr=False)
    alert_max_age: timedelta = ALERT_MAX_AGE
    alert_repeat: timedelta = timedelta(hours=1)
    alert_behind_after: timedelta = timedelta(minutes=15)
    alert_rejected: int = 100
    notices_kept_days: int = 7

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Settings from environment variables; one that is unset or blank takes its default.

        Raises:
            ConfigurationError: naming every variable that is wrong, what it was (never a secret) and what
                it may be; or a secret's file that cannot be read.
        """
        env = with_secrets(env)
        problems: list[str] = []
        values: dict[str, object] = {}
        for name, (attribute, parse) in _VARIABLES.items():
            text = env.get(name, "").strip() if parse is not _secret else env.get(name, "")
            if not text:
                continue
            try:
                values[attribute] = parse(text)
            except ValueError as error:
                said = name if parse is _webhook_url else f"{name}={text!r}"
                problems.append(f"{said}: {error}")
        values["kafka_client"] = _client_properties(env, problems)
        if problems:
            raise ConfigurationError("wrong setting: " + "; ".join(problems))
        return cls(**values)  # type: ignore[arg-type]

    @property
    def interval_seconds(self) -> float:
        """Seconds between two looks at the backlog, as the daemon can keep them."""
        return max(DAEMON_TICK_SECONDS, self.commit_interval_ms / 1000)

    @property
    def most_readings_per_second(self) -> float:
        """What the settings allow at most over all lanes, however fast the servers are."""
        return self.lanes * BATCHES_PLANNED * self.batch_size / self.interval_seconds

    @property
    def is_slow(self) -> bool:
        """Whether the settings hold the pipeline far under what the servers can do."""
        return self.most_readings_per_second < _SLOW_READINGS_PER_SECOND

    @property
    def postgres_tls(self) -> dict[str, Any]:
        """Libpq's parameters for TLS, as far as they are set; for the rest libpq's own rules hold."""
        set_ = {"sslmode": self.postgres_sslmode, "sslrootcert": self.postgres_sslrootcert}
        return {name: value for name, value in set_.items() if value}

    def capacity_note(self) -> str:
        """One sentence on what `BATCH_SIZE`, `LANES` and `COMMIT_INTERVAL_MS` allow at most."""
        return (
            f"BATCH_SIZE={self.batch_size}, LANES={self.lanes} and COMMIT_INTERVAL_MS="
            f"{self.commit_interval_ms} allow at most {self.most_readings_per_second:,.0f} readings/s"
        )


def with_secrets(env: Mapping[str, str], names: Sequence[str] = SECRETS) -> dict[str, str]:
    """`env` with each secret that a file holds (`POSTGRES_PASSWORD_FILE`) read into its own variable.

    A line end at the end of the file is not part of the secret; the variables that named the files are left out.

    Raises:
        ConfigurationError: a file cannot be read or is empty, or both variables are set.
    """
    found = dict(env)
    for name in names:
        path = found.pop(f"{name}_FILE", "").strip()
        if not path:
            continue
        if found.get(name):
            raise ConfigurationError(f"both {name} and {name}_FILE are set; unset one of them")
        found[name] = _read_secret(f"{name}_FILE={path}", Path(path))
    return found


def _read_secret(said: str, path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{said} cannot be read ({error.strerror}); name a file that this process's user may read"
        ) from error
    except UnicodeDecodeError:
        raise ConfigurationError(f"{said} is not UTF-8 text; name the file that holds the secret") from None
    secret = text.removesuffix("\n").removesuffix("\r")
    if not secret:
        raise ConfigurationError(f"{said} is empty; write the secret into it")
    return secret


def parse_duration(text: str) -> timedelta:
    """A duration such as `90 s`, `30min`, `12 h`, `1 day` or `2w`.

    Raises:
        ValueError: for anything else.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError("must be a duration such as 30s, 15min, 12h, 1 day or 2w")
    try:
        return timedelta(seconds=float(match[1]) * _UNIT_SECONDS[match[2][0]])
    except OverflowError:
        raise ValueError("must be a duration of at most 999999999 days") from None


def parse_moment(text: str, now: datetime) -> datetime:
    """A time: ISO 8601 (without an offset in UTC), or a duration such as `7 days` for so long before `now`.

    Raises:
        ValueError: for anything else.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        try:
            return now - parse_duration(text)
        except (ValueError, OverflowError):
            raise ValueError(f"{text!r} is neither an ISO 8601 time nor a duration such as 12h or 7 days") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def check_order(since: datetime | None, until: datetime | None) -> None:
    """Refuse a time that ends before it begins.

    Raises:
        ConfigurationError: that is so.
    """
    if since and until and since > until:
        raise ConfigurationError(f"since ({since.isoformat()}) lies after until ({until.isoformat()}); exchange them")


def _duration(low: timedelta, high: timedelta) -> Callable[[str], timedelta]:
    def parse(text: str) -> timedelta:
        duration = parse_duration(text)
        if not low <= duration <= high:
            raise ValueError(f"must be a duration from {low.total_seconds():.0f}s to {high.days} days")
        return duration

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return parse


def _share(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(%?)", text)
    share = float(Decimal(match[1]) / (100 if match[2] else 1)) if match else -1.0
    if not 0 <= share <= 1:
        raise ValueError("must be a share such as 0.2 or 20%, from 0 to 1")
    return share


def _text(text: str) -> str:
    return text


def _secret(text: str) -> str:
    return text


def _webhook_url(text: str) -> str:
    try:
        url = urlsplit(text)
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_url = False
    if not is_url or re.search(r"[^!-~]", text):
        # Never with the address itself: whoever has it can post.
        raise ValueError("must be an address such as https://hooks.example.com/services/...")
    return text


def _topics(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    bad = [name for name in names if not _TOPIC.fullmatch(name) or name in {".", ".."}]
    if bad or not names:
        raise ValueError("must be topic names, comma-separated, each of at most 249 letters, digits, '.', '_' or '-'")
    return names


def _servers(text: str) -> str:
    for server in text.split(","):
        host, _, port = server.strip().rpartition(":")
        if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
            raise ValueError("must be host:port, comma-separated for several")
    return text


def _sslmode(text: str) -> str:
    if text not in _SSL_MODES:
        raise ValueError("must be one of " + ", ".join(_SSL_MODES))
    return text


def _certificates(text: str) -> str:
    if text != "system" and not Path(text).is_file():
        raise ValueError("must be a file of PEM certificates, or system for those that the system trusts")
    return text


def _start_from(text: str) -> StartFrom:
    if text in ("earliest", "latest", "group"):
        return text  # type: ignore[return-value]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("must be earliest, latest, group or an ISO 8601 timestamp") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _zone(text: str) -> ZoneInfo:
    try:
        return ZoneInfo(text)
    except (KeyError, ValueError, OSError):
        raise ValueError("must be a time zone of the IANA database, such as UTC or Europe/Berlin") from None


_VARIABLES: dict[str, tuple[str, Callable[[str], object]]] = {
    "KAFKA_BOOTSTRAP_SERVERS": ("kafka_bootstrap_servers", _servers),
    "KAFKA_TOPIC": ("kafka_topics", _topics),
    "KAFKA_GROUP_ID": ("kafka_group_id", _text),
    "POSTGRES_HOST": ("postgres_host", _text),
    "POSTGRES_PORT": ("postgres_port", _whole(1, 65535)),
    "POSTGRES_USER": ("postgres_user", _text),
    "POSTGRES_PASSWORD": ("postgres_password", _secret),
    "POSTGRES_DB": ("postgres_db", _text),
    "POSTGRES_SSLMODE": ("postgres_sslmode", _sslmode),
    "POSTGRES_SSLROOTCERT": ("postgres_sslrootcert", _certificates),
    "BATCH_SIZE": ("batch_size", _whole(1, 10_000_000)),
    "COMMIT_INTERVAL_MS": ("commit_interval_ms", _whole(1, 86_400_000)),
    "LANES": ("lanes", _whole(1, 1024)),
    "START_FROM": ("start_from", _start_from),
    "MAX_FUTURE": ("max_future", parse_duration),
    "MAX_MESSAGE_BYTES": ("max_message_bytes", _whole(1, 100_000_000)),
    "MAX_REJECTED_SHARE": ("max_rejected_share", _share),
    "NAIVE_TIMESTAMP_TZ": ("naive_timestamp_tz", _zone),
    "STALE_AFTER": ("stale_after", parse_duration),
    "SILENT_AFTER": ("silent_after", parse_duration),
    "READINGS_KEPT_DAYS": ("readings_kept_days", _whole(1, 100_000)),
    "RUNS_KEPT_DAYS": ("runs_kept_days", _whole(1, 100_000)),
    "BATCHES_KEPT_DAYS": ("batches_kept_days", _whole(1, 100_000)),
    "ALERT_WEBHOOK_URL": ("alert_webhook_url", _webhook_url),
    "ALERT_MAX_AGE": ("alert_max_age", _duration(timedelta(0), _TEN_YEARS)),
    "ALERT_REPEAT": ("alert_repeat", _duration(timedelta(0), _TEN_YEARS)),
    "ALERT_BEHIND_AFTER": ("alert_behind_after", _duration(timedelta(minutes=1), _TEN_YEARS)),
    "ALERT_REJECTED": ("alert_rejected", _whole(0, 1_000_000_000)),
    "NOTICES_KEPT_DAYS": ("notices_kept_days", _whole(1, 3650)),
}


def _client_properties(env: Mapping[str, str], problems: list[str]) -> dict[str, str]:
    """`KAFKA_CLIENT_SECURITY_PROTOCOL` → `security.protocol`; whether librdkafka knows it, the client says."""
    properties = {}
    for name, value in sorted(env.items()):
        if not name.startswith(KAFKA_CLIENT_PREFIX) or not value:
            continue
        key = name.removeprefix(KAFKA_CLIENT_PREFIX).lower().replace("_", ".")
        if key in _RESERVED_PROPERTIES:
            problems.append(f"{name}: may not be set here ({_RESERVED_PROPERTIES[key]})")
        properties[key] = value
    return properties
