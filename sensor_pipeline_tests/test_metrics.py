"""`sensor-pipeline metrics` over HTTP, as Prometheus reads it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.cli import main
from sensor_pipeline.cli.metrics import serve
from sensor_pipeline.embedded import ports
from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.acceptance.commands import environment
from sensor_pipeline_tests.kafka.inspecting import backlog, catch_up
from sensor_pipeline_tests.kafka.producing import Publisher, delete_records, reading
from sensor_pipeline_tests.orchestration.jobs import environment_of

Samples = dict[tuple[str, ...], float]


def scrape(address: str) -> Samples:
    """(name, label values in order of their names…) → value."""
    with urlopen(address) as response:
        families = text_string_to_metric_families(response.read().decode())
        samples = [sample for family in families for sample in family.samples]
    return {(s.name, *(value for _, value in sorted(s.labels.items()))): s.value for s in samples}


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    server, thread = serve(settings, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def lag(samples: Samples, name: str = "lag") -> dict[str, float]:
    """By partition."""
    return {labels[0]: value for (found, *labels), value in samples.items() if found == f"sensor_pipeline_{name}"}


def test_metrics_say_what_the_database_and_kafka_hold(settings: Settings, pipeline: Pipeline) -> None:
    publisher = Publisher(settings)
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    for second in range(3):
        at = round((hour_ago + timedelta(seconds=second)).timestamp() * 1000)
        publisher.send(0, reading("m", second, failing=second == 2), timestamp_ms=at)
    publisher.send(1, b"poison", bad="not_json")
    with serving(settings) as address:
        before = scrape(address)
        assert lag(before) == {"0": 3, "1": 1, "2": 0, "3": 0}
        oldest = lag(before, "oldest_unread_seconds")
        assert 3_600 <= oldest["0"] < 3_700
        assert 0 <= oldest["1"] < 100
        assert (oldest["2"], oldest["3"]) == (0, 0)
        assert before["sensor_pipeline_readings_total",] == 0
        assert ("sensor_pipeline_last_success_timestamp_seconds",) not in before

        catch_up(pipeline)
        after = scrape(address)
        assert lag(after) == lag(after, "oldest_unread_seconds") == {"0": 0, "1": 0, "2": 0, "3": 0}
        assert after["sensor_pipeline_readings_total",] == 3
        assert after["sensor_pipeline_rejected_messages", "not_json"] == 1
        assert after["sensor_pipeline_machines",] == 1
        assert after["sensor_pipeline_active_failures",] == 1
        assert after["sensor_pipeline_up", "postgresql"] == after["sensor_pipeline_up", "kafka"] == 1
        assert after["sensor_pipeline_last_batch_seconds", "total"] > 0
        assert after["sensor_pipeline_last_batch_seconds", "write"] > 0
        age = datetime.now(UTC).timestamp() - after["sensor_pipeline_last_success_timestamp_seconds",]
        assert 0 <= age < 100
        # The failure began long ago: recorded, and not to be delivered.
        assert after["sensor_pipeline_notices_undelivered",] == 0
        with serving(settings) as other:
            assert scrape(other) == after


def test_a_gap_shows_and_has_no_age(settings: Settings, pipeline: Pipeline) -> None:
    publisher = Publisher(settings)
    publisher.readings({0: 2, 1: 6, 2: 1})
    backlog(pipeline)  # from here on the topic is known
    delete_records(settings, publisher.topic, {0: 2, 1: 4})
    with serving(settings) as address:
        samples = scrape(address)
    assert lag(samples, "gap") == {"0": 2, "1": 4, "2": 0, "3": 0}
    assert lag(samples) == {"0": 2, "1": 6, "2": 1, "3": 0}
    oldest = lag(samples, "oldest_unread_seconds")
    assert oldest["0"] == oldest["3"] == 0
    assert 0 < oldest["1"] < 100


def test_no_partition_waits_for_all_that_another_one_has(settings: Settings, pipeline: Pipeline) -> None:
    publisher = Publisher(settings)
    for _ in range(200):
        publisher.readings(dict.fromkeys(range(4), 2))
    topic = pipeline.kafka.topic(publisher.topic)
    kafka = Kafka(settings, timeout=4)
    for start in (0, 300, 399):
        assert kafka.record_times(topic, dict.fromkeys(range(4), start)).keys() == {0, 1, 2, 3}
    assert kafka.record_times(topic, dict.fromkeys(range(4), 400)) == {}


def test_an_open_transaction_is_not_waited_for(settings: Settings, pipeline: Pipeline) -> None:
    publisher = Publisher(settings)
    publisher.readings({0: 1})
    publisher.aborted({0: 3})
    transaction = publisher.begin()
    transaction.readings({0: 2})
    topic = pipeline.kafka.topic(publisher.topic)
    assert pipeline.kafka.record_times(topic, {0: 0}).keys() == {0}
    assert pipeline.kafka.record_times(topic, {0: 1}) == {}
    transaction.abort()


def test_a_server_that_is_down_shows_and_the_rest_is_served(
    settings: Settings, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Publisher(settings).readings({0: 3})
    catch_up(pipeline)
    nowhere = ports.any_free()
    no_database = replace(settings, postgres_port=nowhere)
    with serving(no_database) as address:
        samples = scrape(address)
        assert samples == {("sensor_pipeline_up", "postgresql"): 0, ("sensor_pipeline_up", "kafka"): 1}
    with serving(replace(settings, kafka_bootstrap_servers=f"127.0.0.1:{nowhere}")) as address:
        samples = scrape(address)
        assert (samples["sensor_pipeline_up", "postgresql"], samples["sensor_pipeline_up", "kafka"]) == (1, 0)
        assert samples["sensor_pipeline_readings_total",] == 3
        assert lag(samples) == {}
    with serving(replace(settings, postgres_db="template1")) as address:
        assert scrape(address)["sensor_pipeline_up", "postgresql"] == 0, "there are no tables"

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["status"], env=environment_of(no_database))
    assert result.exit_code == 1
    assert "no connection to PostgreSQL" in result.output


def test_the_command_serves_until_it_is_ended(settings: Settings, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "sensor_pipeline", "metrics", "--port", "0"],
        env=environment(settings) | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": ":".join(sys.path)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        # As a container starts its first process: nothing ends it that it does not ask for.
        preexec_fn=partial(signal.signal, signal.SIGTERM, signal.SIG_IGN),
    )
    with process:
        try:
            assert process.stdout is not None
            address = re.search(r"http://127\.0\.0\.1:\d+/metrics", process.stdout.readline())
            assert address is not None
            assert scrape(address[0])["sensor_pipeline_up", "kafka"] == 1
        finally:
            process.terminate()
    assert process.returncode == 0


def test_a_port_that_is_taken_is_said(settings: Settings) -> None:
    with serving(settings) as address:
        port = int(address.rpartition(":")[2].removesuffix("/metrics"))
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port}.*choose another --port"):
            serve(settings, "127.0.0.1", port)
