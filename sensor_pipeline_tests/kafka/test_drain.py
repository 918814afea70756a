"""The drain reads exactly its ranges, and accounts for every offset in them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.drained import Records
from sensor_pipeline.errors import ConfigurationError, UnavailableError
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.kafka import drain as drain_module
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import batch, catch_up, check_rows, ledger_ranges, query, totals
from sensor_pipeline_tests.kafka.odd_headers import send_with_header
from sensor_pipeline_tests.kafka.producing import MessageRefusedError, Publisher, create_topic, reading
from sensor_pipeline_tests.oracle import Published


def test_a_batch_brings_in_exactly_its_ranges(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 10, 1: 10, 2: 10, 3: 10})
    ranges = {0: (0, 10), 1: (3, 7), 3: (9, 10)}

    written = pipeline.run(batch(pipeline.settings, ranges))

    assert written.inserted == 10 + 4 + 1
    inside = [m for m in publisher.published if m.partition in ranges and m.offset in range(*ranges[m.partition])]
    check_rows(pipeline.settings, inside)
    assert ledger_ranges(pipeline.settings, publisher.topic_id) == {0: [(0, 10)], 1: [(3, 7)], 3: [(9, 10)]}


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_drain_in_chunks_of_any_size_is_the_same(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(drain_module, "_CHUNK_MESSAGES", chunk)
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 9, 1: 4, 2: 1})
    wanted = batch(pipeline.settings, {0: (1, 8), 1: (0, 4), 2: (0, 1)})

    parts = list(pipeline.kafka.drain(wanted, wanted.ranges))

    records = [part for part in parts if isinstance(part, Records)]
    found = sorted(
        (p, o) for part in records for p, o in zip(part.partition.tolist(), part.offset.tolist(), strict=True)
    )
    assert found == [(0, o) for o in range(1, 8)] + [(1, o) for o in range(4)] + [(2, 0)]
    assert max(len(part.value) for part in records) <= chunk
    assert parts[-1] == []


def test_a_batch_that_is_partly_ingested_brings_in_the_rest(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 10, 1: 6})
    pipeline.run(batch(pipeline.settings, {0: (3, 5), 1: (0, 6)}))

    written = pipeline.run(batch(pipeline.settings, {0: (0, 10), 1: (2, 6)}))

    assert (written.inserted, written.already_ingested) == (8, 2 + 4)
    check_rows(pipeline.settings, publisher.published)


def test_a_batch_run_again_reads_and_writes_nothing(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 5})
    whole = batch(pipeline.settings, {0: (0, 5)})
    pipeline.run(whole)

    monkeypatch.setattr(pipeline.kafka, "drain", None)
    written = pipeline.run(whole)

    assert (written.batch_id, written.inserted, written.already_ingested) == (None, 0, 5)
    check_rows(pipeline.settings, publisher.published)


def test_the_environment_cannot_make_the_client_skip_what_it_must_read(settings: Settings) -> None:
    """Small fetches and a small queue, as far as librdkafka lets them be set, change nothing."""
    tight = {"fetch.message.max.bytes": "200", "queued.min.messages": "1", "fetch.queue.backoff.ms": "1"}
    pipeline = Pipeline(replace(settings, kafka_client=tight))
    publisher = Publisher(settings)
    for _ in range(5):
        publisher.readings({0: 3, 1: 3})

    pipeline.run(batch(settings, {0: (0, 15), 1: (2, 14)}))

    check_rows(settings, [m for m in publisher.published if m.partition == 0 or 2 <= m.offset < 14])


def test_a_batch_of_many_chunks_comes_in_whole(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.committed({0: 6_000, 1: 10})
    publisher.aborted({0: 1_500})
    publisher.readings({0: 5_000, 3: 1_000})

    written = pipeline.run(batch(pipeline.settings, {0: (1, 12_502), 1: (0, 11), 3: (0, 1_000)}))

    assert (written.inserted, written.no_record) == (5_999 + 5_000 + 10 + 1_000, 1 + 1_501 + 1)
    check_rows(pipeline.settings, [m for m in publisher.published if (m.partition, m.offset) != (0, 0)])


def test_the_largest_message_that_the_broker_takes_becomes_a_reading(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    envelope = b'{"machine_id":"big","timestamp":"2026-01-01","readings":{"readings":{"note":"%s"}}}'
    refused = 0
    for size in range(1_048_600, 1_048_400, -1):
        value = envelope % (b"x" * (size - len(envelope) + 2))
        try:
            publisher.send(0, value)
        except MessageRefusedError:
            refused += 1
        else:
            break
    assert refused
    assert len(publisher.published) == 1

    catch_up(pipeline)

    check_rows(pipeline.settings, publisher.published)
    assert totals(pipeline.settings) == (1, 0, 0, 0)


@pytest.mark.parametrize("limit", [1_048_576, 16_000_000])
def test_a_message_of_15_megabytes_stops_nothing_on_a_broker_that_takes_it(pipeline: Pipeline, limit: int) -> None:
    """More than a client fetches by default; whether it is a reading is for MAX_MESSAGE_BYTES to say."""
    settings = pipeline.settings
    topic = f"{settings.kafka_topics[0]}-large"
    create_topic(settings, topic, 1, {"max.message.bytes": "20000000"})
    own = replace(settings, kafka_topics=(topic,), max_message_bytes=limit)
    publisher = Publisher(own)
    publisher.readings({0: 2})
    value = b'{"machine_id":"big","timestamp":"2026-01-01","readings":{"readings":{"note":"%s"}}}' % (b"x" * 15_000_000)
    publisher.send(0, value, bad=None if limit > len(value) else "too_large")
    publisher.readings({0: 2})

    catch_up(Pipeline(own))

    check_rows(own, publisher.published)


def test_a_batch_that_asks_beyond_the_end_says_which_partition_and_where_it_ends(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 3, 1: 3})

    with pytest.raises(UnavailableError) as caught:
        pipeline.run(batch(pipeline.settings, {0: (0, 3), 1: (1, 5)}))

    assert publisher.topic in str(caught.value)
    assert "1:1-5 (its end is 3)" in str(caught.value)
    assert "0:0-3" not in str(caught.value)
    check_rows(pipeline.settings, [])


def test_a_drain_that_gets_no_further_gives_up_and_says_where(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the log is cut after its end was looked up."""
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 3, 1: 3})
    pipeline.kafka = Kafka(pipeline.settings, stall_timeout=0.3)
    monkeypatch.setattr(pipeline.kafka, "end_offsets", lambda _: {0: 3, 1: 9})

    with pytest.raises(UnavailableError, match=f"no progress for .* while reading {publisher.topic} 1:3-9 from"):
        pipeline.run(batch(pipeline.settings, {0: (0, 3), 1: (0, 9)}))


