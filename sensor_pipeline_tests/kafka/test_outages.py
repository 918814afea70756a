"""A broker that goes away, comes back, has cleaned its log, or has lost the end of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.catch_up import CatchUp
from sensor_pipeline.drained import Records
from sensor_pipeline.errors import DataError, UnavailableError
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.kafka import drain as drain_module
from sensor_pipeline.offsets import OffsetRange
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.brokers import TrialBroker
from sensor_pipeline_tests.kafka.inspecting import backlog, batch, catch_up, check_rows, slow_reader, totals
from sensor_pipeline_tests.kafka.producing import (
    Publisher,
    await_topic,
    eventually,
    group_offsets,
    high_watermarks,
    reading,
)

Trials = Callable[..., Settings]
# Longer than a broker needs to start on a busy machine; only a test that fails waits as long.
PATIENCE = 120


def test_a_broker_stopped_and_started_again_between_two_batches_changes_no_row(
    trial_broker: TrialBroker, make_trial: Trials
) -> None:
    settings = replace(make_trial(), batch_size=4)
    publisher = Publisher(settings)
    publisher.readings({0: 8, 1: 4})
    pipeline = Pipeline(settings)
    topic = pipeline.kafka.topic(publisher.topic)
    done = []

    def restart(*_: object) -> None:
        done.append(1)
        if len(done) == 1:
            trial_broker.stop()
            trial_broker.start()
            # The broker leads in a new epoch; a client that asks with the old one is refused.
            assert pipeline.kafka.end_offsets(topic) == {0: 8, 1: 4}

    runner = CatchUp(pipeline, restart)
    runner.run(runner.backlog())

    # Of 1, then of 2 messages each, and what is left.
    assert len(done) == 7
    check_rows(settings, publisher.published)
    assert group_offsets(settings) == {0: 8, 1: 4}


def test_a_broker_that_goes_away_during_a_drain_and_a_commit_costs_nothing_but_the_batch(
    trial_broker: TrialBroker, make_trial: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain_module, "_CHUNK_MESSAGES", 1)
    settings = make_trial()
    publisher = Publisher(settings)
    for _ in range(8):
        publisher.readings({0: 1, 1: 1})
    pipeline = Pipeline(settings)
    whole = batch(settings, {0: (0, 8), 1: (0, 8)})
    committing = batch(settings, {1: (0, 3)})
    pipeline.kafka = slow_reader(settings, timeout=1)
    drain = pipeline.kafka.drain(whole, whole.ranges)
    next(drain)
    drained = pipeline.drain(committing)
    patient = slow_reader(settings).drain(whole, whole.ranges)
    parts = [next(patient)]
    trial_broker.stop()

    with pytest.raises(UnavailableError) as caught:
        list(drain)
    assert publisher.topic in str(caught.value)
    assert settings.kafka_bootstrap_servers in str(caught.value)
    check_rows(settings, [])

    # A batch that was drained before is written, and only its mirror fails.
    pipeline.kafka = Kafka(settings, timeout=0.5)
    monkeypatch.setattr(pipeline, "drain", lambda _: drained)
    with pytest.raises(UnavailableError, match=settings.kafka_bootstrap_servers):
        pipeline.run(committing)
    check_rows(settings, [m for m in publisher.published if m.partition == 1 and m.offset < 3])

    fresh = Pipeline(settings)
    fresh.kafka = Kafka(settings, timeout=0.5)
    with pytest.raises(UnavailableError, match=settings.kafka_bootstrap_servers):
        catch_up(fresh)

    trial_broker.start()
    # A drain that has not given up meanwhile goes on where it was.
    parts += patient
    places = [
        place
        for part in parts
        if isinstance(part, Records)
        for place in zip(part.partition.tolist(), part.offset.tolist(), strict=True)
    ]
    assert sorted(places) == [(p, offset) for p in (0, 1) for offset in range(8)]
    await_topic(settings, publisher.topic)
    catch_up(Pipeline(settings))
    check_rows(settings, publisher.published)
    assert group_offsets(settings) == {0: 8, 1: 8}


def test_a_broker_that_restarts_in_the_middle_of_a_drain_is_read_on_where_it_was(
    trial_broker: TrialBroker, make_trial: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, and so without a word to its clients; the batch does not even fail."""
    monkeypatch.setattr(drain_module, "_CHUNK_MESSAGES", 1)
    settings = make_trial()
    publisher = Publisher(settings)
    for _ in range(8):
        publisher.readings({0: 1, 1: 1})
    publisher.aborted({0: 2})
    publisher.readings({0: 1})
    pipeline = Pipeline(settings)
    pipeline.kafka = slow_reader(settings, timeout=PATIENCE)
    drain = pipeline.kafka.drain

    def interrupted(*arguments: Any) -> Iterator[Records | list[OffsetRange]]:
        parts = drain(*arguments)
        yield next(parts)
        trial_broker.kill_and_start()
        yield from parts

    monkeypatch.setattr(pipeline.kafka, "drain", interrupted)
    written = pipeline.run(batch(settings, {0: (0, 12), 1: (0, 8)}))

    assert (written.inserted, written.no_record) == (17, 3)
    check_rows(settings, publisher.published)
    assert group_offsets(settings) == {0: 12, 1: 8}


