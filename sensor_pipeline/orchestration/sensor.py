"""`backlog_sensor`: looks at offsets and launches batches. It never consumes, commits or carries a message."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from dagster import (
    DagsterInstance,
    DagsterRunStatus,
    DefaultSensorStatus,
    JobDefinition,
    RunRequest,
    RunsFilter,
    SensorDefinition,
    SensorEvaluationContext,
    SensorResult,
    SkipReason,
    sensor,
)

from sensor_pipeline.backlog import read_backlog
from sensor_pipeline.errors import SensorPipelineError
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.offsets import Batch, OffsetRange, PartitionBacklog, Planned, lane_of, plan
from sensor_pipeline.orchestration import config
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.settings import BATCHES_IN_FLIGHT, Settings

# dagster.yaml limits the runs of a lane by this tag.
LANE_TAG = "lane"
TOPIC_TAG = "topic"
RANGES_TAG = "ranges"

_IN_FLIGHT = [
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]
_FAILED = [DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED]
# Failed runs count towards the pause before the next try for this long, and this many of them.
_FAILED_WITHIN = timedelta(hours=1)
_FAILED_AT_MOST = 500
# A tick has 60 s; a Kafka that does not answer must leave time to say so.
_KAFKA_SECONDS = 10
_TAG_CHARACTERS = 200


@dataclass(frozen=True)
class Runs:
    """The batches of the job's runs that matter to a plan."""

    in_flight: Sequence[Batch]
    failed: Sequence[tuple[Batch, datetime]]


def build_sensor(settings: Settings, job: JobDefinition) -> SensorDefinition:
    """The sensor with these settings; it is on from the start."""
    kafka = Kafka(settings, timeout=_KAFKA_SECONDS)
    database = Database(settings)

    @sensor(
        name="backlog_sensor",
        job=job,
        minimum_interval_seconds=max(1, round(settings.commit_interval_ms / 1000)),
        default_status=DefaultSensorStatus.RUNNING,
        description="Plans batches from the ledger and Kafka's offsets, and launches a run for each.",
    )
    def backlog_sensor(context: SensorEvaluationContext) -> SensorResult | SkipReason:
        # Before the ledger: a run that ends between the two is then in the ledger, and not planned again.
        runs = read_runs(context.instance, job.name)
        requests: list[RunRequest] = []
        said: list[str] = []
        for name in settings.kafka_topics:
            try:
                planned, sentence = _plan_topic(settings, kafka, database, name, runs)
            except SensorPipelineError as error:
                # The other topics go on, and one line says what is wrong instead of a traceback.
                said.append(str(error))
                context.log.error(str(error))
            else:
                requests += planned
                said.append(sentence)
        if settings.is_slow:
            said.append(settings.capacity_note())
        context.log.info("; ".join(said))
        return SensorResult(run_requests=requests) if requests else SkipReason("; ".join(said))

    return backlog_sensor


def read_runs(instance: DagsterInstance, job_name: str) -> Runs:
    """The batches in flight, and those that failed lately with the time when they ended."""
    in_flight = instance.get_runs(RunsFilter(job_name=job_name, statuses=_IN_FLIGHT))
    since = datetime.now(UTC) - _FAILED_WITHIN
    failed = instance.get_run_records(
        RunsFilter(job_name=job_name, statuses=_FAILED, updated_after=since), limit=_FAILED_AT_MOST
    )
    return Runs(
        in_flight=[batch for run in in_flight if (batch := config.of_run(run.run_config))],
        failed=[
            (batch, record.update_timestamp.replace(tzinfo=UTC))
            for record in failed
            if (batch := config.of_run(record.dagster_run.run_config))
        ],
    )


def _plan_topic(
    settings: Settings, kafka: Kafka, database: Database, name: str, runs: Runs
) -> tuple[list[RunRequest], str]:
    backlog = read_backlog(settings, kafka, database, name, register=True)
    topic = backlog.topic
    mine = [batch for batch in runs.in_flight if batch.kafka_topic_id == topic.kafka_topic_id]
    failed = [(batch, ended) for batch, ended in runs.failed if batch.kafka_topic_id == topic.kafka_topic_id]
    busy = Counter(lane for batch in mine for lane in {lane_of(p, settings.lanes) for p in batch.partitions})
    result = plan(
        [_with_runs(partition, mine, failed) for partition in backlog.partitions],
        lanes=settings.lanes,
        batch_size=settings.batch_size,
        in_flight_limit=BATCHES_IN_FLIGHT,
        in_flight=busy,
        now=datetime.now(UTC),
    )
    requests = [_request(Batch(topic.name, topic.kafka_topic_id, p.ranges), p) for p in result.batches]
    launched = f"{len(requests)} batches launched" if requests else "nothing to launch"
    return requests, "; ".join(
        [f"topic {name}: lag {backlog.lag:,}, {len(mine)} in flight, {launched}", *result.waiting]
    )


def _with_runs(
    partition: PartitionBacklog, in_flight: Sequence[Batch], failed: Sequence[tuple[Batch, datetime]]
) -> PartitionBacklog:
    return replace(
        partition,
        in_flight=tuple(r for batch in in_flight for r in _of(batch, partition.partition)),
        failed=tuple((r, ended) for batch, ended in failed for r in _of(batch, partition.partition)),
    )


def _of(batch: Batch, partition: int) -> list[OffsetRange]:
    return [r for r in batch.ranges if r.partition == partition]


def _request(batch: Batch, planned: Planned) -> RunRequest:
    # No run key: a failed run would block its key for good.
    ranges = " ".join(map(str, batch.ranges))
    return RunRequest(
        run_config=config.to_run_config(batch),
        tags={
            TOPIC_TAG: batch.topic,
            LANE_TAG: f"{planned.lane}@{batch.topic}",
            RANGES_TAG: ranges if len(ranges) <= _TAG_CHARACTERS else ranges[:_TAG_CHARACTERS] + "…",
        },
    )
