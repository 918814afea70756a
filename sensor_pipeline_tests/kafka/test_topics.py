"""A topic is its id, not its name: deleted and created again, given more partitions, several side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import pytest

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.drained import Records
from sensor_pipeline.errors import ConfigurationError, TopicReplacedError
from sensor_pipeline.kafka import drain as drain_module
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline_tests.kafka.inspecting import (
    accepted_gaps,
    backlog,
    batch,
    catch_up,
    check_rows,
    ledger_ranges,
    query,
    slow_reader,
    totals,
)
from sensor_pipeline_tests.kafka.producing import (
    Headers,
    Publisher,
    add_partitions,
    create_topic,
    delete_topic,
    group_offsets,
    reading,
    recreate_topic,
)


def test_a_topic_created_again_is_ingested_from_its_start_beside_the_old_rows(pipeline: Pipeline) -> None:
    old = Publisher(pipeline.settings)
    old.readings({0: 6, 1: 3})
    catch_up(pipeline)
    recreate_topic(pipeline.settings, old.topic)
    new = Publisher(pipeline.settings)
    assert new.topic_id != old.topic_id
    new.readings({0: 4, 2: 5})

    assert backlog(pipeline).lag == 9
    catch_up(pipeline)

    check_rows(pipeline.settings, [*old.published, *new.published])
    assert ledger_ranges(pipeline.settings, new.topic_id) == {0: [(0, 4)], 2: [(0, 5)]}


def test_a_topic_created_again_starts_at_0_whatever_start_from_says(pipeline: Pipeline) -> None:
    old = Publisher(pipeline.settings)
    old.readings({0: 2})
    catch_up(pipeline)
    recreate_topic(pipeline.settings, old.topic)
    new = Publisher(pipeline.settings)
    new.readings({0: 3, 3: 1})

    catch_up(Pipeline(replace(pipeline.settings, start_from="latest")))

    check_rows(pipeline.settings, [*old.published, *new.published])


def test_a_batch_of_a_topic_that_was_replaced_is_refused(pipeline: Pipeline) -> None:
    old = Publisher(pipeline.settings)
    old.readings({0: 6})
    planned = batch(pipeline.settings, {0: (0, 6)})
    recreate_topic(pipeline.settings, old.topic)
    Publisher(pipeline.settings).readings({0: 9})

    with pytest.raises(TopicReplacedError) as caught:
        pipeline.run(planned)

    assert old.topic in str(caught.value)
    assert old.topic_id in str(caught.value)
    check_rows(pipeline.settings, [])


def test_a_batch_of_a_replaced_topic_that_the_ledger_knows_is_refused(pipeline: Pipeline) -> None:
    old = Publisher(pipeline.settings)
    old.readings({0: 6})
    pipeline.run(batch(pipeline.settings, {0: (0, 4)}))
    planned = batch(pipeline.settings, {0: (2, 6)})
    recreate_topic(pipeline.settings, old.topic)
    Publisher(pipeline.settings).readings({0: 9})

    with pytest.raises(TopicReplacedError):
        pipeline.run(planned)
    check_rows(pipeline.settings, old.published[:4])


@pytest.mark.parametrize(("read", "new_length"), [(1, 2), (6, 2), (1, 30)])
def test_a_topic_replaced_while_it_is_read_gives_no_row(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, read: int, new_length: int
) -> None:
    """Whether the new one reaches as far as the batch or not."""
    monkeypatch.setattr(drain_module, "_CHUNK_MESSAGES", 1)
    old = Publisher(pipeline.settings)
    for _ in range(10):
        old.readings({0: 1})
    planned = batch(pipeline.settings, {0: (0, 10)})
    drain = slow_reader(pipeline.settings).drain(planned, planned.ranges)
    for _ in range(read):
        next(drain)
    recreate_topic(pipeline.settings, old.topic)
    Publisher(pipeline.settings).readings({0: new_length})

    with pytest.raises(TopicReplacedError):
        list(drain)


def run_with_something_in_the_middle(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, batch: Batch, moment: str, happens: Callable[[], object]
) -> None:
    """Run a batch, and let something happen at a moment of it."""
    if moment == "in the drain":
        monkeypatch.setattr(drain_module, "_CHUNK_MESSAGES", 1)
        pipeline.kafka = slow_reader(pipeline.settings)
        drain = pipeline.kafka.drain

        def interrupted(*arguments: Any) -> Iterator[Records | list[OffsetRange]]:
            parts = drain(*arguments)
            yield next(parts)
            happens()
            yield from parts

        monkeypatch.setattr(pipeline.kafka, "drain", interrupted)
    else:
        owner, name = {
            "after the drain": (pipeline, "detect"),
            "after the write": (pipeline, "commit"),
            "in the commit": (pipeline.kafka, "commit_offsets"),
        }[moment]
        step = getattr(owner, name)

        def late(*arguments: Any) -> Any:
            monkeypatch.setattr(owner, name, step)
            happens()
            return step(*arguments)

        monkeypatch.setattr(owner, name, late)
    pipeline.run(batch)


MOMENTS = ["in the drain", "after the drain", "after the write", "in the commit"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_topic_created_again_in_the_middle_of_a_batch_keeps_the_old_rows_and_starts_at_0(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """What was drained whole before is the old topic's; a drain that it cut through leaves nothing."""
    old = Publisher(pipeline.settings)
    for _ in range(6):
        old.readings({0: 1, 1: 1})
    planned = batch(pipeline.settings, {0: (0, 6), 1: (0, 6)})
    new: list[Publisher] = []

    def recreate() -> None:
        recreate_topic(pipeline.settings, old.topic)
        new.append(Publisher(pipeline.settings))
        new[0].readings({0: 9, 1: 2, 3: 1})

    expected_error = pytest.raises(TopicReplacedError) if moment == "in the drain" else nullcontext()
    with expected_error:
        run_with_something_in_the_middle(pipeline, monkeypatch, planned, moment, recreate)

    kept = [] if moment == "in the drain" else old.published
    check_rows(pipeline.settings, kept)
    if moment != "in the commit":  # there the old offsets may be the new topic's for a moment, until its first batch
        assert group_offsets(pipeline.settings) == {}
    fresh = Pipeline(pipeline.settings)
    assert backlog(fresh).lag == 12
    catch_up(fresh)
    check_rows(pipeline.settings, [*kept, *new[0].published])
    assert ledger_ranges(pipeline.settings, new[0].topic_id) == {0: [(0, 9)], 1: [(0, 2)], 3: [(0, 1)]}
    assert group_offsets(pipeline.settings) == {0: 9, 1: 2, 3: 1}


