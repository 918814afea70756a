"""A row that the database refuses for its own content is rejected, whole, and takes no good one with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.errors import ConfigurationError, DataError, SensorPipelineError, UnavailableError
from sensor_pipeline.offsets import Batch
from sensor_pipeline.postgres.transaction import Written
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import backlog, check_rows, query
from sensor_pipeline_tests.oracle import Published
from sensor_pipeline_tests.postgres.tables import every_row
from sensor_pipeline_tests.publishing import Publisher, message

BAD_VALUE = """ALTER TABLE readings ADD CONSTRAINT no_fever CHECK (("values" ->> 'Sensor 1')::numeric < 1000)"""
BAD_NAME = "ALTER TABLE machines ADD CONSTRAINT no_ghosts CHECK (machine_id NOT LIKE 'ghost%%')"
ONCE = """CREATE UNIQUE INDEX once ON readings_before_horizon (("values" ->> 'number'))"""
REFUSED = "refused_by_database"

Values = Callable[[int], dict[str, Any]]


def publish(
    settings: Settings, count: int, bad: Iterable[int], values: Values, *, machine: Callable[[int], str] | None = None
) -> list[Published]:
    """Readings of three machines, a second apart, a fifth of them failing; of `bad` seconds: to be refused."""
    refused = set(bad)
    publisher = Publisher(settings)
    for second in range(count):
        name = machine(second) if machine else f"m{second % 3}"
        value = message(name, second, second % 10 in (0, 1), values(second))
        publisher.send(second % 4, value, bad=REFUSED if second in refused else None, key=b"a key")
    return publisher.flush().published


def hot(seconds: Iterable[int]) -> Values:
    """Too hot for `BAD_VALUE` in these seconds."""
    chosen = set(seconds)
    return lambda second: {"Sensor 1": 5000 if second in chosen else 1}


def batch_of_all(pipeline: Pipeline) -> Batch:
    found = backlog(pipeline)
    ranges = tuple(span for p in found.partitions if (span := p.next_range))
    return Batch(found.topic.name, found.topic.kafka_topic_id, ranges)


def alter(pipeline: Pipeline, *statements: str) -> None:
    with pipeline.database.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def details(settings: Settings) -> set[str]:
    return {row.detail for row in query(settings, "SELECT detail FROM rejected_messages")}


def check_refused(settings: Settings, pipeline: Pipeline, published: list[Published], words: str) -> Written:
    """Run a batch of all: exactly the bad ones are rejected, in the database's words."""
    written = pipeline.run(batch_of_all(pipeline))
    bad = sum(1 for m in published if m.bad)
    assert (written.inserted, written.rejected) == (len(published) - bad, bad)
    assert written.rejected_by_reason == {REFUSED: bad}
    check_rows(settings, published)
    assert all(words in detail for detail in details(settings))
    return written


def check_fails_unchanged(
    settings: Settings, pipeline: Pipeline, kind: type[SensorPipelineError], words: str
) -> Callable[[], None]:
    """Run a batch of all, which fails; returns what runs it again, after the mend, and then all goes in."""
    batch = batch_of_all(pipeline)
    before = every_row(settings)
    pipeline._sleep = lambda seconds: None
    with pytest.raises(kind, match=words) as error:
        pipeline.run(batch)
    assert "\n" not in str(error.value)
    assert every_row(settings) == before
    return lambda: pipeline.run(batch) and None


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


# Found by bisection


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param((3,), id="1 healthy"),
        pytest.param((3_991,), id="1 failing"),
        pytest.param((0, 2_222), id="2"),
        pytest.param((0, 1, 2, 400, 801, 2_222, 2_223, 3_300, 3_998, 3_999), id="10"),
        pytest.param(range(2_000, 2_100), id="100 in a row"),
    ],
)
def test_refused_readings_are_found_in_few_tries_and_all_others_go_in(
    settings: Settings, pipeline: Pipeline, bad: Iterable[int]
) -> None:
    count = 4_000
    published = publish(settings, count, bad, hot(bad))
    alter(pipeline, BAD_VALUE)
    with counted(pipeline) as savepoints:
        check_refused(settings, pipeline, published, "no_fever")
    # Two tries at each level of the bisection. Besides, machines, healthy and failing readings are each tried as a
    # whole in up to three transactions.
    assert len(savepoints) <= 2 * math.ceil(math.log2(count)) * len(list(bad)) + 9


