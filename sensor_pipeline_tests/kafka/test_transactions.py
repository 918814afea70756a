"""Offsets without a record: transaction markers, aborted messages; and transactions that stay open."""

from __future__ import annotations

import itertools

import pytest

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.errors import UnavailableError
from sensor_pipeline_tests.kafka.inspecting import backlog, batch, catch_up, check_rows, totals
from sensor_pipeline_tests.kafka.producing import Publisher, create_topic, high_watermarks

ALL = (0, 1, 2, 3)


def on_all(count: int) -> dict[int, int]:
    return dict.fromkeys(ALL, count)


def test_every_range_of_a_log_with_transactions_accounts_for_each_of_its_offsets(pipeline: Pipeline) -> None:
    """In each partition: 2 plain, 2 committed + marker, 2 aborted + marker, 1 plain, 1 aborted + marker."""
    length = 2 + 3 + 3 + 1 + 2
    every_range = list(itertools.combinations(range(length + 1), 2))
    partitions = range(11)
    topic = f"{pipeline.settings.kafka_topics[0]}-wide"
    create_topic(pipeline.settings, topic, len(partitions))
    publisher = Publisher(pipeline.settings, topic)
    publisher.readings(dict.fromkeys(partitions, 2))
    publisher.committed(dict.fromkeys(partitions, 2))
    publisher.aborted(dict.fromkeys(partitions, 2))
    publisher.readings(dict.fromkeys(partitions, 1))
    publisher.aborted(dict.fromkeys(partitions, 1))
    assert high_watermarks(pipeline.settings, topic) == dict.fromkeys(partitions, length)
    records = {(m.partition, m.offset) for m in publisher.published}
    assert records == {(p, o) for p in partitions for o in (0, 1, 2, 3, 8)}

    for at in range(0, len(every_range), len(partitions)):
        ranges = dict(zip(partitions, every_range[at:], strict=False))
        drained = pipeline.drain(batch(pipeline.settings, ranges, topic))
        offsets = {(p, o) for p, span in ranges.items() for o in range(*span)}
        got = list(zip(drained.readings["partition"].tolist(), drained.readings["offset"].tolist(), strict=True))
        empty = [(r.partition, o) for r in drained.no_record for o in range(r.start, r.end)]
        assert sorted(got) == sorted(records & offsets)
        assert sorted(empty) == sorted(offsets - records)


