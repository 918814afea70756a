"""Records that Kafka no longer has and that were never ingested: named, accepted by a person, recorded."""

from __future__ import annotations

import getpass
from contextlib import chdir
from datetime import UTC, datetime, timedelta
from tempfile import TemporaryDirectory

import click
import pytest
from click.testing import CliRunner, Result

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.cli import main
from sensor_pipeline.drained import Records
from sensor_pipeline.errors import DataError, GapError
from sensor_pipeline.kafka import drain as drain_module
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import (
    accepted_gaps,
    backlog,
    batch,
    catch_up,
    check_counts,
    check_rows,
    query,
    slow_reader,
    totals,
)
from sensor_pipeline_tests.kafka.producing import Publisher, delete_records, recreate_topic


def environment(settings: Settings) -> dict[str, str]:
    return {
        "KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "KAFKA_TOPIC": settings.kafka_topics[0],
        "KAFKA_GROUP_ID": settings.kafka_group_id,
        "POSTGRES_HOST": settings.postgres_host,
        "POSTGRES_PORT": str(settings.postgres_port),
        "POSTGRES_USER": settings.postgres_user,
        "POSTGRES_PASSWORD": settings.postgres_password,
        "POSTGRES_DB": settings.postgres_db,
    }


def accept(settings: Settings, partition: int, *arguments: str, answer: str | None = None) -> Result:
    """`sensor-pipeline accept-gap` in a folder where no stack runs."""
    command = ["accept-gap", "--topic", settings.kafka_topics[0], "--partition", str(partition), *arguments]
    with TemporaryDirectory() as folder, chdir(folder):
        return CliRunner().invoke(main, command, env=environment(settings), input=answer)


def known_topic(pipeline: Pipeline) -> Publisher:
    """A publisher to a topic that was ingested before, so that what it loses from now on is a gap."""
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 2, 1: 2, 2: 2, 3: 2})
    catch_up(pipeline)
    return publisher


def test_a_gap_is_named_and_nothing_of_its_batch_is_written(pipeline: Pipeline) -> None:
    publisher = known_topic(pipeline)
    publisher.readings({1: 8, 2: 8})
    delete_records(pipeline.settings, publisher.topic, {1: 7, 2: 4})

    with pytest.raises(GapError) as caught:
        pipeline.run(batch(pipeline.settings, {0: (0, 2), 1: (2, 10), 2: (2, 3)}))

    message = str(caught.value)
    assert f"topic {publisher.topic}:" in message
    assert "partition 1 offsets [2, 7), partition 2 offsets [2, 3)" in message
    assert "sensor-pipeline accept-gap --topic" in message
    assert "\n" not in message
    check_rows(pipeline.settings, publisher.published[:8])


def test_a_gap_holds_up_only_its_own_partition(pipeline: Pipeline) -> None:
    publisher = known_topic(pipeline)
    publisher.readings({0: 5, 1: 5, 2: 5, 3: 5})
    delete_records(pipeline.settings, publisher.topic, {1: 4, 3: 7})

    with pytest.raises(DataError) as caught:
        catch_up(pipeline)

    assert "partition 1 offsets [2, 4)" in str(caught.value)
    assert "partition 3 offsets [2, 7)" in str(caught.value)
    check_rows(pipeline.settings, [m for m in publisher.published if m.partition in (0, 2) or m.offset < 2])


def test_an_accepted_gap_is_recorded_and_ingestion_goes_on_after_it(pipeline: Pipeline) -> None:
    publisher = known_topic(pipeline)
    publisher.readings({1: 8, 2: 3})
    delete_records(pipeline.settings, publisher.topic, {1: 6})
    before = datetime.now(UTC)

    result = accept(pipeline.settings, 1, "--reason", "the broker's disk was full", "--yes")

    assert result.exit_code == 0, result.output
    assert "4 offsets are lost: [2, 6)" in result.output
    assert accepted_gaps(pipeline.settings) == [(1, 2, 6)]
    ((who, when, why),) = query(pipeline.settings, 'SELECT who, "when", why FROM accepted_gaps')
    assert (who, why) == (getpass.getuser(), "the broker's disk was full")
    assert timedelta(0) <= when - before < timedelta(hours=1)
    assert totals(pipeline.settings) == (8, 0, 0, 4)

    catch_up(pipeline)
    check_rows(pipeline.settings, [m for m in publisher.published if m.partition != 1 or m.offset not in range(2, 6)])
    assert backlog(pipeline).lag == 0


def test_a_gap_of_a_topic_created_again_can_be_accepted_before_any_batch_of_it(pipeline: Pipeline) -> None:
    old = known_topic(pipeline)
    recreate_topic(pipeline.settings, old.topic)
    publisher = Publisher(pipeline.settings)
    publisher.readings({1: 5})
    delete_records(pipeline.settings, publisher.topic, {1: 3})

    result = accept(pipeline.settings, 1, "--reason", "it was created too late", "--yes")

    assert result.exit_code == 0, result.output
    assert accepted_gaps(pipeline.settings) == [(1, 0, 3)]
    catch_up(pipeline)
    check_rows(pipeline.settings, [*old.published, *publisher.published[3:]])


