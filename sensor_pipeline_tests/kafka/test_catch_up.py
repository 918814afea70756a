"""`CatchUp` comes to the same rows, however the backlog is cut and whatever happens between two batches."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from dataclasses import replace
from tempfile import TemporaryDirectory

import pytest
from click.testing import CliRunner, Result

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.catch_up import CatchUp
from sensor_pipeline.cli import main
from sensor_pipeline.drained import Drained
from sensor_pipeline.embedded import ports
from sensor_pipeline.errors import DataError, UnavailableError
from sensor_pipeline.offsets import Batch
from sensor_pipeline.postgres.transaction import Written
from sensor_pipeline.settings import Settings, StartFrom
from sensor_pipeline_tests.kafka.inspecting import accepted_gaps, backlog, batch, catch_up, check_rows, query
from sensor_pipeline_tests.kafka.producing import Publisher, delete_records, group_offsets, reading
from sensor_pipeline_tests.oracle import connect
from sensor_pipeline_tests.orchestration.jobs import environment_of
from sensor_pipeline_tests.receivers import TOKEN, receiving


def eventful_topic(settings: Settings) -> Publisher:
    """Plain, committed and aborted messages, poison, repeats and late readings, on all but one partition."""
    publisher = Publisher(settings)
    publisher.readings({0: 13, 1: 3, 2: 6}, machines=4)
    publisher.committed({0: 3, 2: 3})
    publisher.aborted({0: 2, 1: 4})
    publisher.send(1, b"{}", bad="missing_machine_id", key=b"k")
    for late in publisher.published[5:9]:
        publisher.send(2, late.value)
    publisher.readings({2: 5, 1: 2}, machines=2)
    return publisher


@pytest.mark.parametrize(("batch_size", "lanes"), [(250_000, 1), (7, 3), (11, 8)])
def test_any_batch_size_and_lanes_give_the_same_rows(settings: Settings, batch_size: int, lanes: int) -> None:
    publisher = eventful_topic(settings)
    pipeline = Pipeline(replace(settings, batch_size=batch_size, lanes=lanes))

    batches = catch_up(pipeline)

    check_rows(settings, publisher.published)
    assert backlog(pipeline).lag == 0
    assert all(len(batch) <= batch_size for batch in batches)
    assert all(len({p % lanes for p in batch.partitions}) == 1 for batch in batches)
    ends = pipeline.kafka.end_offsets(pipeline.kafka.topic(publisher.topic))
    assert group_offsets(settings) == {p: end for p, end in ends.items() if end}
    # And again there is nothing to do.
    assert catch_up(pipeline) == []
    assert query(settings, "SELECT count(*) FROM batches") == [(len(batches),)]


def test_what_is_published_meanwhile_is_left_for_the_next_time(settings: Settings) -> None:
    pipeline = Pipeline(replace(settings, batch_size=4))
    publisher = Publisher(settings)
    publisher.readings({0: 5, 1: 5})
    runner = CatchUp(pipeline, lambda *_: publisher.readings({0: 3, 1: 1}) and None)

    runner.run(runner.backlog())

    check_rows(settings, [m for m in publisher.published if m.offset < 5])
    catch_up(Pipeline(settings))
    check_rows(settings, publisher.published)


def test_another_process_that_ingests_ahead_keeps_nothing_back(settings: Settings) -> None:
    """A sensor's run takes what was published meanwhile, before this process has come so far."""
    pipeline = Pipeline(replace(settings, batch_size=4))
    publisher = Publisher(settings)
    publisher.readings({0: 10, 1: 3})
    done = []

    def meanwhile(*_: object) -> None:
        done.append(1)
        if len(done) == 1:
            publisher.readings({0: 5})
            Pipeline(settings).run(batch(settings, {0: (10, 15)}))

    runner = CatchUp(pipeline, meanwhile)
    runner.run(runner.backlog())

    check_rows(settings, publisher.published)


@pytest.mark.parametrize("start_from", ["earliest", "latest"])
def test_several_processes_that_start_at_once_ingest_everything_once(settings: Settings, start_from: StartFrom) -> None:
    """All of them see the topic for the first time."""
    publisher = Publisher(settings)
    publisher.readings({0: 5, 1: 5, 2: 5})
    pipelines = [Pipeline(replace(settings, batch_size=5, lanes=2, start_from=start_from)) for _ in range(3)]
    with ThreadPoolExecutor(len(pipelines)) as pool:
        list(pool.map(catch_up, pipelines))
    check_rows(settings, publisher.published if start_from == "earliest" else [])
    assert len(accepted_gaps(settings)) == (0 if start_from == "earliest" else 3)


def test_batch_size_changed_between_two_times_changes_no_row(settings: Settings) -> None:
    publisher = eventful_topic(settings)
    pipeline = Pipeline(replace(settings, batch_size=6, lanes=2))

    class EnoughError(Exception):
        pass

    done: list[Batch] = []

    def stop(batch: Batch, _: Written) -> None:
        done.append(batch)
        if len(done) >= 3:
            raise EnoughError

    runner = CatchUp(pipeline, stop)
    with pytest.raises(EnoughError):
        runner.run(runner.backlog())
    assert backlog(pipeline).lag > 0

    catch_up(Pipeline(replace(settings, batch_size=11, lanes=3)))
    check_rows(settings, publisher.published)


