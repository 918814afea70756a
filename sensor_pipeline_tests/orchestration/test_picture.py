"""The hourly picture of the failures."""

from __future__ import annotations

import base64
from datetime import UTC, datetime

import pandas as pd
import pytest
from dagster import AssetKey, DagsterInstance

from sensor_pipeline import timeline
from sensor_pipeline.batch import Pipeline
from sensor_pipeline.orchestration import picture
from sensor_pipeline.orchestration.assets import FAILURES, HEALTH
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.orchestration.test_job import publish_some, whole_backlog

PNG = b"\x89PNG\r\n\x1a\n"
NOW = datetime(2026, 1, 8, 12, tzinfo=UTC)
SPANS = {"last day": pd.Timedelta(days=1), "last week": pd.Timedelta(days=7)}


def failures(*rows: tuple[str, str, str | None]) -> pd.DataFrame:
    machine, start, end = zip(*rows, strict=True) if rows else ((), (), ())
    kind = "datetime64[us, UTC]"
    return pd.DataFrame(
        {
            "machine": pd.Series(list(machine), dtype=object),
            "start": pd.Series(pd.to_datetime(list(start), utc=True), dtype=kind),
            "end": pd.Series(pd.to_datetime(list(end), utc=True), dtype=kind),
        }
    )


@pytest.mark.parametrize(
    "rows",
    [
        failures(),
        failures(("a", "2026-01-08 11:00", None)),
        failures(("a", "2026-01-01 00:00", "2026-01-02 00:00")),
        failures(("$x_{1}$ & <b>", "2026-01-08 11:00", "2026-01-08 11:00")),
        failures(*((f"machine-{n}", "2026-01-08 11:00", None) for n in range(200))),
        failures(("n" * 255, "2025-01-01 00:00", None)),
    ],
    ids=["none", "active", "only in the week", "of zero length, a name of markup", "many machines", "longer than all"],
)
def test_any_failures_can_be_drawn(rows: pd.DataFrame) -> None:
    assert timeline.draw(rows, NOW, SPANS).startswith(PNG)


@pytest.mark.parametrize("asset", [FAILURES, HEALTH], ids=str)
def test_the_picture_is_an_observation_in_markdown(settings: Settings, pipeline: Pipeline, asset: AssetKey) -> None:
    publish_some(settings)
    pipeline.run(whole_backlog(pipeline))
    with DagsterInstance.ephemeral() as instance:
        assert picture.build_job(settings).execute_in_process(instance=instance).success
        records = instance.fetch_observations(asset, limit=10).records
    assert len(records) == 1
    event = records[0].asset_event
    assert event is not None
    text = event.metadata["timeline"].value
    prefix = "![which machines failed when](data:image/png;base64,"
    assert isinstance(text, str)
    assert text.startswith(prefix)
    assert base64.b64decode(text.removeprefix(prefix).removesuffix(")"), validate=True).startswith(PNG)