@pytest.mark.parametrize("moment", MOMENTS)
def test_partitions_added_in_the_middle_of_a_batch_come_in_with_the_next(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    publisher = Publisher(pipeline.settings)
    for _ in range(6):
        publisher.readings({0: 1, 1: 1})

    def add() -> None:
        add_partitions(pipeline.settings, publisher.topic, 6)
        publisher.renew().readings({4: 3, 5: 1, 0: 1})

    planned = batch(pipeline.settings, {0: (0, 6), 1: (0, 6)})
    run_with_something_in_the_middle(pipeline, monkeypatch, planned, moment, add)

    check_rows(pipeline.settings, publisher.published[:12])
    catch_up(Pipeline(pipeline.settings))
    check_rows(pipeline.settings, publisher.published)


def test_running_an_old_topics_batch_again_leaves_the_new_topics_group_offsets_alone(pipeline: Pipeline) -> None:
    """The old batch is in the ledger, so it has nothing to read; its offsets mean nothing in the new topic."""
    old = Publisher(pipeline.settings)
    old.readings({0: 6})
    done = batch(pipeline.settings, {0: (0, 6)})
    pipeline.run(done)
    recreate_topic(pipeline.settings, old.topic)
    new = Publisher(pipeline.settings)
    new.readings({0: 9})
    pipeline.run(batch(pipeline.settings, {0: (0, 2)}))

    with suppress(TopicReplacedError):
        pipeline.run(done)

    assert group_offsets(pipeline.settings) == {0: 2}
    check_rows(pipeline.settings, [*old.published, *new.published[:2]])


def test_a_new_partition_of_a_known_topic_starts_at_0_even_from_latest(pipeline: Pipeline) -> None:
    latest = Pipeline(replace(pipeline.settings, start_from="latest"))
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 5, 1: 5})
    catch_up(latest)
    add_partitions(pipeline.settings, publisher.topic, 6)
    publisher.renew().readings({0: 1, 4: 3, 5: 2})

    catch_up(latest)

    check_rows(pipeline.settings, publisher.published[10:])
    assert accepted_gaps(pipeline.settings) == [(0, 0, 5), (1, 0, 5)]


