"""What a person launches by hand in the Dagster UI, in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.acceptance.commands import daemon
from sensor_pipeline_tests.acceptance.test_three_ways import dagster_database
from sensor_pipeline_tests.acceptance.test_ui import CHROMIUM, browser_page, web_server
from sensor_pipeline_tests.postgres.tables import ingest_once
from sensor_pipeline_tests.rejecting import check_replayed, rejecting_history

__all__ = ["dagster_database"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.usefixtures("dagster_database")
def test_rejected_messages_are_replayed_from_the_launchpad_as_it_is_filled_in(
    settings: Settings, tmp_path: Path
) -> None:
    log = rejecting_history(settings)
    ingest_once(settings, log)
    home = tmp_path / "dagster"
    with (
        daemon(settings, home, DAGSTER_POSTGRES_DB=f"{settings.postgres_db}_dagster") as env,
        web_server(env, home) as address,
        browser_page() as page,
    ):
        page.goto(f"{address}/locations/sensor_pipeline/jobs/replay_rejected/playground")
        launch = page.get_by_role("button", name="Launch Run")
        launch.wait_for()
        page.get_by_text("dry_run").first.wait_for()
        page.screenshot(path=str(tmp_path / "launchpad.png"))
        launch.click()
        page.wait_for_url(lambda url: "/runs/" in url)
        page.get_by_text("Success", exact=True).first.wait_for()
        page.goto(page.url.split("?")[0] + "?logs=step%3Areplay")
        page.get_by_text("became readings").first.wait_for()
        page.screenshot(path=str(tmp_path / "replayed.png"))
    check_replayed(settings, log)