def test_a_gap_among_ranges_ingested_out_of_order_is_named_without_what_was_ingested(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 12})
    pipeline.run(batch(pipeline.settings, {0: (3, 8)}))
    delete_records(pipeline.settings, publisher.topic, {0: 10})

    with pytest.raises(GapError) as caught:
        pipeline.run(batch(pipeline.settings, {0: (0, 12)}))
    assert "[0, 3)" in str(caught.value)
    assert "[8, 10)" in str(caught.value)

    result = accept(pipeline.settings, 0, "--reason", "known", "--yes")
    assert "5 offsets are lost: [0, 3), [8, 10)" in result.output
    assert accepted_gaps(pipeline.settings) == [(0, 0, 3), (0, 8, 10)]
    catch_up(pipeline)
    check_rows(pipeline.settings, [m for m in publisher.published if m.offset in range(3, 8) or m.offset >= 10])
    assert totals(pipeline.settings) == (5 + 2, 0, 0, 5)


def test_what_was_ingested_before_it_was_deleted_is_no_gap(pipeline: Pipeline) -> None:
    publisher = known_topic(pipeline)
    publisher.readings({0: 1})
    delete_records(pipeline.settings, publisher.topic, {0: 2, 1: 2})

    catch_up(pipeline)

    check_rows(pipeline.settings, publisher.published)
    assert accepted_gaps(pipeline.settings) == []


def test_records_deleted_while_they_are_read_are_a_gap(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the offsets were checked, and after the first records came."""
    monkeypatch.setattr(drain_module, "_CHUNK_MESSAGES", 1)
    pipeline.kafka = slow_reader(pipeline.settings)
    publisher = known_topic(pipeline)
    for _ in range(10):
        publisher.readings({0: 1})
    wanted = batch(pipeline.settings, {0: (2, 12)})
    drain = pipeline.kafka.drain(wanted, wanted.ranges)
    next(drain)
    delete_records(pipeline.settings, publisher.topic, {0: 11})

    with pytest.raises(GapError, match=r"partition 0 offsets \[\d+, 11\)"):
        list(drain)


def test_records_deleted_after_they_were_read_are_not_lost(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partition 0 is read to the end of its range, partition 1 is not, and all of partition 0 goes."""
    monkeypatch.setattr(drain_module, "_CHUNK_MESSAGES", 1)
    pipeline.kafka = slow_reader(pipeline.settings)
    publisher = Publisher(pipeline.settings)
    for _ in range(12):
        publisher.readings({0: 1, 1: 1})
    wanted = batch(pipeline.settings, {0: (0, 2), 1: (0, 12)})
    parts = pipeline.kafka.drain(wanted, wanted.ranges)
    found: list[tuple[int, int]] = []

    def take(part: object) -> None:
        if isinstance(part, Records):
            found.extend(zip(part.partition.tolist(), part.offset.tolist(), strict=True))

    while not {(0, 0), (0, 1)} <= set(found):
        take(next(parts))
    delete_records(pipeline.settings, publisher.topic, {0: 12})
    for part in parts:
        take(part)

    assert sorted(found) == [(0, 0), (0, 1), *((1, offset) for offset in range(12))]


def test_where_nothing_is_lost_there_is_nothing_to_accept(pipeline: Pipeline) -> None:
    known_topic(pipeline)
    result = accept(pipeline.settings, 0, "--reason", "x", "--yes")
    assert result.exit_code == 1
    assert "partition 0 has no gap" in result.output
    assert accepted_gaps(pipeline.settings) == []


def test_a_partition_that_does_not_exist_is_not_said_to_be_complete(pipeline: Pipeline) -> None:
    known_topic(pipeline)
    result = accept(pipeline.settings, 9, "--reason", "x", "--yes")
    assert result.exit_code == 1
    assert "has no partition 9" in result.output


def test_a_loss_that_the_person_does_not_confirm_stays_a_gap(pipeline: Pipeline) -> None:
    publisher = known_topic(pipeline)
    publisher.readings({2: 3})
    delete_records(pipeline.settings, publisher.topic, {2: 4})

    result = accept(pipeline.settings, 2, "--reason", "x", answer="n\n")

    assert result.exit_code == 1
    assert accepted_gaps(pipeline.settings) == []
    assert accept(pipeline.settings, 2, "--reason", "x", answer="y\n").exit_code == 0
    assert accepted_gaps(pipeline.settings) == [(2, 2, 4)]


def test_a_gap_that_two_people_accept_at_once_is_lost_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first is asked, the second has said yes."""
    publisher = known_topic(pipeline)
    publisher.readings({2: 3})
    delete_records(pipeline.settings, publisher.topic, {2: 4})

    def second_person(*_: object, **__: object) -> bool:
        assert accept(pipeline.settings, 2, "--reason", "second", "--yes").exit_code == 0
        return True

    monkeypatch.setattr(click, "confirm", second_person)
    accept(pipeline.settings, 2, "--reason", "first")

    assert accepted_gaps(pipeline.settings) == [(2, 2, 4)]
    assert totals(pipeline.settings) == (8, 0, 0, 2)
    check_counts(pipeline.settings)
    catch_up(pipeline)
    check_rows(pipeline.settings, [m for m in publisher.published if m.partition != 2 or m.offset not in (2, 3)])


def test_records_that_were_read_before_they_were_deleted_are_not_counted_as_lost_too(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch drained them, they went, and it writes them while a person is asked to accept their loss."""
    publisher = known_topic(pipeline)
    publisher.readings({2: 3})
    running = batch(pipeline.settings, {2: (2, 5)})
    drained = pipeline.drain(running)
    delete_records(pipeline.settings, publisher.topic, {2: 4})

    def meanwhile(*_: object, **__: object) -> bool:
        monkeypatch.setattr(pipeline, "drain", lambda _: drained)
        pipeline.run(running)
        return True

    monkeypatch.setattr(click, "confirm", meanwhile)
    accept(pipeline.settings, 2, "--reason", "first")

    check_rows(pipeline.settings, publisher.published)
    assert totals(pipeline.settings) == (11, 0, 0, 0)