def test_a_topic_that_is_gone_is_a_wrong_setting(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 2})
    planned = batch(pipeline.settings, {0: (0, 2)})
    delete_topic(pipeline.settings, publisher.topic)
    with pytest.raises(ConfigurationError, match=f"there is no topic {publisher.topic} at"):
        pipeline.run(planned)
    with pytest.raises(ConfigurationError, match=f"there is no topic {publisher.topic} at"):
        catch_up(pipeline)


def test_several_topics_come_in_side_by_side(pipeline: Pipeline) -> None:
    """The same machines on both, at the same moments with different flags: ties go by the topic's name."""
    first = pipeline.settings.kafka_topics[0]
    second = f"a-{first}"
    create_topic(pipeline.settings, second, 2)
    both = replace(pipeline.settings, kafka_topics=(first, second))
    publishers = [Publisher(both, first), Publisher(both, second)]
    for at, publisher in enumerate(publishers):
        for second_of_day in range(12):
            failing = (second_of_day + at) % 3 == 0
            publisher.send(second_of_day % 2, reading("m", second_of_day, failing=failing))
            publisher.send(0, b"poison", bad="not_json")

    catch_up(Pipeline(both))

    check_rows(both, publishers[0].published + publishers[1].published)
    assert totals(both) == (24, 24, 0, 0)
    assert group_offsets(both, first) == {0: 18, 1: 6}
    assert group_offsets(both, second) == {0: 18, 1: 6}


REJECTED: list[tuple[bytes | None, bytes | None, Headers, str]] = [
    (b"poison", b"key", [("trace", b"abc")], "not_json"),
    (b"\xff\xfe", b"\xff\x00key", [("bin", b"\xff\x00\xfe"), ("nul", b"a\x00b")], "not_utf8"),
    (None, b"gone", [("none", None), ("empty", b"")], "tombstone"),
    (None, None, [], "tombstone"),
    (b"", b"", [("same", b"1"), ("same", b"2"), ("same", None)], "not_json"),
    (b"[]", "ключ".encode(), [("имя", "значение".encode()), ("", b"nameless")], "not_an_object"),
]


def test_a_rejected_message_is_kept_whole(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({1: 1})
    for value, key, headers, reason in REJECTED:
        publisher.send(1, value, key=key, headers=headers, bad=reason)
    publisher.readings({1: 1})

    catch_up(pipeline)

    check_rows(pipeline.settings, publisher.published)
    found = [row[0] for row in query(pipeline.settings, "SELECT headers FROM rejected_messages ORDER BY kafka_offset")]
    assert found == [
        [{"key": "trace", "value": "abc"}],
        [{"key": "bin", "value_base64": "/wD+"}, {"key": "nul", "value_base64": "YQBi"}],
        [{"key": "none", "value": None}, {"key": "empty", "value": ""}],
        [],
        [{"key": "same", "value": "1"}, {"key": "same", "value": "2"}, {"key": "same", "value": None}],
        [{"key": "имя", "value": "значение"}, {"key": "", "value": "nameless"}],
    ]
    details: Sequence[str] = [row[0] for row in query(pipeline.settings, "SELECT detail FROM rejected_messages")]
    assert all(details)


def test_keys_and_headers_of_good_messages_change_nothing(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    for second in range(4):
        value = reading("m", second, failing=second == 2)
        publisher.send(0, value, key=b"\xff" * second, headers=[("h", b"\xfe"), ("h", None)])
    catch_up(pipeline)
    check_rows(pipeline.settings, publisher.published)
    assert json.loads(publisher.published[0].value or b"")["machine_id"] == "m"
