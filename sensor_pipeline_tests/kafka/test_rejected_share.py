"""`MAX_REJECTED_SHARE`: a producer gone wrong stops the line instead of filling the table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.errors import DataError, TooManyRejectedError
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import batch, catch_up, check_rows, query
from sensor_pipeline_tests.kafka.producing import Publisher, group_offsets


def with_poison(settings: Settings, good: int, bad: int, partition: int = 0) -> Publisher:
    publisher = Publisher(settings)
    publisher.readings({partition: good})
    for _ in range(bad):
        publisher.send(partition, b"poison", bad="not_json")
    return publisher


def test_a_batch_of_which_a_larger_share_is_rejected_fails_and_says_what_is_wrong_with_it(settings: Settings) -> None:
    publisher = with_poison(settings, good=7, bad=3)
    strict = replace(settings, max_rejected_share=0.29)
    with pytest.raises(TooManyRejectedError) as caught:
        Pipeline(strict).run(batch(settings, {0: (0, 10)}))
    said = str(caught.value)
    assert "3 of 10 messages would be rejected (3 not_json; the first is partition 0 offset 7: " in said
    assert "MAX_REJECTED_SHARE=0.29" in said
    assert "\n" not in said
    check_rows(settings, [])
    assert group_offsets(settings) == {}

    # The limit raised, or taken away, is all it takes.
    Pipeline(settings).run(batch(settings, {0: (0, 10)}))
    check_rows(settings, publisher.published)


@pytest.mark.parametrize("limit", [3 / 10, 1.0, None])
def test_a_share_that_does_not_pass_the_limit_is_rejected_and_the_batch_goes_in(
    settings: Settings, limit: float | None
) -> None:
    publisher = with_poison(settings, good=7, bad=3)
    Pipeline(replace(settings, max_rejected_share=limit)).run(batch(settings, {0: (0, 10)}))
    check_rows(settings, publisher.published)


def test_with_a_limit_of_0_a_batch_without_poison_and_one_without_a_message_go_in(settings: Settings) -> None:
    publisher = Publisher(settings)
    publisher.readings({0: 3})
    publisher.aborted({1: 2})
    Pipeline(replace(settings, max_rejected_share=0)).run(batch(settings, {0: (0, 3), 1: (0, 3)}))
    check_rows(settings, publisher.published)


def test_the_share_is_of_what_is_not_ingested_yet(settings: Settings) -> None:
    publisher = with_poison(settings, good=8, bad=2)
    Pipeline(settings).run(batch(settings, {0: (0, 7)}))
    strict = Pipeline(replace(settings, max_rejected_share=0.5))
    with pytest.raises(TooManyRejectedError, match="2 of 3 messages"):
        strict.run(batch(settings, {0: (0, 10)}))
    Pipeline(settings).run(batch(settings, {0: (7, 10)}))
    # What went in before is a success, however much of it was rejected.
    assert strict.run(batch(settings, {0: (7, 10)})).already_ingested == 3
    check_rows(settings, publisher.published)


def test_messages_that_the_database_refuses_count_too(settings: Settings) -> None:
    publisher = Publisher(settings)
    publisher.readings({0: 6})
    statement = "ALTER TABLE readings ADD CONSTRAINT never CHECK (kafka_offset <> ALL ('{1,2}'::bigint[]))"
    pipeline = Pipeline(replace(settings, max_rejected_share=0.2))
    with pipeline.database.begin() as connection:
        connection.exec_driver_sql(statement)
    with pytest.raises(TooManyRejectedError, match=r"2 of 6 messages would be rejected .2 refused_by_database"):
        pipeline.run(batch(settings, {0: (0, 6)}))
    check_rows(settings, [])


def test_a_producer_gone_wrong_stops_its_partition_and_no_other(settings: Settings) -> None:
    wrong = with_poison(settings, good=4, bad=40, partition=1)
    sound = Publisher(settings)
    sound.readings({0: 30, 2: 30})
    strict = Pipeline(replace(settings, max_rejected_share=0.1, batch_size=32))
    with pytest.raises(DataError, match=r"not all was ingested.*partition 1.*MAX_REJECTED_SHARE=0.1"):
        catch_up(strict)
    ingested = query(settings, "SELECT kafka_partition, readings FROM ingested_offsets WHERE readings > 0 ORDER BY 1")
    assert [(p, n) for p, n in ingested if p != 1] == [(0, 30), (2, 30)]
    assert query(settings, "SELECT count(*) FROM rejected_messages")[0][0] == 0

    catch_up(Pipeline(settings))
    check_rows(settings, [*wrong.published, *sound.published])
