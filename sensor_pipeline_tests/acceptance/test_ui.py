"""What a person does in the Dagster UI, in a real browser."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from sensor_pipeline.embedded import ports
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.orchestration.config import to_run_config
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.acceptance.commands import DEADLINE_SECONDS, ROOT, daemon, running, wait_until
from sensor_pipeline_tests.acceptance.test_three_ways import dagster_database, lag, publish_fleet
from sensor_pipeline_tests.oracle import connect, expected, stored
from sensor_pipeline_tests.orchestration.test_job import publish_some

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


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.usefixtures("dagster_database")
def test_with_the_sensor_off_a_batch_is_launched_by_hand_and_the_sensor_then_goes_on_from_there(
    settings: Settings, tmp_path: Path
) -> None:
    published = publish_fleet(settings)
    home = tmp_path / "dagster"
    with daemon(settings, home, DAGSTER_POSTGRES_DB=f"{settings.postgres_db}_dagster") as env:
        wait_until("no lag", lambda: lag(settings) == 0, log=home / "daemon.log")
        with web_server(env, home) as address, browser_page() as page:
            sensor = f"{address}/locations/__repository__@sensor_pipeline/sensors/backlog_sensor"
            turn(page, sensor, on=False)
            ends = Kafka(settings).end_offsets(Kafka(settings).topic(settings.kafka_topics[0]))
            more = publish_some(settings).published
            launchpad = f"{address}/locations/__repository__@sensor_pipeline/jobs/ingest_batch/playground"
            page.goto(launchpad)
            # The example in it says what to fill in, and launched as it is, it is refused in one line that says so.
            page.get_by_text("the id that `sensor-pipeline doctor` says").wait_for()
            page.get_by_role("button", name="Launch Run").click()
            page.get_by_text("fill in the one that").first.wait_for()
            page.goto(launchpad)
            fill_in(page, batch_from(settings, ends))
            page.get_by_role("button", name="Launch Run").click()
            page.wait_for_url("**/runs/*")
            page.get_by_text("Success", exact=True).first.wait_for()
            by_hand = page.url.split("/runs/")[1].split("?")[0]
            assert run_of_the_newest_batch(settings) == by_hand
            assert stored(settings) == expected(published + more)
            turn(page, sensor, on=True)
            more += publish_some(settings).published
            wait_until("no lag", lambda: lag(settings) == 0, log=home / "daemon.log")
            # What each tick did, and why, stands beside it.
            page.get_by_text("1 batch launched (41)").first.wait_for()
            page.screenshot(path=str(tmp_path / "ticks.png"))
    assert stored(settings) == expected(published + more)


def turn(page: Page, sensor: str, *, on: bool) -> None:
    """Switch a sensor on or off on its page."""
    page.goto(sensor)
    switch = page.get_by_role("checkbox").first
    expect(switch).to_be_checked(checked=not on)
    # By the keyboard: the input itself lies outside of what is drawn for it.
    switch.press("Space")
    expect(switch).to_be_checked(checked=on)


def batch_from(settings: Settings, starts: Mapping[int, int]) -> Batch:
    """All that was published from some offsets on."""
    kafka = Kafka(settings)
    topic = kafka.topic(settings.kafka_topics[0])
    ends = kafka.end_offsets(topic)
    return Batch(topic.name, topic.kafka_topic_id, tuple(OffsetRange(p, starts[p], ends[p]) for p in starts))


def fill_in(page: Page, batch: Batch) -> None:
    """Replace what stands in the Launchpad."""
    page.locator(".CodeMirror").first.click()
    page.keyboard.press("Control+A")
    # JSON is YAML too; inserted as a whole, so that the editor closes no bracket of its own.
    page.keyboard.insert_text(json.dumps(to_run_config(batch)))


def run_of_the_newest_batch(settings: Settings) -> str:
    """The Dagster run that the batch log names."""
    with connect(settings).connect() as connection:
        run_id: str = connection.exec_driver_sql(
            "SELECT dagster_run_id FROM batches ORDER BY id DESC LIMIT 1"
        ).scalar_one()
    return run_id
