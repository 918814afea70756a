"""Where a topic that was never seen before begins, and what is recorded of what lies before."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from sensor_pipeline.backlog import read_backlog
from sensor_pipeline.batch import Pipeline
from sensor_pipeline.settings import Settings, StartFrom
from sensor_pipeline_tests.kafka.inspecting import (
    accepted_gaps,
    backlog,
    batch,
    catch_up,
    check_rows,
    ledger_ranges,
    query,
    totals,
)
from sensor_pipeline_tests.kafka.producing import Publisher, delete_records, reading, set_group_offsets

MORNING = datetime(2026, 1, 5, 8, tzinfo=UTC)


def starting(settings: Settings, start_from: StartFrom) -> Pipeline:
    return Pipeline(replace(settings, start_from=start_from))


def reasons(settings: Settings) -> set[tuple[str, str]]:
    return {(who, why) for who, why in query(settings, "SELECT who, why FROM accepted_gaps")}


def test_earliest_takes_all_that_kafka_has(settings: Settings) -> None:
    publisher = Publisher(settings)
    publisher.readings({0: 4, 2: 3})
    catch_up(starting(settings, "earliest"))
    check_rows(settings, publisher.published)
    assert accepted_gaps(settings) == []


def test_earliest_accepts_what_kafka_had_lost_before_the_first_start(settings: Settings) -> None:
    publisher = Publisher(settings)
    publisher.readings({0: 8, 1: 5, 2: 3})
    delete_records(settings, publisher.topic, {0: 6, 1: 5})

    catch_up(starting(settings, "earliest"))

    check_rows(
        settings,
        [m for m in publisher.published if m.partition == 2 or (m.partition == 0 and m.offset >= 6)],
    )
    assert accepted_gaps(settings) == [(0, 0, 6), (1, 0, 5)]
    assert reasons(settings) == {("START_FROM", "first start with START_FROM=earliest")}
    assert totals(settings) == (2 + 3, 0, 0, 6 + 5)
    # From then on a loss is a gap.
    publisher.readings({2: 2})
    delete_records(settings, publisher.topic, {2: 4})
    assert [p.lag for p in backlog(Pipeline(settings)).partitions if p.gap] == [2]


def test_latest_takes_what_comes_after_the_first_look(settings: Settings) -> None:
    publisher = Publisher(settings)
    publisher.readings({0: 4, 2: 3})
    latest = starting(settings, "latest")
    assert backlog(latest).lag == 0
    new = publisher.readings({0: 2, 1: 1})

    catch_up(latest)

    check_rows(settings, new)
    assert accepted_gaps(settings) == [(0, 0, 4), (2, 0, 3)]
    assert reasons(settings) == {("START_FROM", "first start with START_FROM=latest")}
    assert totals(settings) == (3, 0, 0, 7)


def test_latest_begins_at_an_open_transaction(settings: Settings) -> None:
    """Its messages are not published yet, so they are not before the start."""
    publisher = Publisher(settings)
    publisher.readings({0: 4})
    transaction = publisher.begin()
    transaction.readings({0: 2})
    latest = starting(settings, "latest")
    catch_up(latest)
    transaction.commit()

    catch_up(latest)

    check_rows(settings, publisher.published[4:])


def test_group_goes_on_where_the_older_consumer_stopped(settings: Settings) -> None:
    """Partition 0 has a commit, 1 one at the end, 2 one at the start, 3 none."""
    publisher = Publisher(settings)
    publisher.readings({0: 6, 1: 4, 2: 3, 3: 2})
    set_group_offsets(settings, {0: 5, 1: 4, 2: 0})

    catch_up(starting(settings, "group"))

    check_rows(settings, [m for m in publisher.published if m.partition in (2, 3) or (m.partition, m.offset) == (0, 5)])
    assert accepted_gaps(settings) == [(0, 0, 5), (1, 0, 4)]
    assert reasons(settings) == {("START_FROM", "first start with START_FROM=group")}
    assert totals(settings) == (1 + 3 + 2, 0, 0, 5 + 4)


def test_group_offsets_older_than_what_kafka_has_are_said_in_the_record(settings: Settings) -> None:
    publisher = Publisher(settings)
    publisher.readings({0: 9})
    set_group_offsets(settings, {0: 2})
    delete_records(settings, publisher.topic, {0: 7})

    catch_up(starting(settings, "group"))

    check_rows(settings, publisher.published[7:])
    assert accepted_gaps(settings) == [(0, 0, 7)]
    ((_, why),) = reasons(settings)
    assert why == "first start with START_FROM=group; the group was at 2, Kafka's first offset is 7"


def test_a_group_that_read_into_an_open_transaction_is_taken_over_where_it_was(settings: Settings) -> None:
    """The older consumer did not wait for transactions to end; the log is whole all the same."""
    publisher = Publisher(settings)
    publisher.readings({0: 4})
    transaction = publisher.begin()
    transaction.readings({0: 3})
    set_group_offsets(settings, {0: 6})
    group = starting(settings, "group")

    catch_up(group)
    check_rows(settings, [])
    transaction.commit()
    publisher.readings({0: 2})
    catch_up(group)

    check_rows(settings, [m for m in publisher.published if m.offset >= 6])
    assert accepted_gaps(settings) == [(0, 0, 6)]


def test_group_offsets_past_the_end_are_not_believed(settings: Settings) -> None:
    publisher = Publisher(settings)
    publisher.readings({0: 3})
    set_group_offsets(settings, {0: 50})
    catch_up(starting(settings, "group"))
    check_rows(settings, publisher.published)
    assert accepted_gaps(settings) == []


def test_a_group_without_commits_begins_at_what_kafka_has(settings: Settings) -> None:
    publisher = Publisher(settings)
    publisher.readings({0: 5, 1: 2})
    delete_records(settings, publisher.topic, {0: 3})
    catch_up(starting(settings, "group"))
    check_rows(settings, [m for m in publisher.published if m.partition == 1 or m.offset >= 3])
    assert accepted_gaps(settings) == [(0, 0, 3)]


def test_a_timestamp_begins_at_the_first_record_that_is_not_older(settings: Settings) -> None:
    """By the Kafka records' own timestamps; on partition 1 all are older, on 2 all are newer, 3 is empty."""
    publisher = Publisher(settings)
    ages = {0: [-20, -10, 0, 10], 1: [-3, -2, -1], 2: [5, 6]}
    for partition, minutes in ages.items():
        for at, minute in enumerate(minutes):
            moment = MORNING + timedelta(minutes=minute)
            publisher.send(partition, reading("m", at), timestamp_ms=round(moment.timestamp() * 1000))

    catch_up(starting(settings, MORNING))

    wanted = {(0, 2), (0, 3), (2, 0), (2, 1)}
    # Their event times lie far ahead of the records' own.
    rejected = [replace(m, bad="timestamp_in_future") for m in publisher.published]
    check_rows(settings, [m for m in rejected if (m.partition, m.offset) in wanted])
    assert accepted_gaps(settings) == [(0, 0, 2), (1, 0, 3)]
    assert reasons(settings) == {("START_FROM", "first start with START_FROM=2026-01-05T08:00:00+00:00")}
    assert totals(settings) == (0, 4, 0, 5)


