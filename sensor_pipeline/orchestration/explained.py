"""An error of ours, as a run's page shows it: one line that says what, where and what to do, and no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dagster import Failure, MetadataValue, OpExecutionContext

from sensor_pipeline.errors import SensorPipelineError
from sensor_pipeline.orchestration import tags


@contextmanager
def failures_explained(context: OpExecutionContext | None = None) -> Iterator[None]:
    """An error of ours fails the run with its line as the description, and, with a context, its kind as the outcome."""
    try:
        yield
    except SensorPipelineError as error:
        kind: Any = MetadataValue.text(type(error).__name__)
        if context is not None:
            context.instance.add_run_tags(context.run_id, {tags.OUTCOME: type(error).__name__})
        raise Failure(description=str(error), metadata={"error": kind}, allow_retries=False) from error