def test_a_batch_of_nothing_but_refused_readings_is_done(settings: Settings, pipeline: Pipeline) -> None:
    published = publish(settings, 40, range(40), hot(range(40)))
    alter(pipeline, BAD_VALUE)
    check_refused(settings, pipeline, published, "no_fever")
    assert backlog(pipeline).lag == 0


def test_what_was_refused_once_is_not_rejected_again_by_another_run(settings: Settings, pipeline: Pipeline) -> None:
    published = publish(settings, 40, (7, 11), hot((7, 11)))
    alter(pipeline, BAD_VALUE)
    batch = batch_of_all(pipeline)
    pipeline.run(batch)
    alter(pipeline, "ALTER TABLE readings DROP CONSTRAINT no_fever")
    assert pipeline.run(batch).already_ingested == 40
    check_rows(settings, published)


# By all means that a database has


def raising(state: str) -> tuple[str, ...]:
    """A trigger that refuses what is too hot."""
    return (
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF (NEW."values" ->> 'Sensor 1')::numeric > 1000 THEN
                RAISE EXCEPTION 'a fever' USING ERRCODE = '{state}';
            END IF;
            RETURN NEW;
        END $$
        """,
        "CREATE TRIGGER refuse BEFORE INSERT ON readings FOR EACH ROW EXECUTE FUNCTION refuse()",
    )


HOT = (3, 91)
BY_ALL_MEANS: dict[str, tuple[tuple[str, ...], Values, str]] = {
    "a trigger's check violation": (raising("check_violation"), hot(HOT), "23514: a fever"),
    "a trigger's own state of class 23": (raising("23ABC"), hot(HOT), "23ABC: a fever"),
    "a trigger's data exception": (raising("22ABC"), hot(HOT), "22ABC: a fever"),
    "a column that may not be null": (
        (
            """ALTER TABLE readings ADD COLUMN one numeric GENERATED ALWAYS AS
               (("values" ->> 'Sensor 1')::numeric) STORED NOT NULL""",
        ),
        lambda second: {} if second in HOT else {"Sensor 1": 1},
        "23502: ",
    ),
    "an expression that fails": (
        (BAD_VALUE,),
        lambda second: {"Sensor 1": "off" if second in HOT else 1},
        "22P02: invalid input syntax",
    ),
    "a domain": (
        (
            "CREATE DOMAIN mild AS jsonb CHECK ((VALUE ->> 'Sensor 1')::numeric < 1000)",
            'ALTER TABLE readings ALTER COLUMN "values" TYPE mild',
        ),
        hot(HOT),
        "mild",
    ),
    "an index whose entries may not be large": (
        ("""CREATE INDEX too_wide ON readings (("values" ->> 'note'))""",),
        lambda second: {"note": "".join(map(chr, range(1_000, 9_000))) if second in HOT else "x"},
        "54000: index row",
    ),
    "an overflow": (
        ("""CREATE INDEX as_smallint ON readings ((("values" ->> 'Sensor 1')::numeric::smallint))""",),
        lambda second: {"Sensor 1": 40_000 if second in HOT else 1},
        "22003: ",
    ),
}


@pytest.mark.parametrize("name", BY_ALL_MEANS)
def test_a_reading_is_refused_by(settings: Settings, pipeline: Pipeline, name: str) -> None:
    statements, values, words = BY_ALL_MEANS[name]
    published = publish(settings, 100, HOT, values)
    alter(pipeline, *statements)
    check_refused(settings, pipeline, published, words)


def test_of_readings_that_a_unique_index_does_not_take_together_the_earlier_one_goes_in(
    settings: Settings, pipeline: Pipeline
) -> None:
    """Each alone is taken; so are both halves of the batch."""
    publisher = Publisher(settings)
    # In order of event time: a twin far away, one beside, and one that is failing (those come after the healthy ones).
    twins = {4, 5, 38, 51, 60}
    for second in range(64):
        number = 3 if second in twins else second
        failing = second in (51, 60, 61)
        publisher.send(0, message("m", second, failing, {"number": number}), bad=REFUSED if second in twins else None)
    published = publisher.flush().published
    alter(pipeline, ONCE)
    check_refused(settings, pipeline, published, "23505: ")


def test_a_reading_that_a_unique_index_has_from_an_earlier_batch_is_refused(
    settings: Settings, pipeline: Pipeline
) -> None:
    publisher = Publisher(settings)
    alter(pipeline, ONCE)
    for second in range(20):
        publisher.send(0, message("m", second, second % 3 == 0, {"number": second}))
    publisher.flush()
    pipeline.run(batch_of_all(pipeline))
    for second in range(20, 40):
        number = 7 if second in (25, 30) else second
        bad = REFUSED if number == 7 else None
        publisher.send(1, message("m", second, second % 3 == 0, {"number": number}), bad=bad)
    published = publisher.flush().published
    pipeline.run(batch_of_all(pipeline))
    check_rows(settings, published)


# Machines


def test_a_machine_that_the_database_refuses_takes_only_its_own_readings_with_it(
    settings: Settings, pipeline: Pipeline
) -> None:
    alter(pipeline, BAD_NAME)
    ghosts = range(0, 60, 5)

    def name(second: int) -> str:
        return f"ghost{second % 2}" if second in ghosts else f"m{second % 3}"

    published = publish(settings, 60, ghosts, hot(()), machine=name)
    check_refused(settings, pipeline, published, "no_ghosts")


def test_of_machines_that_a_unique_index_does_not_take_together_the_first_by_name_goes_in(
    settings: Settings, pipeline: Pipeline
) -> None:
    alter(pipeline, "CREATE UNIQUE INDEX one_of_a_kind ON machines (lower(machine_id))")
    lower = range(0, 60, 5)
    published = publish(settings, 60, lower, hot(()), machine=lambda second: "pump" if second in lower else "PUMP")
    check_refused(settings, pipeline, published, "one_of_a_kind")


def test_a_check_of_when_a_machine_was_seen_sees_what_the_batch_says(settings: Settings, pipeline: Pipeline) -> None:
    """No row is ever there in between that would be refused for what it is not."""
    alter(
        pipeline,
        "ALTER TABLE machines ADD CONSTRAINT in_order CHECK (first_seen <= last_seen)",
        "ALTER TABLE machines ADD CONSTRAINT finite CHECK (isfinite(first_seen) AND isfinite(last_seen))",
    )
    published = publish(settings, 40, (), hot(()))
    pipeline.run(batch_of_all(pipeline))
    check_rows(settings, published)


def test_a_machine_that_a_trigger_swallows_fails_the_batch_unchanged(settings: Settings, pipeline: Pipeline) -> None:
    alter(
        pipeline,
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
        """CREATE TRIGGER swallow BEFORE INSERT ON machines FOR EACH ROW WHEN (NEW.machine_id = 'm1')
           EXECUTE FUNCTION swallow()""",
    )
    published = publish(settings, 40, (), hot(()))
    run_again = check_fails_unchanged(settings, pipeline, DataError, r"did not keep 1 .*'m1'.*table machines.*Mend it")
    alter(pipeline, "DROP FUNCTION swallow CASCADE")
    run_again()
    check_rows(settings, published)


# Not the rows' fault, or not of one row: the batch fails, and nothing is rejected

ELSEWHERE: dict[str, tuple[str, str, type[SensorPipelineError], str]] = {
    "a rejected message": (
        "ALTER TABLE rejected_messages ADD CONSTRAINT short CHECK (octet_length(payload) < 10)",
        "ALTER TABLE rejected_messages DROP CONSTRAINT short",
        DataError,
        'refuses a row for its content .*"short".*Mend what refuses it',
    ),
    "a failure": (
        "ALTER TABLE failures ADD CONSTRAINT none CHECK (start_time < '2000-01-01')",
        "ALTER TABLE failures DROP CONSTRAINT none",
        DataError,
        'refuses a row for its content .*"none".*Mend what refuses it',
    ),
    "the batch log": (
        "ALTER TABLE batches ADD CONSTRAINT none CHECK (drained < 10)",
        "ALTER TABLE batches DROP CONSTRAINT none",
        DataError,
        'refuses a row for its content .*"none".*Mend what refuses it',
    ),
    "many readings at once": (
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF (SELECT count(*) FROM new) > 20 THEN RAISE EXCEPTION 'too many' USING ERRCODE = '23514'; END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER refuse AFTER INSERT ON readings REFERENCING NEW TABLE AS new EXECUTE FUNCTION refuse()
        """,
        "DROP FUNCTION refuse CASCADE",
        DataError,
        "too many.*Mend what refuses it",
    ),
    "a reading, but only at the commit": (
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'too late' USING ERRCODE = '23514'; END $$;
        CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON readings_before_horizon DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION refuse()
        """,
        "DROP FUNCTION refuse CASCADE",
        DataError,
        "too late.*Mend what refuses it",
    ),
    "by a trigger in no state of its own": (
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'closed on Sundays'; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON readings FOR EACH ROW EXECUTE FUNCTION refuse()
        """,
        "DROP FUNCTION refuse CASCADE",
        DataError,
        "P0001.*closed on Sundays.*Mend it, then try again",
    ),
    "a reading's column has another type": (
        "ALTER TABLE readings ALTER kafka_offset TYPE integer",
        "ALTER TABLE readings ALTER kafka_offset TYPE bigint",
        ConfigurationError,
        "22P03.*look at the database's own tables",
    ),
    "a partition is missing": (
        """
        ALTER TABLE readings DETACH PARTITION readings_before_horizon
        """,
        """
        DO $$ BEGIN EXECUTE format(
            'ALTER TABLE readings ATTACH PARTITION readings_before_horizon FOR VALUES FROM (MINVALUE) TO (%%L)',
            (SELECT horizon::timestamp AT TIME ZONE 'UTC' FROM readings_horizon)
        ); END $$
        """,
        UnavailableError,
        "no partition of relation",
    ),
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_a_refusal_that_is_not_of_a_single_reading_fails_the_batch_unchanged(
    settings: Settings, pipeline: Pipeline, what: str
) -> None:
    hinder, mend, kind, words = ELSEWHERE[what]
    publisher = Publisher(settings)
    for second in range(100):
        publisher.send(second % 4, message(f"m{second % 3}", second, second % 10 in (0, 1)))
    publisher.send(0, b"not JSON at all", bad="not_json")
    published = publisher.flush().published
    alter(pipeline, hinder)
    run_again = check_fails_unchanged(settings, pipeline, kind, words)
    alter(pipeline, mend)
    run_again()
    check_rows(settings, published)


def test_a_refused_reading_that_may_not_be_rejected_either_is_not_lost(settings: Settings, pipeline: Pipeline) -> None:
    published = publish(settings, 40, (7, 11), hot((7, 11)))
    alter(pipeline, BAD_VALUE, "ALTER TABLE rejected_messages ADD CONSTRAINT shut CHECK (false) NOT VALID")
    run_again = check_fails_unchanged(settings, pipeline, DataError, '"shut".*Mend what refuses it')
    alter(pipeline, "ALTER TABLE rejected_messages DROP CONSTRAINT shut")
    run_again()
    check_rows(settings, published)
