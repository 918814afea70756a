"""Real servers for all tests; a topic, a consumer group and a database of its own for each that asks.

KAFKA_BOOTSTRAP_SERVERS and POSTGRES_HOST are not used: tests create and drop databases and topics.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import sqlalchemy as sa

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.embedded import ports
from sensor_pipeline.embedded.kafka import KafkaBroker
from sensor_pipeline.embedded.postgres import PostgresServer
from sensor_pipeline.postgres.migrations import migrate
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.data import NEEDS_DATA

_numbers = itertools.count(1)

os.environ["DAGSTER_DISABLE_TELEMETRY"] = "yes"


# Of two processes neither shall begin on one of these when the other has nothing left.
_LONGEST = ("test_state_machine.py", "test_points.py", "test_any_history.py", "test_outages.py", "test_concurrency.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test is a failure, unless data is missing that no registry has."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or reporter is None:
        return
    skipped = [report for report in reporter.stats.get("skipped", []) if NEEDS_DATA not in str(report.longrepr)]
    if skipped and session.exitstatus == pytest.ExitCode.OK:
        reporter.write_line(f"CI skips no test, but {len(skipped)} were: {[r.nodeid for r in skipped]}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def server_folder() -> Iterator[Path]:
    """Where the servers' data lies: not below pytest's own folder, which each session closes to other users."""
    with TemporaryDirectory(prefix="sensor-pipeline-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def broker(server_folder: Path) -> Iterator[KafkaBroker]:
    """A Kafka of this test run's own."""
    broker = KafkaBroker(server_folder / "kafka", ports.any_free())
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


@pytest.fixture(scope="session")
def postgres(server_folder: Path) -> Iterator[Settings]:
    """A PostgreSQL of this test run's own: settings that point at its migrated database."""
    settings = Settings(postgres_host=ports.LOOPBACK, postgres_port=ports.any_free(), postgres_db="template")
    server = PostgresServer(
        server_folder / "postgres",
        settings.postgres_port,
        user=settings.postgres_user,
        password=settings.postgres_password,
        database=settings.postgres_db,
    )
    server.start()
    try:
        migrate(settings)
        yield settings
    finally:
        server.stop()


@pytest.fixture(scope="session")
def administer(postgres: Settings) -> Callable[[str], None]:
    """Run one statement that no transaction may hold, such as CREATE DATABASE."""
    url = sa.URL.create(
        "postgresql+psycopg2",
        postgres.postgres_user,
        postgres.postgres_password,
        postgres.postgres_host,
        postgres.postgres_port,
        "postgres",
    )
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

    def run(statement: str) -> None:
        with engine.connect() as connection:
            connection.execute(sa.text(statement))

    return run


@pytest.fixture
def database_settings(postgres: Settings, administer: Callable[[str], None]) -> Iterator[Settings]:
    """Settings with a fresh, migrated database; no Kafka."""
    name = f"test_{next(_numbers)}"
    administer(f"CREATE DATABASE {name} TEMPLATE {postgres.postgres_db}")
    yield replace(postgres, postgres_db=name)
    administer(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def settings(database_settings: Settings, broker: KafkaBroker) -> Settings:
    """Settings with a fresh database, a fresh topic of four partitions and a fresh consumer group."""
    number = next(_numbers)
    topic = f"readings-{number}"
    broker.create_topic(topic, partitions=4)
    return replace(
        database_settings,
        kafka_bootstrap_servers=broker.bootstrap_servers,
        kafka_topics=(topic,),
        kafka_group_id=f"group-{number}",
    )


@pytest.fixture
def pipeline(settings: Settings) -> Pipeline:
    """A pipeline on those settings."""
    return Pipeline(settings)
