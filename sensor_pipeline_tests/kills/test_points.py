"""`kill -9` at every point of a batch: the next process brings everything to the same end, and nobody helps it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace

from sensor_pipeline.offsets import OffsetRange, contiguous_prefix
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import accepted_gaps, check_counts, check_rows, ledger_ranges, query
from sensor_pipeline_tests.kafka.producing import Publisher, create_topic, delete_records, group_offsets
from sensor_pipeline_tests.kills import victim
from sensor_pipeline_tests.kills.story import Story
from sensor_pipeline_tests.oracle import Published
from sensor_pipeline_tests.postgres.tables import other_session, sessions, until
from sensor_pipeline_tests.postgres.test_concurrency import STOPS

# The order that makes a batch durable, by how its points begin. All others are found by a process that nobody kills.
ORDER = [
    "drain: before",
    "drain: after the first chunk",
    "drain: after the end",
    "drain: detected",
    "write: SELECT make_readings_day",
    "write: SELECT kafka_partition FROM ingested_offsets",
    "write: COPY without its end",
    "write: UPDATE ingested_offsets",
    "write: before COMMIT",
    "write: after COMMIT",
    "commit: before the group's offsets",
    "commit: the group's offsets were sent",
    "commit: after the group's offsets",
    "commit: after the end",
]
WRITTEN = "write: after COMMIT"


def last_of(points: Sequence[str], beginning: str) -> int:
    return max(at for at, point in enumerate(points) if point.startswith(beginning))


def check_end(settings: Settings, published: Sequence[Published]) -> None:
    """The rows are the oracle's, all is ingested, and the group's offsets are the ledger's."""
    check_rows(settings, published)
    ends: dict[int, int] = {}
    for message in published:
        ends[message.partition] = max(ends.get(message.partition, 0), message.offset + 1)
    assert prefixes(settings) == ends
    assert group_offsets(settings) == ends


def ingested(settings: Settings) -> dict[int, list[tuple[int, int]]]:
    known = query(settings, f"SELECT kafka_topic_id FROM topics WHERE name = '{settings.kafka_topics[0]}'")
    return ledger_ranges(settings, known[0][0]) if known else {}


def prefixes(settings: Settings) -> dict[int, int]:
    """How far the ledger holds each partition without a hole."""
    done = ingested(settings)
    return {p: contiguous_prefix([OffsetRange(p, *span) for span in spans]) for p, spans in done.items()}


def check_mirror_is_not_ahead(settings: Settings) -> None:
    done = prefixes(settings)
    assert all(offset <= done[p] for p, offset in group_offsets(settings).items())


def test_a_batch_killed_at_any_point_was_written_whole_or_not_at_all_and_the_next_process_ends_it(
    settings: Settings,
) -> None:
    story = Story(settings)
    settings = story.settings
    story.go_on()
    victim.catch_up(settings)
    points = victim.run_batch(settings, story.go_on()).points
    check_end(settings, story.published)
    assert sorted(ORDER, key=lambda point: last_of(points, point)) == ORDER
    written = last_of(points, WRITTEN)
    assert written == last_of(points, "write: ")
    for at in range(len(points)):
        batch = story.go_on()

        end = victim.run_batch(settings, batch, kill_at=at)

        assert (end.points, end.killed_by) == (points[: at + 1], signal.SIGKILL)
        check_rows(settings, story.published if at >= written else story.before(batch))
        check_mirror_is_not_ahead(settings)
        if at % 2:
            victim.run_batch(settings, batch)
        else:
            victim.catch_up(settings)
        check_end(settings, story.published)
    print(f"killed at {len(points)} points of a batch")


def test_a_process_killed_while_it_makes_a_topic_known_leaves_it_to_the_next_one(settings: Settings) -> None:
    """What Kafka has lost before the first start is accepted once, with all of the topic or not at all."""
    points = [point for point in first_start(settings, 0, None).points if point.startswith("plan: ")]
    registered = last_of(points[: last_of(points, "plan: UPDATE ingested_offsets") + 3], "plan: after COMMIT")
    for at in range(registered + 1):
        end = first_start(settings, at + 1, at)
        assert (end.points, end.killed_by) == (points[: at + 1], signal.SIGKILL)
    print(f"killed at {registered + 1} points of a first start")


def first_start(settings: Settings, number: int, kill_at: int | None) -> victim.End:
    """Catch up with a topic that is new to the ledger and has lost its first records; killed, and then again."""
    settings = replace(settings, kafka_topics=(f"{settings.kafka_topics[0]}-{number}",))
    create_topic(settings, settings.kafka_topics[0], 2)
    publisher = Publisher(settings)
    publisher.readings({0: 6, 1: 3}, machines=2)
    publisher.send(1, b"poison", bad="not_json")
    delete_records(settings, publisher.topic, {0: 3})
    first = victim.catch_up(settings, kill_at=kill_at)
    victim.catch_up(settings)
    check_counts(settings)
    assert ingested(settings) == {0: [(0, 6)], 1: [(0, 4)]}
    assert accepted_gaps(settings)[number:] == [(0, 0, 3)]
    assert group_offsets(settings) == {0: 6, 1: 4}
    return first


def test_a_commit_that_the_server_had_in_hand_when_its_process_was_killed_stands(settings: Settings) -> None:
    story = Story(settings)
    settings = story.settings
    story.go_on()
    victim.catch_up(settings)
    batch = story.go_on()
    commit = last_of(victim.run_batch(settings, batch).points, "write: before COMMIT")
    batch = story.go_on()
    with other_session(settings, STOPS["commit"].replace("m1", "a")):
        with victim.started(settings, batch) as process:
            until(lambda: sessions(settings, waiting=True))
            process.kill()
        assert len(process.end.points) == commit + 1
        check_rows(settings, story.before(batch))
    until(lambda: not sessions(settings))
    check_rows(settings, story.published)
    check_mirror_is_not_ahead(settings)
    victim.run_batch(settings, batch)
    check_end(settings, story.published)
