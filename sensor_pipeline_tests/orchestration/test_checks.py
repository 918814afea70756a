"""The asset checks on a real database and topic: what they find, and that they say what to do."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa
from dagster import AssetCheckEvaluation, AssetCheckSeverity, AssetSelection, Definitions, define_asset_job

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.orchestration.assets import build_assets, materializations
from sensor_pipeline.orchestration.checks import build_checks, build_schedule
from sensor_pipeline.postgres.figures import Rows
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import connect
from sensor_pipeline_tests.orchestration.test_job import publish_some, whole_backlog

# The readings of the tests are of a day long past.
LONG = timedelta(days=100_000)
NAMES = {
    "conservation",
    "ledger_totals",
    "rejected_in_the_ledger",
    "no_failures_overlap",
    "fresh",
    "no_machine_silent",
}


def evaluate(settings: Settings) -> dict[str, AssetCheckEvaluation]:
    """Every check, asked once."""
    checks = build_checks(settings)
    job = define_asset_job("asked", AssetSelection.checks(checks))
    defs = Definitions(assets=build_assets(settings), asset_checks=[checks], jobs=[job])
    result = defs.resolve_job_def("asked").execute_in_process()
    return {found.check_name: found for found in result.get_asset_check_evaluations()}


def damage(settings: Settings, statement: str) -> None:
    with connect(settings).begin() as connection:
        connection.execute(sa.text(statement))


@pytest.fixture
def ingested(settings: Settings, pipeline: Pipeline) -> Settings:
    """A database that holds all of a small topic."""
    publish_some(settings)
    pipeline.run(whole_backlog(pipeline))
    return replace(settings, silent_after=LONG)


def test_all_is_well_after_a_batch(ingested: Settings) -> None:
    found = evaluate(ingested)
    assert found.keys() == NAMES
    assert all(check.passed for check in found.values()), {n: c.description for n, c in found.items()}


def test_a_batch_that_comes_after_a_check_leaves_it_evaluated(ingested: Settings) -> None:
    checks = build_checks(ingested)
    checked = {spec.asset_key for spec in checks.check_specs}
    materialized = {event.asset_key for event in materializations(Rows(0, 0, 0, 0, 0), {})}
    assert not checked & materialized


@pytest.mark.parametrize(
    ("check", "statement", "said"),
    [
        ("conservation", "UPDATE batches SET inserted = inserted - 1", "offsets in its ranges"),
        ("ledger_totals", "UPDATE ingested_offsets SET no_record = no_record + 1", "offsets are done, but"),
        ("rejected_in_the_ledger", "DELETE FROM rejected_messages", "the ledger says 1, there are 0"),
        (
            "no_failures_overlap",
            "ALTER TABLE failures DROP CONSTRAINT failures_do_not_overlap;"
            "INSERT INTO failures (machine_id, start_time, last_failing_time, end_time, is_active) "
            "SELECT machine_id, start_time, last_failing_time, end_time + interval '1 s', false FROM failures "
            "WHERE end_time IS NOT NULL LIMIT 1",
            "before an earlier one ended",
        ),
    ],
)
def test_what_is_wrong_in_the_tables_fails_its_check_which_says_what_to_do(
    ingested: Settings, check: str, statement: str, said: str
) -> None:
    damage(ingested, statement)
    found = evaluate(ingested)[check]
    assert not found.passed
    assert found.severity == AssetCheckSeverity.ERROR
    assert said in (found.description or "")
    assert "What to do: " in (found.description or "")


def test_a_record_that_waits_too_long_fails_fresh(settings: Settings) -> None:
    publish_some(settings)
    assert evaluate(settings)["fresh"].passed
    stale = evaluate(replace(settings, stale_after=timedelta(0)))["fresh"]
    assert not stale.passed
    assert f"topic {settings.kafka_topics[0]}: lag 41" in (stale.description or "")
    assert stale.metadata["lag"].value == 41


def test_a_machine_that_is_silent_is_named_in_a_warning(ingested: Settings) -> None:
    silent = evaluate(replace(ingested, silent_after=timedelta(hours=1)))["no_machine_silent"]
    assert not silent.passed
    assert silent.severity == AssetCheckSeverity.WARN
    assert "2 machines" in (silent.description or "")
    assert "machine-0 since" in (silent.description or "")


def test_a_kafka_that_is_away_fails_one_check_with_one_line_and_the_others_are_asked(ingested: Settings) -> None:
    found = evaluate(replace(ingested, kafka_bootstrap_servers="127.0.0.1:1"))
    fresh = found.pop("fresh")
    assert not fresh.passed
    assert "this could not be asked: " in (fresh.description or "")
    assert "KAFKA_BOOTSTRAP_SERVERS" in (fresh.description or "")
    assert all(check.passed for check in found.values())


def test_the_checks_may_take_longer_than_a_batch() -> None:
    """They read all failures, and a run that is given up says nothing of the data."""
    job = build_schedule(Settings(), build_checks(Settings())).job
    assert int(job.tags["dagster/max_runtime"]) > 300