def test_a_broker_that_dies_over_a_commit_and_comes_back_has_it_in_the_end(
    trial_broker: TrialBroker, make_trial: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is frozen with the connection to the group's coordinator open, so that the commit reaches it unanswered."""
    settings = make_trial()
    publisher = Publisher(settings)
    publisher.readings({0: 5, 1: 3})
    pipeline = Pipeline(settings)
    pipeline.kafka = Kafka(settings, timeout=PATIENCE)
    whole = batch(settings, {0: (0, 5), 1: (0, 3)})
    ask_group = pipeline.kafka.ask_group
    with ThreadPoolExecutor() as pool:
        restarts: list[Future[None]] = []

        def interrupted(consumer: Consumer, request: Callable[[], Any], topic: str) -> Any:
            consumer.committed([TopicPartition(topic, 0)], timeout=PATIENCE)
            trial_broker.freeze()
            restarts.append(pool.submit(trial_broker.kill_and_start))
            return ask_group(consumer, request, topic)

        monkeypatch.setattr(pipeline.kafka, "ask_group", interrupted)
        pipeline.run(whole)
        for restart in restarts:
            restart.result()
    assert restarts
    check_rows(settings, publisher.published)
    assert group_offsets(settings) == {0: 5, 1: 3}


def test_a_transaction_whose_producer_died_holds_back_its_own_partition_until_the_broker_ends_it(
    trial_broker: TrialBroker, make_trial: Trials
) -> None:
    settings = make_trial()
    publisher = Publisher(settings)
    publisher.readings({0: 2, 1: 2})
    publisher.begin_and_die({0: 3})
    publisher.readings({0: 4, 1: 4})
    pipeline = Pipeline(settings)

    # The broker looks for such transactions by itself; until then the batches go on without partition 0.
    catch_up(pipeline)
    eventually(lambda: backlog(pipeline).lag == 3 + 4 + 1, "the broker has aborted the transaction")
    catch_up(pipeline)

    check_rows(settings, publisher.published)
    assert totals(settings) == (12, 0, 4, 0)


def test_records_that_compaction_took_are_offsets_without_a_record(
    trial_broker: TrialBroker, make_trial: Trials
) -> None:
    """Ten keys, written over and over; the log cleaner leaves the last of each, and a tombstone is a message."""
    settings = make_trial(
        1,
        cleanup_policy="compact",
        min_cleanable_dirty_ratio="0.001",
        segment_ms="100",
        delete_retention_ms="86400000",
    )
    publisher = Publisher(settings)
    for second in range(40):
        publisher.send(0, reading(f"m{second % 3}", second, failing=second % 4 == 0), key=b"%d" % (second % 10))
    publisher.send(0, None, key=b"3", bad="tombstone")

    def cleaned() -> bool:
        # Segments are rolled, and so made ready for the cleaner, by the next message.
        publisher.send(0, reading("m", 99), key=b"of its own %d" % len(publisher.published))
        return len([offset for offset in readable(settings, publisher.topic) if offset <= 40]) == 10

    eventually(cleaned, "the log is compacted")
    kept = readable(settings, publisher.topic)
    assert 0 < min(kept) <= 31
    assert 40 in kept
    pipeline = Pipeline(settings)

    # Borders inside a hole, at its start and end, and a batch of nothing but a hole.
    end = max(kept) + 1
    for start, stop in ((0, 10), (10, 31), (31, 41), (41, end)):
        pipeline.run(batch(settings, {0: (start, stop)}))

    check_rows(settings, [m for m in publisher.published if m.offset in kept])
    assert totals(settings)[2] == end - len(kept) == 31


def readable(settings: Settings, topic: str) -> set[int]:
    """The offsets of partition 0 that a plain consumer is given."""
    end = high_watermarks(settings, topic)[0]
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka_bootstrap_servers,
            "group.id": "looking",
            "enable.auto.commit": False,
            "auto.offset.reset": "error",
            "log_level": 0,
        }
    )
    found: set[int] = set()
    try:
        consumer.assign([TopicPartition(topic, 0, 0)])
        while end - 1 not in found:
            for message in consumer.consume(1_000, 0.05):
                assert message.error() is None
                found.add(message.offset())  # type: ignore[arg-type]
        return found
    finally:
        consumer.close()


def test_a_log_that_lost_its_end_is_said_and_not_taken_for_ingested(
    trial_broker: TrialBroker, make_trial: Trials
) -> None:
    """As after an unclean leader election: the topic is the same, its offsets begin anew below the ledger's."""
    settings = make_trial()
    publisher = Publisher(settings)
    publisher.readings({0: 6, 1: 2})
    pipeline = Pipeline(settings)
    catch_up(pipeline)
    trial_broker.stop()
    for file in trial_broker.log_folder(publisher.topic, 0).iterdir():
        if file.name != "partition.metadata":
            file.unlink()
    trial_broker.start()
    again = Publisher(settings)
    assert again.topic_id == publisher.topic_id
    lost_without_a_word = again.readings({0: 4})
    assert [m.offset for m in lost_without_a_word] == [0, 1, 2, 3]
    other = again.readings({1: 3})

    with pytest.raises(DataError) as caught:
        catch_up(pipeline)

    assert publisher.topic in str(caught.value)
    assert "partition 0" in str(caught.value)
    check_rows(settings, publisher.published + other)
    assert backlog(Pipeline(settings)).lag == 0
