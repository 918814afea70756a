"""The house stays as it is drawn: imports run one way, and what is promised to others stands in the README."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from sensor_pipeline.cli import main
from sensor_pipeline.settings import _VARIABLES, SECRETS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sensor_pipeline"

# From the ground up; a module may import those of the rows below its own, and of its own part.
FLOORS = [
    ["errors", "collector"],
    ["settings", "offsets", "pace", "rules", "failures", "fleet", "labelled_csv", "webhook"],
    ["plain", "notices"],
    ["messages"],
    ["drained"],
    ["kafka", "postgres"],
    ["backlog", "publish", "delivery", "timeline"],
    ["batch", "watch", "metrics"],
    ["catch_up", "replay"],
    ["embedded", "orchestration"],
    ["bench"],
    ["cli"],
    ["__main__"],
]
# Only these may speak to the outside.
OWNERS = {
    "confluent_kafka": {"kafka", "publish", "embedded", "bench"},
    "sqlalchemy": {"postgres", "cli"},
    "psycopg2": {"postgres", "embedded", "bench"},
    "dagster": {"orchestration", "cli", "embedded"},
    "dagster_celery": {"orchestration"},
    "celery": {"orchestration"},
    "kombu": {"orchestration"},
    "redis": {"orchestration"},
    "alembic": {"postgres"},
    "requests": {"webhook", "embedded"},
    "prometheus_client": {"metrics", "cli"},
}


def part_of(path: Path) -> str:
    """The part of the house in which a file lies: its first name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports() -> list[tuple[str, str, str]]:
    """(file, its part, imported module) for every import in the package, wherever it stands in its file."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(str(path.relative_to(ROOT)), part_of(path), name) for name in names]
    return found


def test_imports_run_one_way() -> None:
    floor = {part: number for number, row in enumerate(FLOORS) for part in row}
    wrong = []
    for file, part, name in imports():
        if part == "__init__" or not name.startswith("sensor_pipeline."):
            continue
        other = name.split(".")[1]
        if other != part and floor[other] >= floor[part]:
            wrong.append(f"{file} imports {name}")
    assert not wrong


def test_only_their_owners_speak_to_kafka_postgresql_and_dagster() -> None:
    wrong = [
        f"{file} imports {name}" for file, part, name in imports() if part not in OWNERS.get(name.split(".")[0], {part})
    ]
    assert not wrong


def test_only_the_definitions_and_the_command_line_read_the_environment() -> None:
    readers = {
        str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if re.search(r"os\.environ|getenv", p.read_text())
    }
    # Dagster loads these two by itself, and hands them nothing.
    entrances = {"orchestration/definitions.py", "orchestration/storage.py"}
    assert {r for r in readers if not r.startswith(("embedded/", "cli/", "bench/"))} == entrances


def test_a_run_imports_neither_an_http_client_nor_the_metrics_nor_what_workers_need() -> None:
    """Each run's process pays for what the definitions import."""
    code = "import sys, sensor_pipeline.orchestration.definitions; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"requests", "urllib3", "prometheus_client", "celery", "redis"} & set(said.split())


@pytest.mark.parametrize(
    "variable", sorted([*_VARIABLES, "KAFKA_CLIENT_<PROPERTY>", *(f"{name}_FILE" for name in SECRETS)])
)
def test_every_setting_stands_in_the_readme(variable: str) -> None:
    assert f"`{variable}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", main.list_commands(click.Context(main)))
def test_every_command_explains_itself_and_stands_in_the_readme(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    parts = command.commands.values() if isinstance(command, click.Group) else ()
    for each in (command, *parts):
        assert each.help
        assert all(option.help for option in each.params if isinstance(option, click.Option))
    assert f"`sensor-pipeline {name}" in (ROOT / "README.md").read_text()


def rows_of_guarantees() -> list[str]:
    lines = (ROOT / "docs" / "guarantees.md").read_text().splitlines()
    return [line for line in lines if line.startswith("| ") and not line.startswith("| what is done ")]


@pytest.mark.parametrize("row", rows_of_guarantees())
def test_every_guarantee_names_tests_that_exist(row: str) -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row.rpartition(" | ")[2])
    assert named
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / "sensor_pipeline_tests" / file).read_text(), re.MULTILINE), test
