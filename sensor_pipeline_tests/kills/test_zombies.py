"""A process that stood still while another took its batch over goes on: the batch is written once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kills import victim
from sensor_pipeline_tests.kills.story import Story
from sensor_pipeline_tests.kills.test_points import check_end, last_of
from sensor_pipeline_tests.postgres.tables import every_row, sessions, until

BEFORE_ITS_LOCK = [
    "drain: before",
    "drain: after the first chunk",
    "drain: after the end",
    "drain: detected",
    "write: SET LOCAL jit",
    "write: SELECT kafka_partition FROM ingested_offsets",
]
WITH_ITS_LOCK = [
    "write: SELECT kafka_partition, lower(span)",
    "write: COPY without its end",
    "write: UPDATE ingested_offsets",
    "write: before COMMIT",
]


@pytest.fixture
def story(settings: Settings) -> Story:
    """A story of which some is ingested."""
    story = Story(settings)
    story.go_on()
    victim.catch_up(story.settings)
    return story


def written(end: victim.End) -> list[str]:
    return [point for point in end.points if point.startswith("written: ")]


def test_a_process_overtaken_before_it_has_its_lock_changes_no_row_and_says_that_all_was_ingested(
    story: Story,
) -> None:
    points = victim.run_batch(story.settings, story.go_on()).points
    for point in BEFORE_ITS_LOCK:
        batch = story.go_on()
        with victim.started(story.settings, batch, stop_at=last_of(points, point)) as zombie:
            until(zombie.is_stopped)
            assert written(victim.run_batch(story.settings, batch)) == [
                f"written: {len(batch) - 4} inserted, 2 already ingested"
            ]
            before = every_row(story.settings)
            zombie.wake()
        assert written(zombie.end) == [f"written: 0 inserted, {len(batch)} already ingested"]
        assert every_row(story.settings) == before
        check_end(story.settings, story.published)


def test_a_process_that_has_its_lock_is_waited_for_and_the_other_says_that_all_was_ingested(story: Story) -> None:
    points = victim.run_batch(story.settings, story.go_on()).points
    for point in WITH_ITS_LOCK:
        batch = story.go_on()
        with victim.started(story.settings, batch, stop_at=last_of(points, point)) as zombie:
            until(zombie.is_stopped)
            with victim.started(story.settings, batch) as other:
                until(lambda: sessions(story.settings, waiting=True))
                zombie.wake()
        assert written(zombie.end) == [f"written: {len(batch) - 4} inserted, 2 already ingested"]
        assert written(other.end) == [f"written: 0 inserted, {len(batch)} already ingested"]
        check_end(story.settings, story.published)


def test_a_process_that_keeps_its_lock_longer_than_the_server_allows_is_overtaken_and_says_that_all_was_ingested(
    story: Story, administer: Callable[[str], None]
) -> None:
    points = victim.run_batch(story.settings, story.go_on()).points
    batch = story.go_on()
    administer(f"ALTER DATABASE {story.settings.postgres_db} SET idle_in_transaction_session_timeout = '5s'")
    with victim.started(story.settings, batch, stop_at=last_of(points, "write: UPDATE ingested_offsets")) as zombie:
        until(zombie.is_stopped)
        other = victim.run_batch(story.settings, batch)
        zombie.wake()
    assert written(other) == [f"written: {len(batch) - 4} inserted, 2 already ingested"]
    assert written(zombie.end) == [f"written: 0 inserted, {len(batch)} already ingested"]
    check_end(story.settings, story.published)
