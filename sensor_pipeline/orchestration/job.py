"""The job `ingest_batch`: one batch, one run, in the steps of `sensor_pipeline.batch`."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

import pandas as pd
from dagster import (
    In,
    InitResourceContext,
    InputContext,
    IOManager,
    IOManagerDefinition,
    JobDefinition,
    MetadataValue,
    Nothing,
    OpExecutionContext,
    Out,
    OutputContext,
    ResourceDefinition,
    graph,
    in_process_executor,
    op,
)

from sensor_pipeline.backlog import oldest_unread, read_backlog
from sensor_pipeline.batch import Pipeline, Stopwatch
from sensor_pipeline.drained import Drained
from sensor_pipeline.errors import SensorPipelineError
from sensor_pipeline.offsets import Batch
from sensor_pipeline.orchestration import assets, config, report, tags
from sensor_pipeline.orchestration.explained import failures_explained
from sensor_pipeline.postgres.figures import count_rows
from sensor_pipeline.postgres.transaction import Origin, Written
from sensor_pipeline.settings import Settings

JOB_NAME = "ingest_batch"


@dataclass
class BatchRun:
    """What the ops of one run share."""

    batch: Batch
    pipeline: Pipeline
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))


class BatchIO(IOManager):
    """Hands a run's frames on in memory, and makes one again where it is not there.

    A re-execution from failure, or of selected ops, runs in another process and perhaps on another host: what an
    op needs is then drained again from the batch's offsets.
    """

    def __init__(self, run: BatchRun) -> None:
        self._run = run
        self._held: dict[str, object] = {}

    def handle_output(self, context: OutputContext, obj: object) -> None:
        """Keep an op's output for the rest of the run."""
        self._held[context.op_def.name] = obj

    def load_input(self, context: InputContext) -> object:
        """An earlier op's output."""
        upstream = context.upstream_output
        assert upstream is not None
        name = upstream.op_def.name
        if name not in self._held:
            with failures_explained():
                self._make("drain")
                if name == "detect":
                    self._make("detect")
        return self._held[name]

    def _make(self, name: str) -> None:
        if name in self._held:
            return
        pipeline = self._run.pipeline
        if name == "drain":
            with self._run.stopwatch.stage("drain"):
                self._held["drain"] = pipeline.drain(self._run.batch)
        else:
            drained = self._held["drain"]
            assert isinstance(drained, Drained)
            self._held["detect"] = pipeline.detect(drained)


@op(out=Out(Drained, io_manager_key="batch_io"), required_resource_keys={config.RESOURCE})
def drain(context: OpExecutionContext) -> Drained:
    """Read the batch's messages from Kafka, without what the ledger holds already, and decode them."""
    run: BatchRun = context.resources.batch
    with failures_explained(context), run.stopwatch.stage("drain"):
        drained = run.pipeline.drain(run.batch)
    context.add_output_metadata(report.drained(run.batch, drained))
    return drained


@op(out=Out(pd.DataFrame, io_manager_key="batch_io"), required_resource_keys={config.RESOURCE})
def detect(context: OpExecutionContext, drained: Drained) -> pd.DataFrame:
    """Sort the readings into each machine's event-time order and find where failures start and end."""
    run: BatchRun = context.resources.batch
    with failures_explained(context), run.stopwatch.stage("detect"):
        detected = run.pipeline.detect(drained)
    context.add_output_metadata(report.detected(detected))
    return detected


@op(out=Out(Nothing), required_resource_keys={config.RESOURCE})
def write(context: OpExecutionContext, drained: Drained, detected: pd.DataFrame) -> None:
    """Write readings, failures, rejected messages, batch log and ledger in one transaction of PostgreSQL."""
    run: BatchRun = context.resources.batch
    origin = Origin(run.started_at, context.run_id, run.stopwatch.seconds)
    with failures_explained(context), run.stopwatch.stage("write"):
        written = run.pipeline.write(run.batch, drained, detected, origin)
    at = datetime.now(UTC)
    took, stages, left = at - run.started_at, run.stopwatch.seconds, _left(context, run)
    context.log.info(_outcome(run.batch, written))
    context.add_output_metadata(report.written(written, took, stages) | report.left(left, at))
    outcome = "already ingested" if written.batch_id is None else "ingested"
    context.instance.add_run_tags(context.run_id, tags.of_run(run.batch, outcome, detected["machine"].nunique()))
    with failures_explained(context), run.pipeline.database.begin() as connection:
        rows = count_rows(connection)
    for event in assets.materializations(rows, report.of_assets(written, detected, rows, left, at, took, stages)):
        context.log_event(event)


@op(ins={"written": In(Nothing)}, out=Out(Nothing), required_resource_keys={config.RESOURCE})
def commit(context: OpExecutionContext) -> None:
    """Mirror the ledger to the consumer group's offsets, for the tools that show lag."""
    run: BatchRun = context.resources.batch
    with failures_explained(context), run.stopwatch.stage("commit"):
        committed = run.pipeline.commit(run.batch)
    context.add_output_metadata(
        {"committed offsets": MetadataValue.json({str(p): offset for p, offset in committed.items()})}
    )


def _left(context: OpExecutionContext, run: BatchRun) -> report.Left | None:
    """What is left of the topic. The batch is durable by now, so that a Kafka that is away only leaves it unsaid."""
    pipeline = run.pipeline
    try:
        backlog = read_backlog(pipeline.settings, pipeline.kafka, pipeline.database, run.batch.topic)
        return report.Left(backlog.lag, min(oldest_unread(pipeline.kafka, backlog).values(), default=None))
    except SensorPipelineError as error:
        context.log.warning(f"what is left of topic {run.batch.topic} is not known: {error}")
        return None


@graph
def ingest_batch() -> None:
    """Drain one batch from Kafka, detect failures, write it to PostgreSQL, then commit its offsets.

    The batch is the run's config. Running it again is safe: what the ledger holds is not written twice.
    """
    drained = drain()
    commit(written=write(drained, detect(drained)))


def build_job(settings: Settings) -> JobDefinition:
    """The job with these settings."""

    def make_run(context: InitResourceContext) -> BatchRun:
        with failures_explained():
            return BatchRun(config.to_batch(context.resource_config), Pipeline(settings))

    def make_io(context: InitResourceContext) -> BatchIO:
        return BatchIO(context.resources.batch)

    return ingest_batch.to_job(
        name=JOB_NAME,
        resource_defs={
            config.RESOURCE: ResourceDefinition(make_run, config.SCHEMA, description="The batch that the run owns."),
            "batch_io": IOManagerDefinition(make_io, required_resource_keys={config.RESOURCE}),
        },
        config=config.example(settings.kafka_topics[0]),
        # A process for each op would take longer to start than the batch takes.
        executor_def=in_process_executor,
    )


def _outcome(batch: Batch, written: Written) -> str:
    if written.batch_id is None:
        return f"all {len(batch)} offsets of {batch} were ingested before; nothing was written"
    return (
        f"batch {written.batch_id}: {written.inserted} inserted, {written.already_ingested} already ingested, "
        f"{written.rejected} rejected, {written.no_record} without a record"
    )
