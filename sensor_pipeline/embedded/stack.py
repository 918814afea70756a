"""The whole pipeline on this machine: servers, Dagster and a simulated fleet, in one data directory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from os import getpid
from pathlib import Path
from types import TracebackType

from sensor_pipeline.embedded import check_installed, jars, ports, services, stack_file
from sensor_pipeline.embedded.databases import create_database
from sensor_pipeline.embedded.kafka import KafkaBroker
from sensor_pipeline.embedded.postgres import PostgresServer
from sensor_pipeline.embedded.services import Service
from sensor_pipeline.embedded.shutdown import Screen, Shutdown
from sensor_pipeline.embedded.stack_file import StackFile, StackLock
from sensor_pipeline.embedded.supervisor import Supervisor
from sensor_pipeline.settings import KAFKA_CLIENT_PREFIX, Settings, with_secrets

UI_PORT = 3000
KAFKA_PORT = 9092
CODE_PORT = 4000
TOPIC_PARTITIONS = 4
DAGSTER_DATABASE = "dagster"

# What another terminal needs to know besides the servers, where it was set.
_PASSED_ON = ("KAFKA_TOPIC", "KAFKA_GROUP_ID", "POSTGRES_SSLMODE", "POSTGRES_SSLROOTCERT")
# Names the variables whose servers a stack started itself: exported by `sensor-pipeline env`, they would look like
# servers of one's own to the next `up` in the same shell.
_STARTED = "SENSOR_PIPELINE_STARTED"


class Stack:
    """Owns a data directory while it is entered: takes its lock, and leaves no process behind on exit.

    Args:
        data_dir: where everything lies; made if missing.
        env: the environment to start from. A Kafka or a PostgreSQL that it names is used as it is.
        screen: where it says what it does.
        ui: whether to run Dagster's web server.
        fleet: machines, and readings a second in all, of a simulated fleet; None for none.
    """

    def __init__(
        self,
        data_dir: Path,
        env: Mapping[str, str],
        screen: Screen,
        *,
        ui: bool = True,
        fleet: tuple[int, float] | None = None,
    ) -> None:
        check_installed()
        self.data_dir = data_dir.resolve()
        env = with_secrets(_without_started(env))
        self.embeds_kafka = not env.get("KAFKA_BOOTSTRAP_SERVERS", "").strip()
        self.embeds_postgres = not env.get("POSTGRES_HOST", "").strip()
        self.ui: str | None = None
        self.env: dict[str, str] = {}
        self._given = env
        self._screen = screen
        self._with_ui = ui
        self.fleet = fleet
        # There while runs may be in flight, and after a stop that cut some off.
        self._in_flight = self.data_dir / "runs-in-flight"
        self._services: dict[str, Service] = {}
        settings = Settings.from_env(env)
        logs = self.data_dir / "logs"
        self._broker = KafkaBroker(self.data_dir / "kafka", KAFKA_PORT, log=logs / "kafka.log")
        self._postgres = PostgresServer(
            self.data_dir / "postgres",
            settings.postgres_port,
            user=settings.postgres_user,
            password=settings.postgres_password,
            database=settings.postgres_db,
            log=logs / "postgres.log",
        )
        self._shutdown = Shutdown(self.data_dir, self._services, self._broker, self._postgres, screen)

    def __enter__(self) -> Stack:
        """Take the data directory.

        Raises:
            UnavailableError: another `up` has it.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._lock = StackLock(self.data_dir)
        stack_file.remove(self.data_dir)  # a killed one's: nobody may take it for ours
        (self.data_dir / ".gitignore").write_text("*\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything, in order, whether or not it was started."""
        shutdown = self._shutdown
        shutdown.begin()
        with ExitStack() as last_first:
            last_first.callback(self._lock.release)
            last_first.callback(shutdown.end_strays)
            last_first.callback(shutdown.stop_servers)
            last_first.callback(shutdown.end_services, "Dagster", services.WEBSERVER, services.CODE_SERVER)
            last_first.callback(self._await_runs)
            last_first.callback(shutdown.end_services, "new work", services.SIMULATOR, services.DAEMON)
            last_first.callback(stack_file.remove, self.data_dir)

    def hurry(self) -> None:
        """Stop faster: runs in flight are cut off."""
        self._shutdown.hurry()

    @property
    def settings(self) -> Settings:
        """Settings that point at the stack's servers, once these run."""
        return Settings.from_env(self._child_env)

    def start(self) -> None:
        """Start everything that is not there yet, one after the other.

        Raises:
            UnavailableError: something did not start; the message names its log.
            ConfigurationError: what was given does not allow it.
        """
        # Never a second server on the same data, and the ports of the first are free again.
        self._shutdown.end_strays()
        self._start_kafka()
        self._start_postgres()
        self._prepare_databases()
        self._give_up_lost_runs()
        self._start_dagster()
        if self.fleet:
            fleet = services.simulator(*self.fleet, data_dir=self.data_dir, env=self._child_env)
            self._run("simulated fleet", services.SIMULATOR, fleet)
        StackFile(pid=getpid(), ui=self.ui, env=self.env).write(self.data_dir)

    def supervisor(self) -> Supervisor:
        """What starts again what ended although it should run."""
        return Supervisor(self._services, time.monotonic())

    @property
    def _child_env(self) -> dict[str, str]:
        # gRPC would look for the code server behind a proxy.
        direct = {
            name: ",".join(filter(None, (self._given.get(name), ports.LOOPBACK))) for name in ("NO_PROXY", "no_proxy")
        }
        return {**self._given, **self.env, **direct, "DAGSTER_DISABLE_TELEMETRY": "1"}

    def _run(self, title: str, name: str, service: Service) -> None:
        self._services[name] = service
        with self._screen.step(title):
            service.start()

    def _start_kafka(self) -> None:
        passed_on = {name: value for name, value in self._given.items() if name.startswith(KAFKA_CLIENT_PREFIX)}
        passed_on |= {name: self._given[name] for name in _PASSED_ON if name in self._given}
        self.env |= passed_on
        started = {"KAFKA_BOOTSTRAP_SERVERS": self.embeds_kafka, "POSTGRES_HOST": self.embeds_postgres}
        self.env[_STARTED] = " ".join(name for name, is_ours in started.items() if is_ours)
        if not self.embeds_kafka:
            self.env["KAFKA_BOOTSTRAP_SERVERS"] = self._given["KAFKA_BOOTSTRAP_SERVERS"]
            return
        with self._screen.step("Kafka's files"):
            jars.fetch(jars.pinned_jars(), jars.cache_folder(self._given), self._screen.progress)
        self._broker.port = ports.next_free(KAFKA_PORT)
        self._run("Kafka", "Kafka", self._broker)
        self.env["KAFKA_BOOTSTRAP_SERVERS"] = self._broker.bootstrap_servers
        for topic in Settings.from_env(self._given).kafka_topics:
            self._broker.create_topic(topic, TOPIC_PARTITIONS)

    def _start_postgres(self) -> None:
        settings = Settings.from_env(self._given)
        host, port = settings.postgres_host, settings.postgres_port
        if self.embeds_postgres:
            host = ports.LOOPBACK
            port = self._postgres.port = ports.next_free(settings.postgres_port)
            self._run("PostgreSQL", "PostgreSQL", self._postgres)
            self.env["POSTGRES_SSLMODE"] = "disable"
        self.env |= {
            "POSTGRES_HOST": host,
            "POSTGRES_PORT": str(port),
            "POSTGRES_USER": settings.postgres_user,
            "POSTGRES_PASSWORD": settings.postgres_password,
            "POSTGRES_DB": settings.postgres_db,
            "DAGSTER_POSTGRES_DB": self._given.get("DAGSTER_POSTGRES_DB") or DAGSTER_DATABASE,
            "DAGSTER_HOME": str(services.home(self.data_dir)),
        }

    def _prepare_databases(self) -> None:
        from sensor_pipeline.postgres.migrations import migrate

        settings = self.settings
        with self._screen.step("database"):
            migrate(settings)
            create_database(
                self.env["DAGSTER_POSTGRES_DB"],
                host=settings.postgres_host,
                port=settings.postgres_port,
                user=settings.postgres_user,
                password=settings.postgres_password,
                login_database=settings.postgres_db,
                tls=settings.postgres_tls,
            )

    def _give_up_lost_runs(self) -> None:
        """After a stop that cut off runs. On a server that is not ours, those in flight may be someone else's."""
        services.prepare_home(self.data_dir)
        if self._in_flight.exists() and self.embeds_postgres:
            lost_runs = services.lost_runs(data_dir=self.data_dir, env=self._child_env)
            with self._screen.step("runs that were cut off"):
                lost_runs.run_to_its_end()
        self._in_flight.touch()

    def _start_dagster(self) -> None:
        code_port = ports.next_free(CODE_PORT)
        services.prepare_workspace(self.data_dir, code_port)
        env = self._child_env
        code_server = services.code_server(code_port, data_dir=self.data_dir, env=env)
        self._run("pipeline's code", services.CODE_SERVER, code_server)
        if self._with_ui:
            ui_port = ports.next_free(UI_PORT)
            self._run("UI", services.WEBSERVER, services.webserver(ui_port, data_dir=self.data_dir, env=env))
            self.ui = f"http://{ports.LOOPBACK}:{ui_port}"
        self._run("daemon", services.DAEMON, services.daemon(data_dir=self.data_dir, env=env))

    def _await_runs(self) -> None:
        if self._shutdown.await_runs() and services.CODE_SERVER in self._services:
            self._in_flight.unlink(missing_ok=True)


def _without_started(env: Mapping[str, str]) -> Mapping[str, str]:
    started = env.get(_STARTED, "").split()
    return {name: value for name, value in env.items() if name not in started}
