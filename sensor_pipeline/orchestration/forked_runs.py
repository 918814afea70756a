"""Runs' processes, forked from one that has imported everything, where Dagster's code server would start each anew.

Importing took each run two seconds of a core, nine tenths of the time from its launch to its first op. The process
that they are forked from (multiprocessing's "forkserver") has one thread and no connection, is started with the first
run, and ends with the code server; a code server that is loaded anew has a new one. Dagster has no setting for it.
"""

from __future__ import annotations

import os
import sys
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import ModuleType

_SERVER = "dagster._grpc.server"
# By these words in its command line a run's process is known, as one that was started anew is.
TITLE = "dagster run --multiprocessing-fork"


class RunProcess(ForkServerProcess):
    """One run."""

    def run(self) -> None:
        """In the new process."""
        # Otherwise it may take the room of the environment too, in which `up` looks for its mark.
        os.putenv("SPT_NOENV", "1")
        from setproctitle import setproctitle

        setproctitle(TITLE)
        super().run()


class RunContext(ForkServerContext):
    """What the code server makes processes, queues and events by."""

    Process = RunProcess


def fork_runs() -> None:
    """Let this process fork its runs, where it is a code server and the system forks well."""
    server: ModuleType | None = sys.modules.get(_SERVER)
    if server is None or sys.platform != "linux":
        return
    context = RunContext()
    context.set_forkserver_preload([f"{__package__}.preloaded"])
    # The server may have been made before its definitions are loaded, and then holds another context already.
    server.DagsterApiServer._mp_ctx = property(lambda server: context, lambda server, other: None)
