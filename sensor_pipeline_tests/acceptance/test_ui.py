"""What a person does in the Dagster UI, in a real browser."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
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
from sensor_pipeline_tests.kafka.producing import delete_records
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


class Ui:
    """What a person does in Dagster's UI, by clicks. A run is named by its id."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self._address = address

    def turn(self, sensor: str, *, on: bool) -> None:
        """Switch a sensor on or off on its page."""
        self.page.goto(f"{self._address}/locations/__repository__@sensor_pipeline/sensors/{sensor}")
        switch = self.page.get_by_role("checkbox").first
        expect(switch).to_be_checked(checked=not on, timeout=DEADLINE_SECONDS * 1000)
        # By the keyboard: the input itself lies outside of what is drawn for it.
        switch.press("Space")
        expect(switch).to_be_checked(checked=on, timeout=DEADLINE_SECONDS * 1000)

    def open_launchpad(self) -> None:
        self.page.goto(f"{self._address}/locations/__repository__@sensor_pipeline/jobs/ingest_batch/playground")

    def launch(self, batch: Batch) -> str:
        """Launch a batch from the Launchpad; returns its run."""
        self.open_launchpad()
        self.page.locator(".CodeMirror").first.click()
        self.page.keyboard.press("Control+A")
        # JSON is YAML too; inserted as a whole, so that the editor closes no bracket of its own.
        self.page.keyboard.insert_text(json.dumps(to_run_config(batch)))
        self.page.get_by_role("button", name="Launch Run").click()
        self.page.wait_for_url("**/runs/*")
        return self._run()

    def open_run(self, run: str) -> None:
        self.page.goto(f"{self._address}/runs/{run}")

    def wait_for(self, run: str, status: str) -> None:
        """Open a run's page, and wait until it shows a status."""
        self.open_run(run)
        self.page.get_by_text(status, exact=True).first.wait_for()

    def look_at_step(self, run: str, step: str) -> None:
        """Open a run's page with the events of one step only."""
        self.page.goto(f"{self._address}/runs/{run}?logs=step%3A{step}")

    def re_execute_all(self, run: str) -> str:
        """By the button of a run that has ended; returns the new run."""
        self.open_run(run)
        self.page.get_by_role("button", name="Re-execute all").first.click()
        return self._next_run(run)

    def re_execute_from_failure(self, run: str) -> str:
        """By the menu beside the button; returns the new run."""
        self.open_run(run)
        self.page.get_by_role("button", name="Re-execute").locator("xpath=following::button[1]").first.click()
        self.page.get_by_role("menuitem", name="From failure").click()
        return self._next_run(run)

    def re_execute_selected(self, run: str, step: str) -> str:
        """By a click on the step in the chart; returns the new run."""
        self.open_run(run)
        self.page.locator(".chart-element", has_text=step).first.click()
        self.page.get_by_role("button", name=f'Re-execute (name:"{step}")').first.click()
        return self._next_run(run)

    def steps(self, run: str, count: int) -> list[str]:
        """The steps that a run's chart shows, by name, once it shows so many: it is drawn again and again at first."""
        self.open_run(run)
        self.page.get_by_text("Success", exact=True).first.wait_for()
        shown: list[str] = []
        for _ in range(60):
            texts = self.page.locator(".chart-element").all_inner_texts()
            shown = sorted(text.strip() for text in texts if text.strip())
            if len(shown) >= count:
                break
            self.page.wait_for_timeout(500)
        return shown

    def _next_run(self, run: str) -> str:
        self.page.wait_for_url(lambda url: "/runs/" in url and run not in url)
        return self._run()

    def _run(self) -> str:
        return self.page.url.split("/runs/")[1].split("?")[0]


@contextmanager
def writes_that_fail(settings: Settings) -> Iterator[None]:
    """No batch can be logged during the block, so that none is written; its drain succeeds."""
    with connect(settings).begin() as connection:
        connection.exec_driver_sql("ALTER TABLE batches ADD CONSTRAINT none CHECK (false) NOT VALID")
    try:
        yield
    finally:
        with connect(settings).begin() as connection:
            connection.exec_driver_sql("ALTER TABLE batches DROP CONSTRAINT none")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.usefixtures("dagster_database")