def test_markers_in_the_middle_and_at_the_end_add_up_batch_by_batch(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.committed({0: 3, 1: 1})
    publisher.aborted({0: 2})
    publisher.committed({0: 1, 2: 2})

    # In turn: a batch that ends at a marker, one of nothing but a marker, aborted messages only, their
    # marker with what follows, and a marker at the very end of the log.
    batches = [{0: (0, 3), 1: (0, 2)}, {0: (3, 4)}, {0: (4, 6)}, {0: (6, 8)}, {0: (8, 9), 2: (0, 3)}]
    counts = [pipeline.run(batch(pipeline.settings, ranges)) for ranges in batches]

    assert [(w.inserted, w.no_record) for w in counts] == [(4, 1), (0, 1), (0, 2), (1, 1), (2, 2)]
    assert all(w.batch_id for w in counts)
    check_rows(pipeline.settings, publisher.published)
    assert totals(pipeline.settings) == (7, 0, 7, 0)
    assert backlog(pipeline).lag == 0


def test_a_batch_of_nothing_but_markers_and_aborted_messages_on_every_partition(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.aborted(on_all(3))
    publisher.aborted(on_all(1))

    catch_up(pipeline)

    assert totals(pipeline.settings) == (0, 0, 4 * 6, 0)
    check_rows(pipeline.settings, [])
    assert backlog(pipeline).lag == 0


def test_poison_in_an_aborted_transaction_is_no_rejected_message(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    transaction = publisher.begin()
    transaction.send(0, b"poison", bad="not_json")
    transaction.abort()
    transaction = publisher.begin()
    transaction.send(0, b"poison", bad="not_json")
    transaction.commit()

    catch_up(pipeline)

    check_rows(pipeline.settings, publisher.published)
    assert totals(pipeline.settings) == (0, 1, 3, 0)


def test_what_lies_before_an_open_transaction_comes_in_and_nothing_waits_for_it(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 3, 1: 2})
    before = list(publisher.published)
    open_transaction = publisher.begin()
    open_transaction.readings({0: 2})
    publisher.readings({0: 4, 1: 1})  # on partition 0 behind the open transaction
    before += [m for m in publisher.published[5:] if m.partition == 1]

    assert {p.partition: p.end for p in backlog(pipeline).partitions} == {0: 3, 1: 3, 2: 0, 3: 0}
    assert high_watermarks(pipeline.settings, publisher.topic)[0] == 9
    catch_up(pipeline)
    check_rows(pipeline.settings, before)
    assert backlog(pipeline).lag == 0

    open_transaction.commit()
    assert backlog(pipeline).lag == 2 + 4 + 1
    catch_up(pipeline)
    check_rows(pipeline.settings, publisher.published)


def test_a_transaction_left_open_over_many_batches_holds_back_nothing_but_what_lies_behind_it(
    pipeline: Pipeline,
) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 3, 1: 1})
    held_back = publisher.begin()
    held_back.readings({0: 1})
    for number in range(6):
        publisher.readings({0: 2, 1: 2, 2: 1})
        publisher.aborted({2: 1})
        if number == 3:
            # It goes on meanwhile, into a partition that was free until then.
            held_back.readings({3: 1})
            publisher.readings({3: 2})
        catch_up(pipeline)
        free = [m for m in publisher.published if m.partition in (1, 2) or (m.partition == 0 and m.offset < 3)]
        check_rows(pipeline.settings, free)
        assert backlog(pipeline).lag == 0

    held_back.commit()
    catch_up(pipeline)

    check_rows(pipeline.settings, publisher.published)
    assert backlog(pipeline).lag == 0


def test_a_batch_that_reaches_into_an_open_transaction_is_refused_and_done_once_it_ended(pipeline: Pipeline) -> None:
    """As one re-executed by hand with wider ranges: it neither hangs nor takes what is not committed."""
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 3, 1: 2})
    open_transaction = publisher.begin()
    open_transaction.readings({0: 2})
    reaching = batch(pipeline.settings, {0: (0, 5), 1: (0, 2)})

    with pytest.raises(UnavailableError, match=r"open transaction holds it back: 0:0-5 \(its end is 3\)"):
        pipeline.run(reaching)
    check_rows(pipeline.settings, [])
    open_transaction.commit()

    assert pipeline.run(reaching).inserted == 7
    check_rows(pipeline.settings, publisher.published)


def test_an_open_transaction_that_is_aborted_leaves_no_reading(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    open_transaction = publisher.begin()
    open_transaction.readings({0: 2, 3: 1})
    publisher.readings({0: 1})
    catch_up(pipeline)
    check_rows(pipeline.settings, [])

    open_transaction.abort()
    catch_up(pipeline)

    check_rows(pipeline.settings, publisher.published)
    assert totals(pipeline.settings) == (1, 0, 5, 0)


def test_transactions_that_overlap_end_each_in_its_own_way(pipeline: Pipeline) -> None:
    publisher = Publisher(pipeline.settings)
    one, other = publisher.begin(), publisher.begin()
    one.readings({0: 2})
    other.readings({0: 2})
    one.readings({0: 1})
    other.commit()
    assert backlog(pipeline).lag == 0
    one.abort()

    catch_up(pipeline)

    assert {m.offset for m in publisher.published} == {2, 3}
    check_rows(pipeline.settings, publisher.published)
    assert totals(pipeline.settings) == (2, 0, 5, 0)
