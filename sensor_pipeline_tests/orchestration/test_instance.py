"""What doctor says of a Dagster instance."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from dagster import DagsterInstance

from sensor_pipeline.orchestration.instance import find_wrong
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.orchestration.jobs import environment_of


def test_a_bare_instance_is_told_everything_that_it_lacks(tmp_path: Path) -> None:
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        said = list(find_wrong(instance))
    for what in ("dequeue_interval_seconds", "run_monitoring.enabled", "SQLite", "the daemon does not run"):
        assert any(what in sentence for sentence in said), what
    assert all("\n" not in sentence for sentence in said)


def test_the_instance_as_shipped_lacks_nothing_but_the_daemon_that_is_not_running(
    database_settings: Settings, tmp_path: Path, monkeypatch: Any
) -> None:
    for name, value in environment_of(database_settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DAGSTER_POSTGRES_DB", database_settings.postgres_db)
    shipped = resources.files("sensor_pipeline.orchestration").joinpath("dagster.yaml").read_text()
    (tmp_path / "dagster.yaml").write_text(shipped)
    with DagsterInstance.from_config(str(tmp_path)) as instance:
        said = list(find_wrong(instance))
        for part in (instance.run_storage, instance.event_log_storage, instance.schedule_storage):
            part._engine.dispose()  # type: ignore[union-attr]
    assert len(said) == 1
    assert said[0].startswith("the daemon does not run")


def test_each_shipped_setting_is_missed_where_it_is_not_so(database_settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text(
        "run_coordinator: {module: dagster.core.run_coordinator, class: QueuedRunCoordinator}\n"
        "run_monitoring: {enabled: true}\n"
    )
    with DagsterInstance.from_config(str(tmp_path)) as instance:
        said = "; ".join(find_wrong(instance))
    for what in ("dequeue_interval_seconds", "tag_concurrency_limits", "max_runtime_seconds"):
        assert what in said