def test_a_partition_that_the_topic_does_not_have_is_named(pipeline: Pipeline) -> None:
    Publisher(pipeline.settings).readings({0: 1})
    with pytest.raises(ConfigurationError, match=f"topic {pipeline.settings.kafka_topics[0]} has no partition 4, 7"):
        pipeline.run(batch(pipeline.settings, {0: (0, 1), 4: (0, 1), 7: (0, 1)}))


def test_a_header_with_a_name_that_is_not_utf_8_does_not_stop_a_batch(pipeline: Pipeline) -> None:
    """Not many of them either: once the interpreter had specialized the call, the client's broken list got through."""
    settings = pipeline.settings
    publisher = Publisher(settings)
    publisher.readings({0: 2})
    for value, times in ((b"poison", 100), (reading("m", 1), 1)):
        send_with_header(settings.kafka_bootstrap_servers, publisher.topic, 0, value, b"\xff\xfename", times)
        bad = "not_json" if value == b"poison" else None
        offset = len(publisher.published)
        publisher.published += [
            Published(publisher.topic, publisher.topic_id, 0, offset + at, value, bad=bad) for at in range(times)
        ]
    publisher.readings({0: 1})

    catch_up(pipeline)

    check_rows(settings, publisher.published)
    kept = [{"key": "headers with a name that is not UTF-8", "value": None}]
    assert query(settings, "SELECT DISTINCT headers FROM rejected_messages") == [(kept,)]
