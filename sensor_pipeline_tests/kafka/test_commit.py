"""The group's offsets mirror the ledger's contiguous prefix, and the ledger wins wherever they differ."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from confluent_kafka import Consumer

from sensor_pipeline.backlog import read_backlog
from sensor_pipeline.batch import Pipeline
from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import backlog, batch, catch_up, check_rows, ledger_ranges
from sensor_pipeline_tests.kafka.producing import (
    Publisher,
    delete_group,
    delete_records,
    eventually,
    group_offsets,
    set_group_offsets,
)


def mirror(settings: Settings) -> dict[int, int]:
    """The group's offsets; one at 0 says the same as none."""
    return {partition: offset for partition, offset in group_offsets(settings).items() if offset}


def prefixes(settings: Settings, topic_id: str) -> dict[int, int]:
    """The ledger's contiguous prefixes, by the tests' own count; none where it is 0."""
    found = {}
    for partition, ranges in ledger_ranges(settings, topic_id).items():
        done = {offset for start, end in ranges for offset in range(start, end)}
        found[partition] = next(offset for offset in range(len(done) + 1) if offset not in done)
    return {partition: offset for partition, offset in found.items() if offset}


def test_group_offsets_are_the_ledgers_after_every_batch_in_any_order(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 12, 1: 9, 2: 4})
    batches = [{0: (a, a + 3), 1: (b, b + 3)} for a, b in ((0, 6), (3, 0), (6, 3))] + [{0: (9, 12), 2: (0, 4)}]
    random.Random(7).shuffle(batches)
    assert batches[0] != {0: (0, 3), 1: (6, 9)}

    seen = []
    for ranges in batches:
        pipeline.run(batch(pipeline.settings, ranges))
        assert mirror(pipeline.settings) == prefixes(pipeline.settings, publisher.topic_id)
        seen.append(mirror(pipeline.settings))

    assert seen[-1] == {0: 12, 1: 9, 2: 4}
    assert seen[0] != seen[1] != seen[-1]


def test_a_hole_holds_the_group_at_its_start_until_it_is_filled(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 9})
    pipeline.run(batch(pipeline.settings, {0: (3, 6)}))
    assert mirror(pipeline.settings) == {}
    pipeline.run(batch(pipeline.settings, {0: (0, 2)}))
    assert mirror(pipeline.settings) == {0: 2}
    pipeline.run(batch(pipeline.settings, {0: (2, 3)}))
    assert mirror(pipeline.settings) == {0: 6}
    pipeline.run(batch(pipeline.settings, {0: (8, 9)}))
    assert mirror(pipeline.settings) == {0: 6}


def test_the_lag_that_other_tools_see_is_the_backlog(pipeline: Pipeline) -> None:
    """With markers, aborted messages, a gap accepted at the start, and poison."""
    settings = pipeline.settings
    publisher = Publisher(settings)
    publisher.readings({0: 5, 1: 5})
    delete_records(settings, publisher.topic, {1: 3})
    publisher.committed({0: 2})
    publisher.aborted({1: 2})
    publisher.send(2, None, bad="tombstone")

    catch_up(pipeline)

    ends = pipeline.kafka.end_offsets(pipeline.kafka.topic(publisher.topic))
    assert mirror(settings) == {p: end for p, end in ends.items() if end} == {0: 8, 1: 8, 2: 1}


@pytest.mark.parametrize("moved", [0, 5, 1_000])
def test_group_offsets_moved_by_hand_change_no_row_and_are_mended_by_the_next_batch(
    pipeline: Pipeline, moved: int
) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 4, 1: 2})
    catch_up(pipeline)
    publisher.readings({0: 2, 1: 1})
    set_group_offsets(pipeline.settings, {0: moved, 1: moved})

    assert backlog(pipeline).lag == 3
    catch_up(pipeline)

    check_rows(pipeline.settings, publisher.published)
    assert mirror(pipeline.settings) == {0: 6, 1: 3}


@pytest.mark.parametrize("moved", [3, 9, 10, 11, 2**62])
def test_group_offsets_before_the_start_of_the_log_and_beyond_its_end_change_no_row(
    pipeline: Pipeline, moved: int
) -> None:
    """Kafka has offsets 7 to 10; a consumer that believed the group would be reset, or see nothing."""
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 9})
    catch_up(pipeline)
    delete_records(pipeline.settings, publisher.topic, {0: 7})
    publisher.readings({0: 1})
    set_group_offsets(pipeline.settings, {0: moved, 3: moved})

    assert backlog(pipeline).lag == 1
    catch_up(pipeline)

    check_rows(pipeline.settings, publisher.published)
    assert mirror(pipeline.settings)[0] == 10


