"""A job that another process, or a re-execution, can build again: from the environment."""

from __future__ import annotations

import os
from typing import Any

from dagster import JobDefinition
from dagster._core.definitions.reconstruct import ReconstructableJob

from sensor_pipeline.orchestration.job import build_job
from sensor_pipeline.settings import Settings


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment variables of some settings."""
    return {
        "KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "KAFKA_TOPIC": ",".join(settings.kafka_topics),
        "KAFKA_GROUP_ID": settings.kafka_group_id,
        "POSTGRES_HOST": settings.postgres_host,
        "POSTGRES_PORT": str(settings.postgres_port),
        "POSTGRES_USER": settings.postgres_user,
        "POSTGRES_PASSWORD": settings.postgres_password,
        "POSTGRES_DB": settings.postgres_db,
        "BATCH_SIZE": str(settings.batch_size),
        "LANES": str(settings.lanes),
    }


def use(monkeypatch: Any, settings: Settings) -> None:
    """Let this process's environment be that of the settings."""
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)
    ReconstructableJob.get_definition.cache_clear()
    ReconstructableJob.get_repository_definition.cache_clear()


def job_from_environment() -> JobDefinition:
    """The job as the definitions build it. Dagster keeps what it built; `use` lets it build anew."""
    return build_job(Settings.from_env(os.environ))
