"""Runs one of Dagster's modules as `python -m` does, in a process that asks less often than Dagster does by itself.

Daemon and web server each ask once a second, on a new gRPC connection each time: 6 ms of CPU on the two sides, and a
quarter of what an idle stack cost. Dagster has no setting for it. A code server that was started anew is seen a few
seconds later; ticks and pages reach it meanwhile.

The daemon goes round its sensors every 5 s. One with an interval of just that is left out whenever a round begins some
milliseconds early, a third of the time, and then waits for 10 s: a round that is a little longer misses none.
"""

from __future__ import annotations

import runpy
import sys

from dagster._daemon import sensor
from dagster._grpc import server_watcher

ASK_SECONDS = 5
# As Dagster has it, about ten seconds until the UI shows that it is gone.
ATTEMPTS = 2
ROUND_SECONDS = 5.2


def main() -> None:
    """The module is the first argument, and what follows is for it."""
    server_watcher.WATCH_INTERVAL = ASK_SECONDS
    server_watcher.MAX_RECONNECT_ATTEMPTS = ATTEMPTS
    sensor.MIN_INTERVAL_LOOP_TIME = ROUND_SECONDS  # type: ignore[assignment]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
