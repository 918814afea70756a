"""`backlog_sensor`: looks at offsets and launches batches. It never consumes, commits or carries a message."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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

from sensor_pipeline.backlog import TopicBacklog, read_backlog
from sensor_pipeline.errors import SensorPipelineError
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.offsets import (
    Batch,
    OffsetRange,
    PartitionBacklog,
    Planned,
    contiguous_prefix,
    lane_of,
    pause,
    plan,
    total,
)
from sensor_pipeline.orchestration import config, tags
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.settings import BATCHES_IN_FLIGHT, BATCHES_PLANNED, Settings
from sensor_pipeline.watch import read_pace

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
# Of the batches in flight, so many are named.
_NAMED = 4


@dataclass(frozen=True)
class Runs:
    """The batches of the job's runs that matter to a plan."""

    in_flight: Sequence[Batch]
    failed: Sequence[tuple[Batch, datetime]]


def build_sensor(settings: Settings, job: JobDefinition) -> SensorDefinition:
    """The sensor with these settings; it is on from the start."""
    kafka = Kafka(settings, timeout=_KAFKA_SECONDS)
    database = Database(settings, kept=1)
    mirror = MirrorWatch(kafka)

    @sensor(
        name="backlog_sensor",
        job=job,
        minimum_interval_seconds=max(1, round(settings.commit_interval_ms / 1000)),
        default_status=DefaultSensorStatus.RUNNING,
        description="Plans batches from the ledger and Kafka's offsets, and launches a run for each.",
    )
    def backlog_sensor(context: SensorEvaluationContext) -> SensorResult:
        # Before the ledger: a run that ends between the two is then in the ledger, and not planned again.
        runs = read_runs(context.instance, job.name)
        requests: list[RunRequest] = []
        said: list[str] = []
        for name in settings.kafka_topics:
            try:
                backlog = read_backlog(settings, kafka, database, name, register=True)
                planned, sentence = _plan_topic(settings, backlog, runs, mirror)
                pace = read_pace(settings, kafka, database, backlog)
            except SensorPipelineError as error:
                # The other topics go on, and one line says what is wrong instead of a traceback.
                said.append(str(error))
                context.log.error(str(error))
            else:
                requests += planned
                said += [sentence, *([f"falling behind: {pace}"] if pace and pace.falls_behind else [])]
        if settings.is_slow:
            said.append(settings.capacity_note())
        # A tick that launches has no reason to show, but each one's cursor is shown, and nothing else is kept in it.
        reason = "; ".join(said)
        context.log.info(reason)
        return SensorResult(requests, None if requests else SkipReason(reason), cursor=reason)

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


class MirrorWatch:
    """Sees where the group's offsets stay behind the ledger and no batch is to come that would mend that.

    So it is after a process was killed between the two commits of a partition's last batch.
    """

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._right: dict[str, Mapping[int, int]] = {}

    def behind(self, backlog: TopicBacklog) -> tuple[OffsetRange, ...]:
        """For each such partition its last ingested offset; Kafka is asked once for each state of the ledger."""
        topic = backlog.topic
        prefixes = {p.partition: contiguous_prefix(p.ingested) for p in backlog.partitions}
        if self._right.get(topic.kafka_topic_id) == prefixes:
            return ()
        committed = self._kafka.committed_offsets(topic)
        behind = [p for p, offset in prefixes.items() if offset and committed.get(p) != offset]
        if not behind:
            self._right[topic.kafka_topic_id] = prefixes
        return tuple(OffsetRange(p, prefixes[p] - 1, prefixes[p]) for p in behind)


def _plan_topic(
    settings: Settings, backlog: TopicBacklog, runs: Runs, mirror: MirrorWatch
) -> tuple[list[RunRequest], str]:
    topic = backlog.topic
    mine = [batch for batch in runs.in_flight if batch.kafka_topic_id == topic.kafka_topic_id]
    failed = [(batch, ended) for batch, ended in runs.failed if batch.kafka_topic_id == topic.kafka_topic_id]
    busy = Counter(lane for batch in mine for lane in {lane_of(p, settings.lanes) for p in batch.partitions})
    result = plan(
        [_with_runs(partition, mine, failed) for partition in backlog.partitions],
        lanes=settings.lanes,
        batch_size=settings.batch_size,
        in_flight_limit=BATCHES_IN_FLIGHT,
        planned_limit=BATCHES_PLANNED,
        in_flight=busy,
        now=datetime.now(UTC),
    )
    planned, waiting = list(result.batches), list(result.waiting)
    if not backlog.lag and not mine and (behind := mirror.behind(backlog)):
        tries = [ended for batch, ended in failed if set(batch.ranges) & set(behind)]
        if tries and max(tries) + pause(len(tries)) > datetime.now(UTC):
            waiting.append("the group's offsets are behind the ledger, and mending them has failed just now")
        else:
            waiting.append("the group's offsets are behind the ledger, and are mended")
            planned.append(Planned(lane_of(behind[0].partition, settings.lanes), behind))
    requests = [_request(Batch(topic.name, topic.kafka_topic_id, p.ranges), p) for p in planned]
    return requests, "; ".join([_state(settings, backlog, mine), _launched(planned, settings.lanes), *waiting])


def _state(settings: Settings, backlog: TopicBacklog, in_flight: Sequence[Batch]) -> str:
    lags = Counter(dict.fromkeys(range(settings.lanes), 0))
    for partition in backlog.partitions:
        lags[lane_of(partition.partition, settings.lanes)] += partition.lag
    named = "; ".join(" ".join(map(str, b.ranges)) for b in sorted(in_flight, key=lambda b: b.ranges)[:_NAMED])
    more = "; …" if len(in_flight) > _NAMED else ""
    # The list of ticks shows little more than the beginning and the end.
    topic = f"topic {backlog.topic.name}: " if len(settings.kafka_topics) > 1 else ""
    of_lanes = f" ({_of_lanes(lags.items())})" if settings.lanes > 1 else ""
    flying = f"{len(in_flight)} in flight" + (f" ({named}{more})" if in_flight else "")
    return f"{topic}lag {backlog.lag:,}{of_lanes}, {flying}"


def _launched(planned: Sequence[Planned], lanes: int) -> str:
    if not planned:
        return "nothing to launch"
    sizes = [(p.lane, total(p.ranges)) for p in planned]
    said = _of_lanes(sizes) if lanes > 1 else ", ".join(f"{size:,}" for _, size in sizes)
    return f"{len(planned)} {'batch' if len(planned) == 1 else 'batches'} launched ({said})"


def _of_lanes(offsets: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"lane {lane}: {count:,}" for lane, count in offsets)


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
    return RunRequest(
        run_config=config.to_run_config(batch),
        tags={**tags.of_batch(batch), tags.LANE: f"{planned.lane}@{batch.topic}"},
    )
