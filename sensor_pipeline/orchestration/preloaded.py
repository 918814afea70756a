"""All that a run imports, also in its midst, for the process that runs are forked from."""

# ruff: noqa: F401
from contextlib import suppress

import dagster._cli
import dagster._core.executor.in_process
import dagster._core.instance.factory
import dagster._core.secrets.env_file
import dagster._core.workspace.autodiscovery
import dagster._grpc.impl
import upath.implementations.local

import sensor_pipeline.orchestration.storage

with suppress(Exception):
    # Where a setting has become wrong meanwhile, each run finds that again, and fails with what is to be done.
    import sensor_pipeline.orchestration.definitions
