"""A backup of the database that is older than what was ingested: the pipeline catches up from Kafka by itself."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.embedded.postgres import _binaries
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import backlog, catch_up, check_rows
from sensor_pipeline_tests.kafka.producing import Publisher, group_offsets, reading
from sensor_pipeline_tests.rejecting import check_verified

pytestmark = pytest.mark.skipif(
    not (_binaries() / "pg_dump").exists(), reason="pg_dump is not among the embedded PostgreSQL's programs"
)


def run(settings: Settings, program: str, *arguments: str) -> None:
    login = {
        "PGHOST": settings.postgres_host,
        "PGPORT": str(settings.postgres_port),
        "PGUSER": settings.postgres_user,
        "PGPASSWORD": settings.postgres_password,
    }
    subprocess.run([str(_binaries() / program), *arguments], env={**os.environ, **login}, check=True, timeout=120)


def test_after_a_restore_the_pipeline_catches_up_from_kafka(
    settings: Settings, administer: Callable[[str], None], tmp_path: Path
) -> None:
    publisher = Publisher(settings)
    publisher.readings({0: 40, 1: 30, 2: 20, 3: 10})
    publisher.send(0, reading("late", 5, failing=True))
    publisher.send(1, b"poison", bad="not_json")
    catch_up(Pipeline(settings))
    run(settings, "pg_dump", "--format=custom", f"--file={tmp_path / 'backup'}", settings.postgres_db)

    # What the backup does not hold: more readings, in a day of their own too, and late ones that change failures.
    publisher.readings({0: 10, 1: 20, 2: 30, 3: 40})
    publisher.send(2, reading("late", 200_000))
    publisher.send(3, reading("late", 3, failing=True))
    publisher.send(0, b"more poison", bad="not_json")
    catch_up(Pipeline(settings))
    check_rows(settings, publisher.published)
    ahead = group_offsets(settings)

    restored = replace(settings, postgres_db=f"{settings.postgres_db}_restored")
    administer(f"CREATE DATABASE {restored.postgres_db} TEMPLATE template0")
    try:
        run(restored, "pg_restore", "--exit-on-error", f"--dbname={restored.postgres_db}", str(tmp_path / "backup"))
        # The group stands where the lost database was; the ledger decides.
        assert group_offsets(restored) == ahead
        assert backlog(Pipeline(restored)).lag == 103
        catch_up(Pipeline(restored))
        check_rows(restored, publisher.published)
        check_verified(restored)
        assert backlog(Pipeline(restored)).lag == 0
    finally:
        administer(f"DROP DATABASE {restored.postgres_db} WITH (FORCE)")
