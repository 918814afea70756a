"""Three hosts: the servers with Dagster's processes, and two with workers, whose links and processes fail."""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sensor_pipeline.embedded import ports
from sensor_pipeline.embedded.kafka import KafkaBroker
from sensor_pipeline.embedded.postgres import PostgresServer
from sensor_pipeline.postgres.migrations import migrate
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.acceptance.commands import BIN
from sensor_pipeline_tests.acceptance.test_three_ways import lag
from sensor_pipeline_tests.hosts.network import WORKERS, Network, needs_namespaces, three_hosts
from sensor_pipeline_tests.hosts.redis_server import RedisServer, needs_redis
from sensor_pipeline_tests.hosts.test_workers import kill_with_children
from sensor_pipeline_tests.kafka.inspecting import query
from sensor_pipeline_tests.kafka.producing import group_offsets
from sensor_pipeline_tests.kills.deployment import LOST_AFTER, Deployment, deployed
from sensor_pipeline_tests.kills.test_points import check_end, prefixes
from sensor_pipeline_tests.kills.test_random import publish_fleet
from sensor_pipeline_tests.postgres.tables import other_session
from sensor_pipeline_tests.publishing import Publisher

pytestmark = [pytest.mark.soak, needs_redis, needs_namespaces]

LANES = 4
# A run whose worker is lost: seen to be missing, given up at a look after that, and its session by the server, which
# database.py tells to wait no longer than a minute for a client; then the sensor's first pause, and a batch. Start
# is what `Deployment` sets as start_timeout_seconds, for what a Redis has forgotten.
LOST, SESSION, START, PAUSE, BATCH = LOST_AFTER, 60, 30, 10, 120

_MEANWHILE = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock' AND client_addr = '{address}'
"""
_LANES = "SELECT run_id, value FROM run_tags WHERE key = 'lane'"


class Workers:
    """A worker on each of the two hosts."""

    def __init__(self, network: Network, deployment: Deployment) -> None:
        self.network = network
        self.deployment = deployment
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, worker: int) -> None:
        log = self._log(worker).open("ab")
        command = ["ip", "netns", "exec", self.network.host(worker), str(BIN / "sensor-pipeline"), "worker"]
        with log:
            self._processes[worker] = subprocess.Popen(
                [*command, "--concurrency", "2"], env=self.deployment.env, stdout=log, stderr=log
            )

    def kill(self, worker: int) -> None:
        kill_with_children(self._processes[worker])

    def executed(self, worker: int) -> list[str]:
        """The ids of the runs that one was given, from the first on."""
        return re.findall(r"Task execute_job\[(\S+)\] received", self._log(worker).read_text())

    def _log(self, worker: int) -> Path:
        path = self.deployment.home / f"worker-{worker}.log"
        path.touch()
        return path

    def end(self) -> None:
        for process in self._processes.values():
            kill_with_children(process)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    with three_hosts(monkeypatch) as network:
        yield network


@pytest.fixture
def redis(network: Network, tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def site(network: Network, server_folder: Path) -> Iterator[Settings]:
    """Servers that other hosts may reach; the topic has four partitions."""
    settings = Settings(
        postgres_host=ports.LOOPBACK,
        postgres_port=ports.any_free(),
        lanes=LANES,
        batch_size=500,
        kafka_bootstrap_servers=f"{ports.LOOPBACK}:{ports.any_free()}",
    )
    with postgres_of(settings, server_folder / "postgres-of-hosts") as postgres:
        migrate(settings)
        postgres.create_database(f"{settings.postgres_db}_dagster")
        port = int(settings.kafka_bootstrap_servers.rpartition(":")[2])
        broker = KafkaBroker(server_folder / "kafka-of-hosts", port)
        broker.start()
        try:
            broker.create_topic(settings.kafka_topics[0], partitions=LANES)
            yield settings
        finally:
            broker.stop()


@contextmanager
def postgres_of(settings: Settings, folder: Path) -> Iterator[PostgresServer]:
    server = PostgresServer(
        folder,
        settings.postgres_port,
        user=settings.postgres_user,
        password=settings.postgres_password,
        database=settings.postgres_db,
    )
    # It lets in whoever comes from where it listens: first this host, then all of them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ports, "LOOPBACK", "127.0.0.1")
        server.start()
        server.stop()
    with (server.data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all 10.83.0.0/16 scram-sha-256\n")
    server.start()
    try:
        yield server
    finally:
        server.stop()


def test_runs_are_spread_over_two_hosts_and_whatever_fails_there_the_rows_are_the_oracles_and_no_lane_is_stuck(
    site: Settings, network: Network, redis: RedisServer, tmp_path: Path
) -> None:
    seed = random.randrange(10**6)
    dice = random.Random(seed)
    publisher = Publisher(site)
    took: dict[str, float] = {}

    def publish() -> None:
        publish_fleet(publisher, dice, len(publisher.published), 2_000)

    with deployed(site, tmp_path / "dagster", max_runtime=120, broker=redis.url) as deployment:
        workers = Workers(network, deployment)
        deployment.patience_seconds = 600

        def until_done(what: str, at_most: float, release: Callable[[], None] | None = None) -> None:
            started = time.monotonic()
            deployment.wait_for(f"no lag: {what}", lambda: not lag(site))
            took[what] = time.monotonic() - started
            assert took[what] <= at_most, f"{what}: a lane was stuck for {took[what]:.0f} s"

        @contextmanager
        def in_the_middle_of_writes() -> Iterator[None]:
            """Both hosts write, and wait for a lock; at the end of the block they get it."""
            publish()
            with other_session(site, "SELECT FROM ingested_offsets FOR UPDATE"):
                for worker in WORKERS:
                    statement = _MEANWHILE.format(address=network.address(worker))
                    deployment.wait_for(f"a write of worker {worker}", lambda s=statement: query(site, s)[0][0])
                yield

        try:
            for worker in WORKERS:
                workers.start(worker)
            publish()
            publish()
            deployment.wait_for("no lag at first", lambda: not lag(site))
            lanes_of = dict(tuple(row) for row in query(deployment.dagster, _LANES))
            lanes = {w: {lanes_of[run] for run in workers.executed(w) if run in lanes_of} for w in WORKERS}
            assert all(len(of_one) > 1 for of_one in lanes.values()), lanes

            with in_the_middle_of_writes():
                network.cut(1)
            until_done("link cut", max(LOST, SESSION) + PAUSE + BATCH)
            network.mend(1)
            before = len(workers.executed(1))
            publish()
            deployment.wait_for("work for the host that is back", lambda: len(workers.executed(1)) > before)
            deployment.wait_for("no lag with it", lambda: not lag(site))

            with in_the_middle_of_writes():
                workers.kill(1)
            until_done("worker killed", LOST + PAUSE + BATCH)
            workers.start(1)

            with in_the_middle_of_writes():
                redis.kill()
                redis.start()
            until_done("Redis restarted", START + PAUSE + BATCH)

            deployment.wait_for("the group where the ledger is", lambda: group_offsets(site) == prefixes(site))
            deployment.wait_for("an end of all runs", lambda: set(deployment.runs().values()) <= {"SUCCESS", "FAILURE"})
            runs = Counter(deployment.runs().values())
            executed = {worker: len(workers.executed(worker)) for worker in WORKERS}
        finally:
            workers.end()
    stuck = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in took.items())
    print(
        f"seed {seed}: {len(publisher.published)} messages; runs {dict(runs)}, by worker {executed}; done after {stuck}"
    )
    check_end(site, publisher.published)