def test_every_way_to_re_execute_a_run_in_the_browser_ends_in_the_right_rows_and_says_so(
    settings: Settings, tmp_path: Path
) -> None:
    published = publish_fleet(settings)
    home = tmp_path / "dagster"
    with daemon(settings, home, DAGSTER_POSTGRES_DB=f"{settings.postgres_db}_dagster") as env:
        wait_until("no lag", lambda: lag(settings) == 0, log=home / "daemon.log")
        with web_server(env, home) as address, browser_page() as page:
            ui = Ui(page, address)
            first_run = run_of_the_newest_batch(settings)
            ui.turn("backlog_sensor", on=False)
            with writes_that_fail(settings):
                starts = Kafka(settings).end_offsets(Kafka(settings).topic(settings.kafka_topics[0]))
                published += publish_some(settings).published
                owned = batch_from(settings, starts)
                failed = [ui.launch(replace(owned, ranges=(part,))) for part in owned.ranges[:3]]
                for run in failed:
                    ui.wait_for(run, "Failure")
            of_partition = {
                p: [e for e in published if not (e.partition > p and e.offset >= starts[e.partition])] for p in range(3)
            }

            # From failure: what was drained is drained again, as it was in the memory of another process.
            run = ui.re_execute_from_failure(failed[0])
            ui.wait_for(run, "Success")
            assert ui.steps(run, 2) == ["commit", "write"]
            assert run_of_the_newest_batch(settings) == run
            assert stored(settings) == expected(of_partition[0])

            # One selected step.
            run = ui.re_execute_selected(failed[1], "write")
            ui.wait_for(run, "Success")
            assert ui.steps(run, 1) == ["write"]
            assert run_of_the_newest_batch(settings) == run
            assert stored(settings) == expected(of_partition[1])

            # Last week: Kafka has none of the records any more.
            kafka = Kafka(settings)
            delete_records(settings, settings.kafka_topics[0], kafka.end_offsets(kafka.topic(settings.kafka_topics[0])))
            run = ui.re_execute_all(first_run)
            ui.wait_for(run, "Success")
            ui.look_at_step(run, "write")
            page.get_by_text("already ingested, nothing written").first.wait_for()
            page.screenshot(path=str(tmp_path / "already-ingested.png"))
            assert stored(settings) == expected(of_partition[1])

            # What is neither ingested nor in Kafka is refused by name.
            run = ui.re_execute_all(failed[2])
            ui.wait_for(run, "Failure")
            lost = owned.ranges[2]
            page.get_by_text(f"no longer has partition 2 offsets [{lost.start}, {lost.end})").first.wait_for()
            page.screenshot(path=str(tmp_path / "refused.png"))
            assert stored(settings) == expected(of_partition[1])


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
            ui = Ui(page, address)
            ui.turn("backlog_sensor", on=False)
            ends = Kafka(settings).end_offsets(Kafka(settings).topic(settings.kafka_topics[0]))
            more = publish_some(settings).published
            ui.open_launchpad()
            # The example in it says what to fill in, and launched as it is, it is refused in one line that says so.
            page.get_by_text("the id that `sensor-pipeline doctor` says").wait_for()
            page.get_by_role("button", name="Launch Run").click()
            page.get_by_text("fill in the one that").first.wait_for()
            by_hand = ui.launch(batch_from(settings, ends))
            ui.wait_for(by_hand, "Success")
            assert run_of_the_newest_batch(settings) == by_hand
            assert stored(settings) == expected(published + more)
            ui.turn("backlog_sensor", on=True)
            more += publish_some(settings).published
            wait_until("no lag", lambda: lag(settings) == 0, log=home / "daemon.log")
            # What each tick did, and why, stands beside it.
            page.get_by_text("1 batch launched (41)").first.wait_for()
            page.screenshot(path=str(tmp_path / "ticks.png"))
    assert stored(settings) == expected(published + more)


def batch_from(settings: Settings, starts: Mapping[int, int]) -> Batch:
    """All that was published from some offsets on."""
    kafka = Kafka(settings)
    topic = kafka.topic(settings.kafka_topics[0])
    ends = kafka.end_offsets(topic)
    return Batch(topic.name, topic.kafka_topic_id, tuple(OffsetRange(p, starts[p], ends[p]) for p in starts))


def run_of_the_newest_batch(settings: Settings) -> str:
    """The Dagster run that the batch log names."""
    with connect(settings).connect() as connection:
        run_id: str = connection.exec_driver_sql(
            "SELECT dagster_run_id FROM batches ORDER BY id DESC LIMIT 1"
        ).scalar_one()
    return run_id
