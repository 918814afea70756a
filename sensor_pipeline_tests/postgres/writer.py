"""A process that writes one batch, to be killed: `python -m …postgres.writer HOST PORT DATABASE`."""

from __future__ import annotations

import sys

from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.postgres.tables import batch_of, busy_history


def main(host: str, port: str, database: str) -> None:
    """Write, say so, and wait for the end: the offsets' commit never comes."""
    log = busy_history(Settings(postgres_host=host, postgres_port=int(port), postgres_db=database))
    print("drained", flush=True)
    log.ingest(list(batch_of(log).ranges))
    print("written", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
