"""Messages rejected from a real Kafka keep what a replay needs: the record's own time, key and headers."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.postgres.rejected_search import Filter, find
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import catch_up, check_rows, totals
from sensor_pipeline_tests.kafka.producing import Publisher, reading
from sensor_pipeline_tests.rejecting import check_verified, replay

# The times of `reading` lie around the end of January 2026.
RECORD = datetime(2026, 1, 1, tzinfo=UTC)
RECORD_MS = int(RECORD.timestamp() * 1000)


def test_a_clock_that_was_too_far_ahead_is_let_in_by_a_larger_max_future(settings: Settings) -> None:
    publisher = Publisher(settings)
    for second in range(12):
        publisher.send(
            second % 4, reading("m", second, failing=second in (3, 4)), timestamp_ms=RECORD_MS + 40 * 86_400_000
        )
    ahead = [
        publisher.send(2, reading("m", 30 + at, failing=at > 1), bad="timestamp_in_future", timestamp_ms=RECORD_MS)
        for at in range(4)
    ]
    poison = publisher.send(1, b"poison", bad="not_json", timestamp_ms=RECORD_MS)
    catch_up(Pipeline(settings))
    check_rows(settings, publisher.published)
    assert totals(settings) == (12, 5, 0, 0)

    # A day is not enough, whatever the time is now.
    assert replay(settings, Filter(reasons=["timestamp_in_future"])).readings == 0
    outcome = replay(replace(settings, max_future=timedelta(days=40)))

    assert (outcome.readings, outcome.bad_again) == (4, {"not_json": 1})
    check_rows(settings, [replace(m, bad=None) if m in ahead else m for m in publisher.published])
    assert totals(settings) == (16, 1, 0, 0)
    check_verified(settings)
    # The ledger holds all of it: nothing is drained again, and what comes next goes in behind it.
    assert catch_up(Pipeline(settings)) == []
    assert poison in publisher.published


def test_a_rejected_message_is_found_whole(settings: Settings) -> None:
    publisher = Publisher(settings)
    headers = [("trace", b"abc"), ("binary", b"\xff\x00"), ("none", None), ("trace", b"again")]
    sent = publisher.send(3, b"\xffpoison", bad="not_utf8", key=b"k\x00", headers=headers, timestamp_ms=RECORD_MS)
    catch_up(Pipeline(settings))
    with Pipeline(settings).database.begin() as connection:
        (kept,) = find(connection, publisher.topic, 3, sent.offset)
    assert (kept.topic, kept.kafka_topic_id) == (publisher.topic, publisher.topic_id)
    assert (kept.reason, kept.key, kept.payload) == ("not_utf8", b"k\x00", b"\xffpoison")
    assert list(kept.headers) == headers
    assert kept.timestamp_ms == RECORD_MS
