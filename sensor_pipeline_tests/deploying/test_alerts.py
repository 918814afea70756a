"""Prometheus' rules: they name metrics that there are, and promtool's tests of them pass."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import catch_up
from sensor_pipeline_tests.kafka.producing import Publisher
from sensor_pipeline_tests.test_metrics import scrape, serving

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
RULES = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]


def test_the_rules_name_metrics_and_labels_that_are_exported(settings: Settings, pipeline: Pipeline) -> None:
    publisher = Publisher(settings)
    publisher.readings({0: 3})
    publisher.send(1, b"poison", bad="not_json")
    catch_up(pipeline)
    with serving(settings) as address:
        exported = {name for name, *_ in scrape(address)}
    for rule in RULES:
        named = set(re.findall(r"sensor_pipeline_\w+", rule["expr"]))
        assert named
        assert named <= exported, rule["alert"]


def test_every_alert_says_how_bad_it_is_and_what_to_do_and_is_tested() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if "exp_alerts" in case}
    quiet = {case["alertname"] for test in tests for case in test["alert_rule_test"] if "exp_alerts" not in case}
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "remedy"}
        assert rule["alert"] in fired & quiet


def test_prometheus_scrapes_the_compose_files_metrics_and_loads_the_rules() -> None:
    prometheus = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert prometheus["rule_files"] == ["alerts.yml"]
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["metrics:9464"]}]


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian: apt-get install prometheus) is not there")
@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_agrees(command: tuple[str, ...]) -> None:
    result = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
