"""Where a benchmark runs: embedded servers of its own, or those of the environment; what it makes there it removes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import psycopg2
import psycopg2.extensions
from psycopg2 import errors, sql

from sensor_pipeline.bench import reference
from sensor_pipeline.bench.work import PARTITIONS, Work
from sensor_pipeline.embedded import check_installed, ports
from sensor_pipeline.embedded.kafka import KafkaBroker
from sensor_pipeline.embedded.postgres import PostgresServer
from sensor_pipeline.embedded.topics import create_topic, delete_topic
from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.kafka import Kafka, Topic
from sensor_pipeline.postgres.migrations import migrate
from sensor_pipeline.publish import Publisher
from sensor_pipeline.settings import Settings


class Site:
    """Servers, and on them topics and databases for the time of the benchmark.

    Args:
        env: the environment; a Kafka or a PostgreSQL that it names is used, and any other is started.
        folder: for the data of what is started and for the reference's rows; default: one that is removed.
    """

    def __init__(self, env: Mapping[str, str], folder: Path | None = None) -> None:
        self._env = env
        self._folder = folder
        self._closing = ExitStack()
        self._numbers = count(1)
        self._topics: dict[Work, str] = {}
        self._rows: dict[Work, Path] = {}

    def __enter__(self) -> Site:
        """Start what the environment does not name."""
        with ExitStack() as started:
            self.folder = self._folder or Path(started.enter_context(TemporaryDirectory(prefix="sensor-pipeline-")))
            self.settings = Settings.from_env(self._env)
            if not self._env.get("KAFKA_BOOTSTRAP_SERVERS", "").strip():
                check_installed()
                broker = KafkaBroker(self.folder / "kafka", ports.any_free())
                started.callback(broker.stop)
                broker.start()
                self.settings = replace(self.settings, kafka_bootstrap_servers=broker.bootstrap_servers)
            if not self._env.get("POSTGRES_HOST", "").strip():
                check_installed()
                self.settings = replace(
                    self.settings, postgres_host=ports.LOOPBACK, postgres_port=ports.any_free(), postgres_db="bench"
                )
                server = PostgresServer(
                    self.folder / "postgres",
                    self.settings.postgres_port,
                    user=self.settings.postgres_user,
                    password=self.settings.postgres_password,
                    database=self.settings.postgres_db,
                )
                started.callback(server.stop)
                server.start()
            started.callback(self._remove_topics)
            self._closing = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the topics, and stop what was started."""
        self._closing.close()

    def topic(self, work: Work) -> str:
        """The topic that holds the work's messages; published when first asked for."""
        if work not in self._topics:
            name = f"bench-{os.getpid()}-{next(self._numbers)}"
            create_topic(self.settings.kafka_bootstrap_servers, name, PARTITIONS, self.settings.kafka_client)
            self._topics[work] = name
            with Publisher(self.settings, name) as publisher:
                for reading in work.messages():
                    publisher.send(reading.message)
        return self._topics[work]

    def kafka_topic(self, work: Work) -> Topic:
        """The same, with its Kafka topic id."""
        return Kafka(self.settings).topic(self.topic(work))

    @contextmanager
    def new_topic(self) -> Iterator[str]:
        """An empty topic, for one block."""
        name = f"bench-{os.getpid()}-{next(self._numbers)}"
        create_topic(self.settings.kafka_bootstrap_servers, name, PARTITIONS, self.settings.kafka_client)
        try:
            yield name
        finally:
            delete_topic(self.settings.kafka_bootstrap_servers, name, self.settings.kafka_client)

    def remove_topic(self, work: Work) -> None:
        """Make room on the disk."""
        if name := self._topics.pop(work, None):
            delete_topic(self.settings.kafka_bootstrap_servers, name, self.settings.kafka_client)

    def rows(self, work: Work) -> Path:
        """The reference's file of the work; written when first asked for."""
        if work not in self._rows:
            path = self.folder / f"rows-{next(self._numbers)}"
            reference.write_rows(work, path)
            self._rows[work] = path
        return self._rows[work]

    @contextmanager
    def database(self, *, migrated: bool = True) -> Iterator[Settings]:
        """Settings with a database of its own, dropped at the end, and a consumer group of its own."""
        name = f"bench_{os.getpid()}_{next(self._numbers)}"
        self._administer("CREATE DATABASE {}", name)
        try:
            settings = replace(self.settings, postgres_db=name, kafka_group_id=name)
            if migrated:
                migrate(settings)
            yield settings
        finally:
            self.drop_database(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever is connected to it."""
        self._administer("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)

    @contextmanager
    def connection(self, settings: Settings) -> Iterator[psycopg2.extensions.connection]:
        """A connection of the benchmark's own, with times in UTC."""
        connected = psycopg2.connect(
            host=settings.postgres_host,
            port=settings.postgres_port,
            user=settings.postgres_user,
            password=settings.postgres_password,
            dbname=settings.postgres_db,
            options="-c timezone=UTC",
            **settings.postgres_tls,
        )
        with closing(connected):
            yield connected

    def settle(self) -> None:
        """A checkpoint, where the user may: what earlier rounds left to be written is not paid by the next one."""
        try:
            self._administer("CHECKPOINT")
        except errors.InsufficientPrivilege:
            return

    def _administer(self, statement: str, name: str | None = None) -> None:
        with self.connection(self.settings) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                try:
                    cursor.execute(sql.SQL(statement).format(sql.Identifier(name or "")))
                except errors.InsufficientPrivilege as error:
                    if name is None:
                        raise
                    raise ConfigurationError(
                        f"user {self.settings.postgres_user} may not make databases on {self.settings.postgres_host}: "
                        "have CREATEDB granted, or leave POSTGRES_HOST unset and an embedded server is started"
                    ) from error

    def _remove_topics(self) -> None:
        for work in list(self._topics):
            self.remove_topic(work)
