"""Tells Dagster that the runs of a stack that was killed are over, as a program of its own.

Nobody else would before `max_runtime_seconds`: until then such a run holds its lane and its offsets. Only for a
stack whose processes have all ended, on a Dagster instance that is the stack's own.
"""

from __future__ import annotations

from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

IN_FLIGHT = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]


def main() -> None:
    """Mark every run in flight as failed; queued ones are still to come."""
    with DagsterInstance.get() as instance:
        for run in instance.get_runs(RunsFilter(statuses=IN_FLIGHT)):
            instance.report_run_failed(run, "The stack was killed while this run was in flight.")


if __name__ == "__main__":
    main()
