"""A row that the database refuses for its own content is rejected, whole, and takes no good one with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from sensor_pipeline.backlog import read_backlog
from sensor_pipeline.batch import Pipeline
from sensor_pipeline.errors import UnavailableError
from sensor_pipeline.offsets import Batch
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import Published, expected, stored
from sensor_pipeline_tests.publishing import Publisher, message

BAD_VALUE = """ALTER TABLE readings ADD CONSTRAINT no_fever CHECK (("values" ->> 'Sensor 1')::numeric < 1000)"""
BAD_NAME = "ALTER TABLE machines ADD CONSTRAINT no_ghosts CHECK (machine_id NOT LIKE 'ghost%%')"


def publish(settings: Settings) -> list[Published]:
    """Two hundred readings of three machines; a few healthy and a few failing ones are too hot for the CHECK."""
    publisher = Publisher(settings)
    for second in range(200):
        hot = second in (3, 90, 91, 150)
        values = {"Sensor 1": 5000 if hot else 1}
        failing = second % 10 in (0, 1)
        bad = "refused_by_database" if hot else None
        publisher.send(second % 4, message(f"m{second % 3}", second, failing, values), bad=bad, key=b"a key")
    return publisher.flush().published


def batch_of_all(pipeline: Pipeline) -> Batch:
    name = pipeline.settings.kafka_topics[0]
    backlog = read_backlog(pipeline.settings, pipeline.kafka, pipeline.database, name)
    return Batch(name, backlog.topic.kafka_topic_id, tuple(r for p in backlog.partitions if (r := p.next_range)))


def alter(pipeline: Pipeline, statement: str) -> None:
    with pipeline.database.begin() as connection:
        connection.exec_driver_sql(statement)


@contextmanager
def counted(pipeline: Pipeline) -> Iterator[list[str]]:
    """The savepoints set meanwhile: one for each try."""
    seen: list[str] = []

    def note(connection: sa.Connection, name: str) -> None:
        seen.append(name)

    sa.event.listen(pipeline.database._engine, "savepoint", note)
    try:
        yield seen
    finally:
        sa.event.remove(pipeline.database._engine, "savepoint", note)


def test_refused_readings_are_rejected_with_the_databases_words_and_all_others_go_in(
    settings: Settings, pipeline: Pipeline
) -> None:
    published = publish(settings)
    alter(pipeline, BAD_VALUE)
    batch = batch_of_all(pipeline)
    with counted(pipeline) as savepoints:
        written = pipeline.run(batch)
    assert (written.inserted, written.rejected) == (196, 4)
    assert written.rejected_by_reason == {"refused_by_database": 4}
    assert stored(settings) == expected(published)
    # Two tries at each level of the bisection; eight levels for up to 200 rows.
    assert len(savepoints) < 4 * 3 * 8
    with pipeline.database.begin() as connection:
        details = connection.exec_driver_sql("SELECT DISTINCT detail FROM rejected_messages").scalars().all()
    assert len(details) == 1
    assert "no_fever" in details[0]


def test_a_machine_that_the_database_refuses_takes_only_its_own_readings_with_it(
    settings: Settings, pipeline: Pipeline
) -> None:
    alter(pipeline, BAD_NAME)
    publisher = Publisher(settings)
    for second in range(60):
        ghost = second % 5 == 0
        name = f"ghost{second % 2}" if ghost else f"m{second % 3}"
        bad = "refused_by_database" if ghost else None
        publisher.send(second % 4, message(name, second, second % 7 == 0), bad=bad)
    published = publisher.flush().published
    pipeline.run(batch_of_all(pipeline))
    assert stored(settings) == expected(published)


def test_a_partition_that_is_missing_is_not_the_rows_fault(settings: Settings, pipeline: Pipeline) -> None:
    publish(settings)
    alter(pipeline, "DROP TABLE readings_before_horizon")
    with pytest.raises(UnavailableError):
        Pipeline(settings, sleep=lambda seconds: None).run(batch_of_all(pipeline))
    with pipeline.database.begin() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM rejected_messages").scalar_one() == 0