def test_a_gap_in_one_of_several_lanes_and_small_batches_keeps_nothing_else_back(settings: Settings) -> None:
    pipeline = Pipeline(replace(settings, batch_size=3, lanes=2))
    publisher = Publisher(settings)
    publisher.readings({0: 1, 1: 1, 2: 1, 3: 1})
    catch_up(pipeline)
    publisher.readings({0: 5, 1: 5, 2: 5, 3: 5})
    delete_records(settings, publisher.topic, {1: 4})

    with pytest.raises(DataError, match=r"not all was ingested: .*partition 1 offsets \[1, 4\)"):
        catch_up(pipeline)

    check_rows(settings, [m for m in publisher.published if m.partition != 1 or m.offset < 1])


def test_a_batch_that_fails_for_a_while_is_tried_again_after_longer_and_longer_pauses(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 4, 1: 4})
    drain = pipeline.drain
    pauses: list[float] = []

    def sometimes(batch: Batch) -> object:
        if len(pauses) < 3 and 1 in batch.partitions:
            raise UnavailableError("the broker is away")
        return drain(batch)

    monkeypatch.setattr(pipeline, "drain", sometimes)
    runner = CatchUp(pipeline, lambda *_: None, sleep=pauses.append)
    runner.run(runner.backlog())

    check_rows(pipeline.settings, publisher.published)
    assert pauses == sorted(pauses)
    assert len(set(pauses)) == 3


def test_what_failed_is_tried_alone_although_batches_after_it_were_ahead_and_succeed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline(replace(settings, batch_size=8))
    publisher = Publisher(settings)
    publisher.readings({0: 60, 1: 60})
    drain = pipeline.drain
    failed: list[Batch] = []

    def refuse_one_offset(batch: Batch) -> object:
        if any(r.partition == 1 and r.start <= 10 < r.end for r in batch.ranges):
            failed.append(batch)
            raise DataError("it cannot be read")
        return drain(batch)

    monkeypatch.setattr(pipeline, "drain", refuse_one_offset)
    runner = CatchUp(pipeline, lambda *_: None)
    with pytest.raises(DataError, match="it cannot be read"):
        runner.run(runner.backlog())

    assert [len(batch.ranges) for batch in failed] == [2, 1]
    assert query(settings, "SELECT count(*) FROM readings WHERE kafka_partition = 0") == [(60,)]


def test_a_partition_that_stays_away_is_given_up_and_the_others_come_in(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 4, 1: 4, 3: 2})
    drain = pipeline.drain

    def never(batch: Batch) -> object:
        if 1 in batch.partitions:
            raise UnavailableError("the disk of partition 1 is gone")
        return drain(batch)

    monkeypatch.setattr(pipeline, "drain", never)
    with pytest.raises(DataError, match="not all was ingested: the disk of partition 1 is gone"):
        catch_up(pipeline)

    check_rows(pipeline.settings, [m for m in publisher.published if m.partition != 1])


def test_failures_of_long_ago_do_not_count_against_a_partition(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many outages as batches, one before each: every next try succeeds, so none is given up."""
    publisher = Publisher(settings)
    publisher.readings({0: 12})
    pipeline = Pipeline(replace(settings, batch_size=2))
    drain, fails = pipeline.drain, itertools.cycle([True, False])

    def every_other_time(batch: Batch) -> Drained:
        if next(fails):
            raise UnavailableError("away for a moment")
        return drain(batch)

    monkeypatch.setattr(pipeline, "drain", every_other_time)
    catch_up(pipeline)
    check_rows(settings, publisher.published)


def by_command(settings: Settings, url: str) -> Result:
    """`sensor-pipeline catch-up` in a folder where no stack runs."""
    env = environment_of(settings) | {"ALERT_WEBHOOK_URL": url, "ALERT_MAX_AGE": "3650 days"}
    with TemporaryDirectory() as folder, chdir(folder):
        return CliRunner().invoke(main, ["catch-up"], env=env)


def test_the_command_delivers_what_its_batches_found_also_where_a_partition_cannot_be_ingested(
    settings: Settings, pipeline: Pipeline
) -> None:
    publisher = Publisher(settings)
    publisher.readings({1: 4})
    backlog(pipeline)  # from here on the topic is known
    delete_records(settings, publisher.topic, {1: 2})
    for second, failing in enumerate((True, False)):
        publisher.send(0, reading("m", second, failing=failing))
    with receiving() as receiver:
        done = by_command(settings, receiver.url)
        assert [kind for kind, _ in receiver.by_machine()["m"]] == ["failure_started", "failure_ended"]
    assert done.exit_code == 1
    assert "Kafka no longer has" in done.stderr
    assert "notices: 2 sent" in done.stderr
    assert TOKEN not in done.output


def test_a_webhook_that_is_down_is_said_in_one_line_and_fails_no_catch_up(settings: Settings) -> None:
    publisher = Publisher(settings)
    for second, failing in enumerate((True, False)):
        publisher.send(0, reading("m", second, failing=failing))
    done = by_command(settings, f"http://127.0.0.1:{ports.any_free()}/")
    assert done.exit_code == 0
    assert done.stdout.startswith("2 readings inserted in 1 batches")
    (line,) = done.stderr.splitlines()
    assert line.startswith("notices: the webhook did not answer (ConnectionError)")
    assert query(settings, "SELECT count(*) FROM notices WHERE outcome IS NULL") == [(2,)]
    # The next time there is nothing to ingest, and what waits is delivered.
    with connect(settings).begin() as connection:
        connection.exec_driver_sql("UPDATE notices SET retry_at = found_at")
    with receiving() as receiver:
        assert "notices: 2 sent" in by_command(settings, receiver.url).stderr
        assert len(receiver.got) == 2
