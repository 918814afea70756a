"""What a person does in the Dagster UI, in a real browser."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from sensor_pipeline.embedded import ports
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.acceptance.commands import DEADLINE_SECONDS, ROOT, daemon, running, wait_until
from sensor_pipeline_tests.acceptance.test_three_ways import dagster_database, lag, publish_fleet
from sensor_pipeline_tests.oracle import connect, expected, stored

__all__ = ["dagster_database"]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# It keeps quiet towards the outside, and runs as root too.
OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


@contextmanager
def web_server(env: Mapping[str, str], home: Path) -> Iterator[str]:
    """Dagster's web server on the daemon's instance; yields its address."""
    port = ports.any_free()
    address = f"http://{ports.LOOPBACK}:{port}"
    log = home / "web.log"
    command = ["dagster-webserver", "-h", ports.LOOPBACK, "-p", str(port), "-w", str(ROOT / "workspace.yaml")]
    with running(command, env=env, cwd=home, log=log):
        wait_until("the UI answers", lambda: answers(f"{address}/server_info"), log=log)
        yield address


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False


@contextmanager
def browser_page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(DEADLINE_SECONDS * 1000)
        try:
            yield page
        finally:
            browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.usefixtures("dagster_database")
def test_re_executing_a_run_in_the_browser_is_a_success_that_changes_no_row_and_says_so(
    settings: Settings, tmp_path: Path, administer: Callable[[str], None]
) -> None:
    published = publish_fleet(settings)
    home = tmp_path / "dagster"
    with daemon(settings, home, DAGSTER_POSTGRES_DB=f"{settings.postgres_db}_dagster") as env:
        wait_until("no lag", lambda: lag(settings) == 0, log=home / "daemon.log")
        with web_server(env, home) as address, browser_page() as page:
            first_run = run_of_the_newest_batch(settings)
            page.goto(f"{address}/runs/{first_run}")
            page.get_by_text("Success", exact=True).first.wait_for()
            page.get_by_role("button", name="Re-execute all").first.click()
            page.wait_for_url(lambda url: "/runs/" in url and first_run not in url)
            page.goto(page.url.split("?")[0] + "?logs=step%3Awrite")
            page.get_by_text("already ingested, nothing written").first.wait_for()
            page.get_by_text("Success", exact=True).first.wait_for()
            page.screenshot(path=str(tmp_path / "re-executed.png"))
    assert stored(settings) == expected(published)


def run_of_the_newest_batch(settings: Settings) -> str:
    """The Dagster run that the batch log names."""
    with connect(settings).connect() as connection:
        run_id: str = connection.exec_driver_sql(
            "SELECT dagster_run_id FROM batches ORDER BY id DESC LIMIT 1"
        ).scalar_one()
    return run_id
