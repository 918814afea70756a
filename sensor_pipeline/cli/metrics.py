"""`sensor-pipeline metrics`."""

from __future__ import annotations

import signal
from threading import Thread
from wsgiref.simple_server import WSGIServer

import click
from prometheus_client import CollectorRegistry, start_http_server

from sensor_pipeline.cli.environment import environment
from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.metrics import PipelineCollector
from sensor_pipeline.settings import Settings


@click.command("metrics")
@click.option("--port", type=click.IntRange(0, 65535), default=9464, show_default=True, help="0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
def command(port: int, host: str) -> None:
    """Serve the pipeline's metrics to Prometheus until Ctrl-C.

    PostgreSQL and Kafka are asked at each scrape. Where one is down the others' metrics are served, and
    sensor_pipeline_up says so.
    """
    server, thread = serve(Settings.from_env(environment()), host, port)
    # The first process of a container, and a child of one that ignores it, would not be ended by SIGTERM otherwise.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    click.echo(f"metrics at http://{host}:{server.server_port}/metrics")
    try:
        thread.join()
    except KeyboardInterrupt:
        server.shutdown()


def serve(settings: Settings, host: str, port: int) -> tuple[WSGIServer, Thread]:
    """The server, which answers from now on, and its thread.

    Raises:
        ConfigurationError: it cannot listen there.
    """
    registry = CollectorRegistry()
    registry.register(PipelineCollector(settings))
    try:
        return start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigurationError(
            f"cannot serve metrics at {host}:{port}: {error.strerror or error}; choose another --port or --host"
        ) from error
