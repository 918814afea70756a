"""Runs one of Dagster's modules as `python -m` does, in a process that asks the code server less often if it is there.

Daemon and web server each ask once a second, on a new gRPC connection each time: 6 ms of CPU on the two sides, and a
quarter of what an idle stack cost. Dagster has no setting for it. A code server that was started anew is seen a few
seconds later; ticks and pages reach it meanwhile.
"""

from __future__ import annotations

import runpy
import sys

from dagster._grpc import server_watcher

ASK_SECONDS = 5
# As Dagster has it, about ten seconds until the UI shows that it is gone.
ATTEMPTS = 2


def main() -> None:
    """The module is the first argument, and what follows is for it."""
    server_watcher.WATCH_INTERVAL = ASK_SECONDS
    server_watcher.MAX_RECONNECT_ATTEMPTS = ATTEMPTS
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
