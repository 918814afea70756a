"""What Dagster loads. The only module of the package that reads the environment, beside the command line."""

# ruff: noqa: E402 - a run's process imports this module first
from sensor_pipeline.collector import spare_collector

spare_collector()

import os

from dagster import Definitions

from sensor_pipeline.orchestration.job import build_job
from sensor_pipeline.orchestration.repair import build_recompute_job, build_replay_job
from sensor_pipeline.orchestration.sensor import build_sensor
from sensor_pipeline.settings import Settings

settings = Settings.from_env(os.environ)
job = build_job(settings)
repairs = [build_replay_job(settings), build_recompute_job(settings)]

defs = Definitions(jobs=[job, *repairs], sensors=[build_sensor(settings, job)])
