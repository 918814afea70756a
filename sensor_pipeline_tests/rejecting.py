"""Messages that one setting rejects and another one takes, and what is stored once they were replayed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random

import sqlalchemy as sa

from sensor_pipeline.postgres import verify
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.rejected_search import Filter
from sensor_pipeline.postgres.verify import SNAPSHOT, find_machines, look
from sensor_pipeline.replay import Outcome, Replay
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import Published, Rows, connect, expected, stored
from sensor_pipeline_tests.test_any_history import Log, message

# No message of the tests is as long, unless it is made so.
_FEW_BYTES = 250
TOO_LARGE = "too_large"


def strict(settings: Settings) -> Settings:
    """Settings by which what is `long` is rejected."""
    return replace(settings, max_message_bytes=_FEW_BYTES)


def long(value: bytes) -> bytes:
    """The same reading in more bytes, by a field that is ignored."""
    document = json.loads(value)
    return json.dumps(document | {"note": "x" * _FEW_BYTES}).encode()


def publish_rejected(log: Log, partition: int, value: bytes) -> None:
    """A reading that is rejected at first."""
    log.publish(partition, long(value), bad=TOO_LARGE)


def rejecting_history(settings: Settings, *, seed: int = 1, readings: int = 200) -> Log:
    """Four partitions, few machines, failures of all kinds, late readings, poison; a third is rejected at first."""
    random = Random(seed)
    log = Log(strict(settings), f"rejecting-{seed}", f"rejecting-{seed}-id")
    for at in range(readings):
        second = at // 4 - (random.randrange(40) if random.random() < 0.3 else 0)
        machine = random.randrange(3)
        failing = (second // 5 + machine) % 3 == 0 if random.random() < 0.9 else random.random() < 0.5
        value = message(f"m{machine}", second, failing)
        if random.random() < 0.35:
            publish_rejected(log, random.randrange(4), value)
        else:
            log.publish(random.randrange(4), value)
        if random.random() < 0.05:
            log.publish(random.randrange(4), b"poison", bad="not_json")
    # A machine of which everything was rejected.
    publish_rejected(log, 0, message("m-new", 3, True))
    return log


def messages(*logs: Log) -> list[Published]:
    """All that was published."""
    return [message for log in logs for of_partition in log.partitions.values() for message in of_partition]


def mended(published: Iterable[Published]) -> list[Published]:
    """What was `long` is a reading now; everything else is as it was."""
    return [replace(m, bad=None) if m.bad == TOO_LARGE else m for m in published]


def want_replayed(*logs: Log) -> Rows:
    """The rows that all messages of these logs must be after a replay."""
    return expected(mended(messages(*logs)))


def replay(settings: Settings, wanted: Filter | None = None, *, dry_run: bool = False) -> Outcome:
    """Replay by these settings, with no pause between tries."""
    return Replay(settings, wanted or Filter(), dry_run=dry_run, sleep=lambda _: None).run(lambda _: None)


def check_verified(settings: Settings, machines: Iterable[str] = ()) -> None:
    """What `sensor-pipeline verify` asks, of the whole database; of failures only those of some machines, if named."""
    with Database(settings).begin() as connection:
        connection.execute(SNAPSHOT)
        for check in verify.CHECKS:
            assert verify.ask(connection, check).examples == [], check.title
        for machine in find_machines(connection, list(machines)):
            assert look(connection, machine) == ([], None)


def check_replayed(settings: Settings, *logs: Log) -> None:
    """The rows are the oracle's, and everything adds up."""
    want, got = want_replayed(*logs), stored(settings)
    assert got.readings == want.readings
    assert got.rejected == want.rejected
    assert got.failures == want.failures
    assert got.machines == want.machines
    check_verified(settings)


def query(settings: Settings, statement: str) -> Sequence[sa.Row[tuple[object, ...]]]:
    """The rows of a statement."""
    with connect(settings).connect() as connection:
        return connection.execute(sa.text(statement)).all()
