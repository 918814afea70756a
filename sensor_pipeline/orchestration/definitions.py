"""What Dagster loads. The only module of the package that reads the environment, beside the command line."""

# ruff: noqa: E402 - a run's process imports this module first
from sensor_pipeline.collector import spare_collector

spare_collector()

import os

from dagster import Definitions

from sensor_pipeline.orchestration import house, picture
from sensor_pipeline.orchestration.assets import build_assets
from sensor_pipeline.orchestration.checks import JOB_NAME as CHECK_JOB
from sensor_pipeline.orchestration.checks import build_checks, build_schedule
from sensor_pipeline.orchestration.forked_runs import fork_runs
from sensor_pipeline.orchestration.job import build_job
from sensor_pipeline.orchestration.notices import build_notice_sensor, build_run_notice_sensor
from sensor_pipeline.orchestration.repair import build_recompute_job, build_replay_job
from sensor_pipeline.orchestration.sensor import build_sensor
from sensor_pipeline.settings import Settings

fork_runs()
settings = Settings.from_env(os.environ)
job = build_job(settings)
checks = build_checks(settings)
picture_job = picture.build_job(settings)
repairs = [build_replay_job(settings), build_recompute_job(settings)]
house_job = house.build_job(settings, [CHECK_JOB, *(each.name for each in (job, *repairs, picture_job))])

defs = Definitions(
    assets=build_assets(settings),
    asset_checks=[checks],
    jobs=[job, *repairs, picture_job, house_job],
    schedules=[
        build_schedule(settings, checks),
        picture.build_schedule(settings, picture_job),
        house.build_schedule(settings, house_job),
    ],
    sensors=[build_sensor(settings, job), build_notice_sensor(settings), build_run_notice_sensor(settings, job)],
)