def test_a_group_that_was_deleted_is_made_again_by_the_next_batch(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 4, 1: 2})
    catch_up(pipeline)
    publisher.readings({0: 1, 1: 1})
    delete_group(pipeline.settings)
    assert mirror(pipeline.settings) == {}

    assert backlog(pipeline).lag == 2
    catch_up(pipeline)

    check_rows(pipeline.settings, publisher.published)
    assert mirror(pipeline.settings) == {0: 5, 1: 3}


def test_a_batch_run_again_mends_the_mirror_too(pipeline: Pipeline) -> None:
    Publisher(pipeline.settings).readings({0: 4})
    whole = batch(pipeline.settings, {0: (0, 4)})
    pipeline.run(whole)
    set_group_offsets(pipeline.settings, {0: 1})
    pipeline.run(whole)
    assert mirror(pipeline.settings) == {0: 4}


def test_group_offsets_moved_by_hand_are_mended_where_the_ledger_has_nothing_from_the_start(
    pipeline: Pipeline,
) -> None:
    """The prefix is 0, which a group can hold as well as any offset."""
    Publisher(pipeline.settings).readings({0: 9})
    set_group_offsets(pipeline.settings, {0: 7})

    pipeline.run(batch(pipeline.settings, {0: (3, 6)}))

    assert mirror(pipeline.settings) == {}


def test_a_commit_that_did_not_happen_is_made_up_for_by_the_next_batch(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the database's commit and Kafka's."""
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 6})
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.kafka, "commit_offsets", _killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(batch(pipeline.settings, {0: (0, 3)}))
    assert mirror(pipeline.settings) == {}

    assert backlog(pipeline).lag == 3
    catch_up(pipeline)

    assert mirror(pipeline.settings) == {0: 6}
    check_rows(pipeline.settings, publisher.published)


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_batch_that_commits_meanwhile_is_not_overtaken(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other batch ends between this one's look at the ledger and its commit."""
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 6})
    other = Pipeline(pipeline.settings)
    commit_offsets = pipeline.kafka.commit_offsets

    def late(topic: str, offsets: dict[int, int]) -> None:
        monkeypatch.setattr(pipeline.kafka, "commit_offsets", commit_offsets)
        other.run(batch(pipeline.settings, {0: (3, 6)}))
        commit_offsets(topic, offsets)

    monkeypatch.setattr(pipeline.kafka, "commit_offsets", late)
    pipeline.run(batch(pipeline.settings, {0: (0, 3)}))

    assert mirror(pipeline.settings) == {0: 6}
    check_rows(pipeline.settings, publisher.published)


def test_an_older_consumer_that_still_runs_in_the_group_is_named_as_the_trouble(pipeline: Pipeline) -> None:
    settings = pipeline.settings
    publisher = Publisher(settings)
    publisher.readings({0: 3})
    older = Consumer(
        {"bootstrap.servers": settings.kafka_bootstrap_servers, "group.id": settings.kafka_group_id, "log_level": 0}
    )
    try:
        older.subscribe([publisher.topic])
        eventually(lambda: older.poll(0.1) is None and older.assignment(), "the older consumer has its partitions")
        with pytest.raises(ConfigurationError, match=settings.kafka_group_id) as caught:
            pipeline.run(batch(settings, {0: (0, 3)}))
        assert "KAFKA_GROUP_ID" in str(caught.value)
    finally:
        older.close()
    # It was only the mirror.
    check_rows(settings, publisher.published)


def test_each_group_has_its_own_mirror_and_all_share_the_ledger(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 3})
    catch_up(pipeline)
    other = Pipeline(replace(pipeline.settings, kafka_group_id=f"{pipeline.settings.kafka_group_id}-new"))
    assert read_backlog(other.settings, other.kafka, other.database, publisher.topic).lag == 0
    publisher.readings({0: 1})
    catch_up(other)
    assert group_offsets(other.settings) == {0: 4}
    assert group_offsets(pipeline.settings) == {0: 3}
    check_rows(pipeline.settings, publisher.published)
