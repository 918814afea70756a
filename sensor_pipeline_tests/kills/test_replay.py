"""`kill -9` at every point of a replay: running it again ends right, and no message is lost or there twice."""

from __future__ import annotations

import signal

import pytest

from sensor_pipeline.postgres.rejected_search import Filter
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import check_counts
from sensor_pipeline_tests.kills import victim
from sensor_pipeline_tests.oracle import Published, expected, stored
from sensor_pipeline_tests.postgres.tables import dated, ingest_once
from sensor_pipeline_tests.rejecting import (
    TOO_LARGE,
    check_verified,
    mended,
    messages,
    publish_rejected,
    replay,
    strict,
)
from sensor_pipeline_tests.soak import amount
from sensor_pipeline_tests.test_any_history import BASE, Log, message

# Two parts: as many as `victim.CHUNK_MESSAGES`, and what is left.
LATE = {3, 4, 8, 9, 10, 13, 14, 15, 16, 20, 24}


def story(settings: Settings, number: int) -> Log:
    """A topic of which some messages were rejected: they start, split, join and end failures, on a new day too."""
    log = Log(strict(settings), f"killed-{number:03}", f"killed-{number:03}-id")
    for second in range(26):
        machine = f"{number}-{'ab'[second % 2]}"
        value = message(machine, second, second // 3 % 3 == 1)
        if second in LATE:
            publish_rejected(log, 0, value)
        else:
            log.publish(0, value)
    publish_rejected(log, 1, dated(f"{number}-new", BASE.replace(tzinfo=None, year=2100 + number), True))
    log.publish(1, b"poison", bad="not_json")
    ingest_once(settings, log)
    return log


def as_stored(settings: Settings, logs: list[Log]) -> list[Published]:
    """What the oracle has to be told: whatever is rejected no more must be a reading now."""
    rejected = stored(settings).rejected
    return [m if m.place in rejected else mended([m])[0] for m in messages(*logs)]


@pytest.mark.soak
def test_a_replay_killed_at_any_point_was_done_by_whole_parts_and_the_next_one_does_the_rest(
    database_settings: Settings,
) -> None:
    settings = database_settings
    logs = [story(settings, 0)]
    points = victim.replay(settings, logs[0].topic).points
    assert [point for point in points if point.startswith("replay: DELETE FROM rejected_messages")]
    left_after = set()
    killed_at = range(0, len(points), amount(3, 1))
    for at in killed_at:
        logs.append(story(settings, at + 1))
        count = sum(1 for m in messages(logs[-1]) if m.bad == TOO_LARGE)

        end = victim.replay(settings, logs[-1].topic, kill_at=at)

        assert (len(end.points), end.killed_by) == (at + 1, signal.SIGKILL)
        now = as_stored(settings, logs)
        assert stored(settings) == expected(now)
        left = sum(1 for m in now if m.topic == logs[-1].topic and m.bad == TOO_LARGE)
        assert left in (count, count - victim.CHUNK_MESSAGES, 0)
        left_after.add(left)
        check_counts(settings)

        replay(settings, Filter(topics=[logs[-1].topic]))

        assert stored(settings) == expected(mended(messages(*logs)))
    assert len(left_after) == 3
    check_verified(settings)
    print(f"killed at {len(killed_at)} of {len(points)} points of a replay")
