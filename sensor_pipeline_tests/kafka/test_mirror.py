"""The group's offsets mirror a ledger, and are never believed: not even by a database that has no ledger yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import accepted_gaps, catch_up, check_rows
from sensor_pipeline_tests.kafka.producing import Publisher, group_offsets, set_group_offsets


def test_a_mirror_is_not_taken_for_the_place_where_an_older_consumer_stopped(
    settings: Settings, postgres: Settings, administer: Callable[[str], None]
) -> None:
    """As after a restore of the database to before the first start, where START_FROM=group still stands."""
    taking_over = replace(settings, start_from="group")
    publisher = Publisher(settings)
    publisher.readings({0: 6, 1: 4})
    set_group_offsets(settings, {0: 2, 1: 0})
    catch_up(Pipeline(taking_over))
    check_rows(settings, [m for m in publisher.published if (m.partition, m.offset) not in ((0, 0), (0, 1))])
    assert group_offsets(settings) == {0: 6, 1: 4}

    restored = replace(taking_over, postgres_db=f"{settings.postgres_db}_restored")
    administer(f"CREATE DATABASE {restored.postgres_db} TEMPLATE {postgres.postgres_db}")
    try:
        catch_up(Pipeline(restored))
        check_rows(restored, publisher.published)
        assert accepted_gaps(restored) == []
    finally:
        administer(f"DROP DATABASE {restored.postgres_db} WITH (FORCE)")
