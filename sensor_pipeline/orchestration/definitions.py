"""What Dagster loads. The only module of the package that reads the environment, beside the command line."""

# ruff: noqa: E402 - a run's process imports this module first
from sensor_pipeline.collector import spare_collector

spare_collector()

import os

from dagster import Definitions

from sensor_pipeline.orchestration.job import build_job
from sensor_pipeline.orchestration.notices import build_notice_sensor, build_run_notice_sensor
from sensor_pipeline.orchestration.sensor import build_sensor
from sensor_pipeline.settings import Settings

settings = Settings.from_env(os.environ)
job = build_job(settings)

defs = Definitions(
    jobs=[job],
    sensors=[build_sensor(settings, job), build_notice_sensor(settings), build_run_notice_sensor(settings, job)],
)