def test_a_timestamp_before_what_kafka_has_begins_at_its_first_record(settings: Settings) -> None:
    publisher = Publisher(settings)
    publisher.readings({0: 5})
    delete_records(settings, publisher.topic, {0: 2})
    catch_up(starting(settings, MORNING - timedelta(days=10_000)))
    check_rows(settings, publisher.published[2:])
    assert accepted_gaps(settings) == [(0, 0, 2)]


@pytest.mark.parametrize("later", ["earliest", "group"])
def test_another_start_from_at_a_second_start_changes_nothing(settings: Settings, later: StartFrom) -> None:
    publisher = Publisher(settings)
    publisher.readings({0: 4})
    catch_up(starting(settings, "latest"))
    before = accepted_gaps(settings)
    publisher.readings({0: 2, 1: 3})
    set_group_offsets(settings, {0: 1, 1: 2})

    catch_up(starting(settings, later))

    check_rows(settings, publisher.published[4:])
    assert accepted_gaps(settings) == before == [(0, 0, 4)]


def test_a_batch_by_hand_of_a_topic_never_seen_starts_it_too(settings: Settings) -> None:
    """A run launched in the UI before the sensor ever looked."""
    publisher = Publisher(settings)
    publisher.readings({0: 4})
    latest = starting(settings, "latest")
    wanted = batch(settings, {0: (0, 4)})

    written = latest.run(wanted)

    assert (written.inserted, written.already_ingested) == (0, 4)
    assert ledger_ranges(settings, publisher.topic_id) == {0: [(0, 4)]}
    assert totals(settings) == (0, 0, 0, 4)


def test_a_look_by_status_decides_nothing_and_shows_what_would_be(settings: Settings) -> None:
    publisher = Publisher(settings)
    old = publisher.readings({0: 4})
    pipeline = starting(settings, "latest")
    looked = read_backlog(pipeline.settings, pipeline.kafka, pipeline.database, settings.kafka_topics[0])
    assert looked.lag == 0
    assert accepted_gaps(settings) == []

    catch_up(starting(settings, "earliest"))

    check_rows(settings, old)
