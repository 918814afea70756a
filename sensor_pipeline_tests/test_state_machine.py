"""Any history of publishing, ingesting, dying, meeting and losing: after every step the rows are the oracle's."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from threading import Lock, current_thread
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from confluent_kafka import Producer
from hypothesis import HealthCheck, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sensor_pipeline.catch_up import CatchUp
from sensor_pipeline.errors import DataError, GapError, TopicReplacedError, UnavailableError
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.postgres.transaction import Written
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.interleaving import (
    Death,
    Died,
    Kind,
    Outcome,
    Process,
    Step,
    Turns,
    outcome_of,
    watched_copies,
)
from sensor_pipeline_tests.kafka.inspecting import backlog, check_counts, check_rows, query
from sensor_pipeline_tests.kafka.inspecting import batch as batch_of
from sensor_pipeline_tests.kafka.producing import (
    Publisher,
    Transaction,
    create_topic,
    delete_records,
    delete_topic,
    group_offsets,
    recreate_topic,
)
from sensor_pipeline_tests.kafka.test_gaps import accept
from sensor_pipeline_tests.oracle import Published, bytes_of, connect, expected, failure_ids, stored
from sensor_pipeline_tests.postgres.tables import dated
from sensor_pipeline_tests.soak import IS_SOAK, amount
from sensor_pipeline_tests.test_any_history import check_ids

PARTITIONS = 3
MACHINES = 3
# Histories lie around this many midnights, of which the first is the horizon.
DAYS = 12
Place = tuple[int, int]

POISON: list[tuple[bytes | None, str]] = [
    (None, "tombstone"),
    (b"poison", "not_json"),
    (b"\xff", "not_utf8"),
    (b"[]", "not_an_object"),
    (b'{"timestamp": "2026-01-01", "readings": {}}', "missing_machine_id"),
    (b'{"machine_id": "m", "timestamp": "today", "readings": {}}', "timestamp_unreadable"),
    (b'{"machine_id": "m", "timestamp": "9000-01-01", "readings": {}}', "timestamp_in_future"),
    (b'{"machine_id": "m", "timestamp": "2026-01-01", "readings": {"readings": {"a": [1]}}}', "value_nested"),
]

_numbers = itertools.count(1)
# Producers of transactions, each of which takes its time to get ready.
_idle: list[Producer] = []
# How often what happened, over all histories.
HAPPENED: Counter[str] = Counter()
# What a soak must have seen, or it tried less than it says.
MUST_HAPPEN = [
    *(f"deaths: {kind}" for kind in Kind if kind is not Kind.RETRY),
    *(f"batches that failed: {name}" for name in ("GapError", "TopicReplacedError", "UnavailableError")),
    "batches that were in already",
    "failures that became two or more",
    "gaps accepted",
    "interleavings: both wrote",
    "interleavings: waits for a lock of the other",
    "planned batches",
    "step: recreate the topic",
]


# What Hypothesis draws


@dataclass(frozen=True)
class Drawn:
    """A message to be: `how` says how its time comes from those before it, and `by` how far."""

    how: str
    partition: int
    machine: int
    by: int
    failing: bool


HOW = ["next", "next", "next", "late", "late", "same time", "again", "poison"]
one_message = st.builds(
    Drawn,
    st.sampled_from(HOW),
    st.integers(0, PARTITIONS - 1),
    st.integers(0, MACHINES - 1),
    st.integers(0, 30),
    st.booleans(),
)
messages = st.lists(one_message, min_size=1, max_size=15)
many_messages = st.lists(one_message, min_size=4, max_size=15)
# For some partitions, where the range starts (below 0: about where the first one is that is left) and how long it is;
# cut to what there is.
ranges = st.dictionaries(
    st.integers(0, PARTITIONS - 1), st.tuples(st.integers(-12, 30), st.integers(1, 20)), min_size=1, max_size=PARTITIONS
)
# How often a run comes by a place where it may die, at most; a statement is where it dies most.
_COMES_BY = {kind: 1 for kind in Kind if kind is not Kind.RETRY} | {Kind.COPY: 2, Kind.DRAIN: 2, Kind.STATEMENT: 46}
_COMES_BY |= {Kind.COMMIT: 5, Kind.COMMITTED: 5}
deaths = st.sampled_from([*_COMES_BY, Kind.STATEMENT]).flatmap(
    lambda kind: st.builds(Death, st.just(kind), st.integers(0, _COMES_BY[kind] - 1))
)
some_deaths = st.tuples(st.integers(0, 3), deaths).map(lambda drawn: drawn[1] if drawn[0] == 0 else None)
# A first turn of no steps makes the second one begin.
turn_lengths = st.tuples(st.sampled_from([[], [0]]), st.lists(st.integers(1, 12), min_size=2, max_size=10)).map(
    lambda drawn: drawn[0] + drawn[1]
)


# What a person who saw all that happened knows


class TopicHistory:
    """A topic from its creation to its deletion.

    `done` are the places (partition and offset) that batches took in, `lost` those accepted as lost, `first` the first
    offset that Kafka has of each partition; `is_known` says that the ledger has the topic.
    """

    def __init__(self, publisher: Publisher, *, is_first_of_its_name: bool) -> None:
        self.publisher = publisher
        self.id = publisher.topic_id
        self.is_first_of_its_name = is_first_of_its_name
        self.is_known = False
        self.first = dict.fromkeys(range(PARTITIONS), 0)
        self.done: set[Place] = set()
        self.lost: set[Place] = set()
        self.gaps: list[tuple[int, int, int]] = []
        self.batches: list[tuple[Any, ...]] = []

    def become_known(self) -> None:
        """What a topic of a new name lost before its first start is nobody's loss."""
        self.is_known = True
        if self.is_first_of_its_name:
            for partition, first in self.first.items():
                self.lose(OffsetRange(partition, 0, first))

    def lose(self, span: OffsetRange) -> None:
        """Accept the loss of a range."""
        if len(span):
            self.gaps.append((span.partition, span.start, span.end))
            self.lost |= places([span])

    @property
    def settled(self) -> set[Place]:
        """All that the ledger holds."""
        return self.done | self.lost

    def gone(self) -> set[Place]:
        """What Kafka no longer has."""
        return places(OffsetRange(partition, 0, first) for partition, first in self.first.items())

    def gap(self, partition: int) -> list[OffsetRange]:
        """What Kafka no longer has and no batch took in, in a topic that is no first start."""
        if self.is_first_of_its_name and not self.is_known:
            return []
        return spans(place for place in self.gone() - self.settled if place[0] == partition)

    def prefix(self, partition: int) -> int:
        """Where the unbroken run of settled offsets ends."""
        return next(offset for offset in itertools.count() if (partition, offset) not in self.settled)

    def count(self, wanted: Iterable[Place]) -> tuple[int, int, int]:
        """How many of these are readings, poison, and no record."""
        bad = {(m.partition, m.offset): m.bad is not None for m in self.publisher.published}
        kinds = Counter("empty" if place not in bad else "bad" if bad[place] else "good" for place in wanted)
        return kinds["good"], kinds["bad"], kinds["empty"]

    def taken_in(self) -> list[Published]:
        """The messages at the places that are done."""
        return [m for m in self.publisher.published if (m.partition, m.offset) in self.done]

    def ledger(self) -> list[tuple[Any, ...]]:
        """For each partition that has any its settled ranges, readings, rejected, no record and lost."""
        rows = []
        for partition in range(PARTITIONS):
            done = {place for place in self.done if place[0] == partition}
            lost = {place for place in self.lost if place[0] == partition}
            if done | lost:
                held = ",".join(f"[{span.start},{span.end})" for span in spans(done | lost))
                rows.append((self.id, partition, f"{{{held}}}", *self.count(done), len(lost)))
        return rows


def places(ranges: Iterable[OffsetRange]) -> set[Place]:
    return {(span.partition, offset) for span in ranges for offset in range(span.start, span.end)}


def spans(of: Iterable[Place]) -> list[OffsetRange]:
    found: list[OffsetRange] = []
    for partition, offset in sorted(of):
        if found and (found[-1].partition, found[-1].end) == (partition, offset):
            found[-1] = replace(found[-1], end=offset + 1)
        else:
            found.append(OffsetRange(partition, offset, offset + 1))
    return found


# What PostgreSQL holds of all topics of one name


LEDGER = """
    SELECT kafka_topic_id, kafka_partition, offsets::text, readings, rejected, no_record, lost
    FROM ingested_offsets JOIN topics t ON t.id = topic_id WHERE name = :name AND offsets <> '{}'
"""
BATCHES = """
    SELECT kafka_topic_id, ranges, drained, inserted, already_ingested, rejected, no_record
    FROM batches b JOIN topics t ON t.id = topic_id WHERE name = :name
"""
REJECTED = """
    SELECT kafka_topic_id, kafka_partition, kafka_offset, reason, payload, key
    FROM rejected_messages JOIN topics t ON t.id = topic_id WHERE name = :name
"""
GAPS = """
    SELECT kafka_topic_id, kafka_partition, lower(offsets), upper(offsets)
    FROM accepted_gaps JOIN topics t ON t.id = topic_id WHERE name = :name
"""


@dataclass(frozen=True)
class Counts:
    """The ledger, the batch log by topic, the rejected messages and the accepted gaps."""

    ledger: list[tuple[Any, ...]]
    batches: dict[str, list[tuple[Any, ...]]]
    rejected: dict[tuple[str, int, int], Any]
    gaps: list[tuple[Any, ...]]


def stored_counts(settings: Settings, name: str) -> Counts:
    with connect(settings).connect() as connection:
        ledger, batches, rejected, gaps = (
            [tuple(row) for row in connection.execute(sa.text(statement), {"name": name})]
            for statement in (LEDGER, BATCHES, REJECTED, GAPS)
        )
    logged: dict[str, list[tuple[Any, ...]]] = {}
    for topic_id, held, *counts in batches:
        logged.setdefault(topic_id, []).append((tuple(OffsetRange(**span) for span in held), *counts))
    # Of two at once the later one in the log may have been committed earlier.
    logged = {topic_id: sorted(rows) for topic_id, rows in logged.items()}
    bad = {(t, p, o): (reason, bytes_of(payload), bytes_of(key)) for t, p, o, reason, payload, key in rejected}
    return Counts(sorted(ledger), logged, bad, sorted(gaps))


def is_known(settings: Settings, topic_id: str) -> bool:
    return bool(query(settings, f"SELECT FROM topics WHERE kafka_topic_id = '{topic_id}'"))


class AnyHistory(RuleBasedStateMachine):
    """One topic name, its machines, and all that may happen to them."""

    shared: ClassVar[Settings]
    horizon: ClassVar[datetime]

    def __init__(self) -> None:
        super().__init__()
        number = next(_numbers)
        self.name = f"history-{number}"
        self.settings = replace(self.shared, kafka_topics=(self.name,), kafka_group_id=f"group-{number}")
        self.machines = [f"{self.name}-m{i}" for i in range(MACHINES)]
        self.base = self.horizon + timedelta(days=number % DAYS)
        create_topic(self.settings, self.name, PARTITIONS)
        self.topics = [TopicHistory(Publisher(self.settings), is_first_of_its_name=True)]
        self.topic.publisher._idle, _idle[:] = _idle[:], []
        self.process = Process(self.settings, "A")
        self.other = Process(self.settings, "B")
        self.open: Transaction | None = None
        self.batches: list[Batch] = []
        self.clock = 0
        self.last = (0, 0, False)
        self.sent: list[bytes] = []
        self.ids: dict[int, frozenset[Any]] = {}
        self.used_ids: set[int] = set()
        self.counted: dict[Process, tuple[int, ...]] = {}
        self.story: list[str] = []
        self.has_planned = False
        self.is_broken = False
        HAPPENED["histories"] += 1

    @property
    def topic(self) -> TopicHistory:
        """The one that there is now."""
        return self.topics[-1]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step of the history, after which everything holds; its story is told where it does not."""
        self.story.clear()
        self.is_broken = True
        HAPPENED["steps"] += 1
        HAPPENED[f"step: {name}"] += 1
        try:
            yield
            self.check_rows()
            assert failure_ids(self.settings, self.machines) == self.ids
        finally:
            note("\n    ".join([f"  {name}:", *self.story]))
        self.is_broken = False

    def tell(self, line: object) -> None:
        self.story.append(str(line))

    # Publishing

    def render(self, drawn: Sequence[Drawn]) -> list[tuple[int, bytes | None, str | None]]:
        """Partition, value and what is bad about it, of each message."""
        return [(one.partition, *self._render(one)) for one in drawn]

    def _render(self, one: Drawn) -> tuple[bytes | None, str | None]:
        HAPPENED[f"messages: {one.how}"] += 1
        if one.how == "poison":
            return POISON[one.by % len(POISON)]
        if one.how == "again" and self.sent:
            return self.sent[one.by % len(self.sent)], None
        machine, second, failing = one.machine, self.clock, one.failing
        if one.how == "next":
            self.clock = second = self.clock + one.by % 4
        elif one.how == "late":
            second = self.clock - one.by
        elif one.how == "same time":
            machine, second, failing = self.last[0], self.last[1], not self.last[2]
        self.last = (machine, second, failing)
        moment = self.base + timedelta(seconds=second - 20)
        # Some producers say which time it is they mean.
        moment = moment.replace(tzinfo=None) if one.by % 2 else moment.astimezone()
        self.sent.append(dated(self.machines[machine], moment, failing))
        return self.sent[-1], None

    def publish_all(self, rendered: Iterable[tuple[int, bytes | None, str | None]], to: Any) -> None:
        for partition, value, bad in rendered:
            to.send(partition, value, bad=bad)
            self.tell(f"to {partition}: {bad or value}")

    @rule(drawn=many_messages)
    def publish(self, drawn: list[Drawn]) -> None:
        with self.step("publish"):
            self.publish_all(self.render(drawn), self.topic.publisher)

    @rule(drawn=messages, commits=st.booleans())
    def publish_in_a_transaction(self, drawn: list[Drawn], commits: bool) -> None:
        with self.step("commit a transaction" if commits else "abort a transaction"):
            self.publish_in(self.begin(), drawn, commits)

    def begin(self) -> Transaction:
        return self.topic.publisher.begin()

    def publish_in(self, transaction: Transaction, drawn: list[Drawn], commits: bool) -> None:
        self.publish_all(self.render(drawn), transaction)
        self.end(transaction, commits)

    def end(self, transaction: Transaction, commits: bool) -> None:
        if commits:
            transaction.commit()
        else:
            transaction.abort()

    @precondition(lambda self: self.open is None)
    @rule(drawn=messages)
    def leave_a_transaction_open(self, drawn: list[Drawn]) -> None:
        with self.step("leave a transaction open"):
            self.open = self.begin()
            self.publish_all(self.render(drawn), self.open)

    @precondition(lambda self: self.open is not None)
    @rule(commits=st.booleans())
    def end_the_open_transaction(self, commits: bool) -> None:
        with self.step("end the open transaction"):
            self._end_open(commits)

    def _end_open(self, commits: bool) -> None:
        if self.open is not None:
            self.end(self.open, commits)
            self.open = None

    # What happens to the topic

    @precondition(lambda self: self.topic.done and len(self.topics) < 3)
    @rule(commits=st.booleans(), runs=st.booleans())
    def delete_the_topic_and_create_it_again(self, commits: bool, runs: bool) -> None:
        """A batch that was planned before may be run after."""
        with self.step("recreate the topic"):
            self._end_open(commits)
            planned = self.make_batch(self.left())
            recreate_topic(self.settings, self.name, PARTITIONS)
            self.topics.append(TopicHistory(Publisher(self.settings), is_first_of_its_name=False))
            if planned and runs:
                self.run_and_check(planned)

    @rule(fresh=messages, partition=st.integers(0, PARTITIONS - 1), share=st.integers(1, 4))
    def delete_records_from_the_start(self, fresh: list[Drawn], partition: int, share: int) -> None:
        with self.step("delete records"):
            self.publish_all(self.render(fresh), self.topic.publisher)
            first, end = self.topic.first[partition], self.ends()[partition]
            before = first + (end - first) * share // 4
            delete_records(self.settings, self.name, {partition: before})
            self.topic.first[partition] = before
            kind = "a gap" if self.topic.gap(partition) else "none of it missed"
            HAPPENED[f"deleted records: {kind}"] += 1
            self.tell(f"partition {partition} begins at {before}: {kind}")

    def ends(self) -> dict[int, int]:
        kafka = self.process.pipeline.kafka
        return kafka.end_offsets(kafka.topic(self.name))

    def gaps(self) -> list[int]:
        """The partitions that have a gap."""
        return [partition for partition in range(PARTITIONS) if self.topic.gap(partition)]

    @precondition(lambda self: self.gaps())
    @rule(at=st.integers(0, PARTITIONS - 1))
    def accept_a_gap(self, at: int) -> None:
        with self.step("accept a gap"):
            self.run_accept_gap(self.gaps()[at % len(self.gaps())])

    def run_accept_gap(self, partition: int) -> None:
        gap = self.topic.gap(partition)
        result = accept(self.settings, partition, "--reason", "tried", "--yes")
        self.tell(result.output.strip())
        assert result.exit_code == 0, result
        HAPPENED["gaps accepted"] += 1
        if not self.topic.is_known:
            self.topic.become_known()
        for span in gap:
            self.topic.lose(span)

    # Running

    @precondition(lambda self: self.has_planned)
    @rule(lanes=st.integers(1, PARTITIONS + 1), batch_size=st.sampled_from([2, 5, 11, 1000]))
    def change_lanes_and_batch_size(self, lanes: int, batch_size: int) -> None:
        with self.step("change LANES and BATCH_SIZE"):
            self.settings = replace(self.settings, lanes=lanes, batch_size=batch_size)
            self.process.pipeline.settings = self.other.pipeline.settings = self.settings
            self.has_planned = False

    @precondition(lambda self: self.topic.publisher.published)
    @rule(drawn=ranges, beyond=st.integers(0, 9))
    def run_a_batch(self, drawn: Mapping[int, tuple[int, int]], beyond: int) -> None:
        if batch := self.batch(drawn, beyond=beyond == 9):
            with self.step("run a batch"):
                self.run_and_check(batch)

    @precondition(lambda self: self.batches)
    @rule(at=st.integers(0, 30))
    def run_one_again(self, at: int) -> None:
        with self.step("run one again"):
            self.run_and_check(self.batches[-1 - at % len(self.batches)])

    @precondition(lambda self: self.topic.publisher.published)
    @rule(drawn=ranges, death=deaths)
    def run_a_batch_and_die(self, drawn: Mapping[int, tuple[int, int]], death: Death) -> None:
        if batch := self.batch(drawn):
            with self.step("run a batch and die"):
                self.run_and_check(batch, death)

    @rule(fresh=messages, most=st.integers(1, 6))
    def run_what_is_planned(self, fresh: list[Drawn], most: int) -> None:
        with self.step("run what is planned"):
            self.publish_all(self.render(fresh), self.topic.publisher)
            self.catch_up(most)

    @rule(
        fresh=many_messages,
        lane=st.integers(0, PARTITIONS - 1),
        lengths=turn_lengths,
        gather=st.sampled_from([Kind.DETECTED, Kind.COPY, Kind.COPY]),
        death=some_deaths,
    )
    def run_two_lanes_at_once(
        self, fresh: list[Drawn], lane: int, lengths: list[int], gather: Kind, death: Death | None
    ) -> None:
        """All that is left of one partition, and all that is left of the others."""
        with self.step("two lanes at once"):
            self.publish_all(self.render(fresh), self.topic.publisher)
            left = self.left()
            batches = [
                self.make_batch([span for span in left if (span.partition == lane) == mine]) for mine in (True, False)
            ]
            self.run_together([batch for batch in batches if batch], lengths, gather, death)

    @rule(
        fresh=many_messages,
        drawn=st.tuples(ranges, ranges),
        how=st.sampled_from(["one batch twice", "two batches", "a batch and the next"]),
        lengths=turn_lengths,
        gather=st.sampled_from([None, Kind.DETECTED, Kind.OFFSETS, Kind.OFFSETS]),
        death=some_deaths,
    )
    def run_two_batches_at_once(
        self,
        fresh: list[Drawn],
        drawn: tuple[Any, Any],
        how: str,
        lengths: list[int],
        gather: Kind | None,
        death: Death | None,
    ) -> None:
        """They may overlap."""
        with self.step(f"{how} at once"):
            self.publish_all(self.render(fresh), self.topic.publisher)
            first = self.batch(drawn[0])
            second = first if how == "one batch twice" else self.batch(drawn[1])
            if how == "a batch and the next":
                first, second = self.halves(self.left())
            self.run_together([batch for batch in (first, second) if batch], lengths, gather, death)

    def halves(self, left: Sequence[OffsetRange]) -> tuple[Batch | None, Batch | None]:
        """The first half of each range, and the second."""
        middles = [span.start + len(span) // 2 for span in left]
        early = [replace(span, end=middle) for span, middle in zip(left, middles, strict=True)]
        late = [replace(span, start=middle) for span, middle in zip(left, middles, strict=True)]
        return self.make_batch([span for span in early if len(span)]), self.make_batch(late)

    def batch(self, drawn: Mapping[int, tuple[int, int]], *, beyond: bool = False) -> Batch | None:
        """A batch of what is there, or a little beyond it."""
        ends = self.ends()
        wanted = []
        for partition, (start, length) in drawn.items():
            if end := ends[partition]:
                at = (start if start >= 0 else max(self.topic.prefix(partition) + start // 3 + 2, 0)) % end
                wanted.append(OffsetRange(partition, at, end + 1000 if beyond else min(at + length, end)))
        return self.make_batch(wanted)

    def make_batch(self, wanted: Sequence[OffsetRange]) -> Batch | None:
        return Batch(self.name, self.topic.id, tuple(wanted)) if wanted else None

    def left(self) -> list[OffsetRange]:
        """The first range of each partition that is left to ingest."""
        there = places(OffsetRange(p, self.topic.first[p], end) for p, end in self.ends().items())
        first: dict[int, OffsetRange] = {}
        for span in spans(there - self.topic.settled):
            first.setdefault(span.partition, span)
        return list(first.values())

    def run_and_check(self, batch: Batch, death: Death | None = None) -> None:
        """Run one batch, in the first process."""
        self.batches.append(batch)
        self.counted.clear()
        process = self.process
        awaited = self.awaited_error(batch)
        process.death = death
        process.before = lambda step: self.on_step(process, step)
        outcome = outcome_of(lambda: process.run(batch))
        self.tell(f"{batch}: {said(outcome)}")
        self.learn_whether_known()
        self.check_outcome(process, batch, outcome, awaited)
        self.check_mirror([batch] if isinstance(outcome, Written) else [])
        self.replace_the_dead()

    def run_together(
        self, batches: Sequence[Batch], lengths: Sequence[int], gather: Kind | None, death: Death | None
    ) -> None:
        """Run two batches that take turns."""
        self.batches += batches
        self.counted.clear()
        runs = list(zip((self.process, self.other), batches, strict=False))
        awaited = [self.awaited_error(batch) for batch in batches]
        self.process.death = death
        turns = Turns(self.settings, runs, lengths, gather=gather, on_step=self.on_step)
        try:
            outcomes = turns.run()
        finally:
            self.story += turns.story
        self.learn_whether_known()
        finished = []
        for (process, batch), outcome, error in zip(runs, outcomes, awaited, strict=True):
            self.tell(f"{process.name} {batch}: {said(outcome)}")
            self.check_outcome(process, batch, outcome, error)
            finished += [batch] if isinstance(outcome, Written) else []
        dead = [batch for batch, outcome in zip(batches, outcomes, strict=True) if isinstance(outcome, Died)]
        self.check_mirror(finished, except_for=dead)
        self.replace_the_dead()
        HAPPENED["interleavings"] += len(runs) == 2
        HAPPENED["interleavings: turns"] += turns.switches
        HAPPENED["interleavings: waits for a lock of the other"] += turns.waits
        both = [self.counted.get(process) for process, _ in runs]
        HAPPENED["interleavings: both wrote"] += len(runs) == 2 and all(both)

    def catch_up(self, most: int | None = None) -> None:
        """Run batches as the planner says, at most so many, and then the process is gone."""
        self.has_planned = True
        process = self.process
        pipeline = process.pipeline
        one_at_a_time = Lock()
        left = itertools.count(1)

        def run(batch: Batch) -> Written:
            with one_at_a_time:
                if most is not None and next(left) > most:
                    raise Died
                HAPPENED["planned batches"] += 1
                assert len(batch) <= self.settings.batch_size
                assert len({p % self.settings.lanes for p in batch.partitions}) == 1
                return self.run_planned(process, batch)

        caller = current_thread()
        # Each batch as a whole where it would be written; what is left to commit is the mirror at the end.
        whole: Any = SimpleNamespace(
            settings=pipeline.settings,
            kafka=pipeline.kafka,
            database=pipeline.database,
            prepare=lambda batch: batch,
            store=lambda batch, _: run(batch),
            commit=lambda batch: pipeline.commit(batch) if current_thread() is caller else None,
        )
        runner = CatchUp(whole, lambda *_: None, sleep=never)
        backlogs = runner.backlog()
        self.learn_whether_known()
        assert self.topic.is_known
        gaps = self.gaps()
        problem = ""
        try:
            runner.run(backlogs)
        except DataError as error:
            problem = str(error)
        except Died:
            return
        assert [p for p in range(PARTITIONS) if f"partition {p} offsets [" in problem] == gaps
        assert {span.partition for span in self.left_in(backlogs[0].partitions)} <= set(gaps)

    def left_in(self, partitions: Iterable[Any]) -> list[OffsetRange]:
        there = places(OffsetRange(b.partition, 0, b.end) for b in partitions)
        return spans(there - self.topic.settled)

    def run_planned(self, process: Process, batch: Batch) -> Written:
        awaited = self.awaited_error(batch)
        process.before = lambda step: self.on_step(process, step)
        outcome = outcome_of(lambda: process.run(batch))
        self.tell(f"{batch}: {said(outcome)}")
        self.check_outcome(process, batch, outcome, awaited)
        if not isinstance(outcome, Written):
            raise outcome
        self.check_mirror([batch])
        return outcome

    # What must hold

    def awaited_error(self, batch: Batch) -> type[Exception] | None:
        """The error with which a batch must end, whatever runs beside it."""
        topic = next(topic for topic in self.topics if topic.id == batch.kafka_topic_id)
        wanted = places(batch.ranges)
        if topic is not self.topic:
            return TopicReplacedError if not topic.is_known or wanted - topic.settled else None
        if not topic.is_known and topic.is_first_of_its_name:
            wanted -= topic.gone()
        wanted -= topic.settled
        if wanted & topic.gone():
            return GapError
        ends = self.ends() if wanted else {}
        return UnavailableError if any(offset >= ends[partition] for partition, offset in wanted) else None

    def on_step(self, process: Process, step: Step) -> None:
        if step.kind is Kind.BATCH_COMMITTED:
            assert process.batch is not None
            self.learn_whether_known()
            self.take_in(process, process.batch)

    def take_in(self, process: Process, batch: Batch) -> None:
        """A batch was committed: it is in as a whole, and ids moved as the rule says."""
        topic = next(topic for topic in self.topics if topic.id == batch.kafka_topic_id)
        todo = places(batch.ranges) - topic.settled
        good, bad, empty = topic.count(todo)
        already = len(batch) - len(todo)
        topic.done |= todo
        topic.batches.append((batch.ranges, good + bad, good, already, bad, empty))
        self.counted[process] = (good, already, bad, empty)
        self.check_rows()
        before, self.ids = self.ids, failure_ids(self.settings, self.machines)
        in_order = sorted(expected(self.taken_in()).failures.items())
        check_ids(before, self.ids, [held for _, (_, held) in in_order])
        new = self.ids.keys() - before.keys()
        assert not new & self.used_ids, "an id was given twice"
        self.used_ids |= new
        HAPPENED["batches committed"] += 1
        HAPPENED["messages taken in"] += len(todo)
        HAPPENED["failures kept through a batch"] += len(self.ids.keys() & before.keys())
        HAPPENED["failures that became two or more"] += sum(
            len([now for now in self.ids.values() if now & held]) > 1 for held in before.values()
        )

    def taken_in(self) -> list[Published]:
        return [message for topic in self.topics for message in topic.taken_in()]

    def check_outcome(self, process: Process, batch: Batch, outcome: Outcome, awaited: type[Exception] | None) -> None:
        """What a run says came of it is what came of it."""
        assert Kind.RETRY not in {step.kind for step in process.steps}, "nobody disturbed it"
        if isinstance(outcome, Died):
            assert process.death is not None
            HAPPENED["deaths"] += 1
            HAPPENED[f"deaths: {process.death.kind}"] += 1
            return
        if isinstance(outcome, Written):
            assert awaited is None
            counts = (outcome.inserted, outcome.already_ingested, outcome.rejected, outcome.no_record)
            if outcome.batch_id is None:
                assert counts == (0, len(batch), 0, 0)
                HAPPENED["batches that were in already"] += 1
            else:
                assert counts == self.counted[process]
            return
        assert awaited is not None, outcome
        assert type(outcome) is awaited, outcome
        HAPPENED[f"batches that failed: {awaited.__name__}"] += 1
        if awaited is GapError:
            for span in self.gap_in(batch):
                assert f"partition {span.partition} offsets [{span.start}, {span.end})" in str(outcome)

    def gap_in(self, batch: Batch) -> list[OffsetRange]:
        return spans(places(batch.ranges) & self.topic.gone() - self.topic.settled)

    def check_mirror(self, finished: Iterable[Batch], *, except_for: Iterable[Batch] = ()) -> None:
        """The group is nowhere ahead of the ledger, and level with it where a batch has come to its end."""
        mirror = group_offsets(self.settings)
        unsure = {p for batch in except_for for p in batch.partitions}
        level = {p for batch in finished if batch.kafka_topic_id == self.topic.id for p in batch.partitions} - unsure
        for partition in range(PARTITIONS):
            prefix = self.topic.prefix(partition)
            assert mirror.get(partition, 0) <= prefix, "the group is ahead of the ledger"
            assert partition not in level or mirror.get(partition, 0) == prefix

    def learn_whether_known(self) -> None:
        if not self.topic.is_known and is_known(self.settings, self.topic.id):
            self.topic.become_known()

    def check_rows(self) -> None:
        """The rows are the oracle's, and every count is what it must be."""
        want, got = expected(self.taken_in()), stored(self.settings, self.machines)
        assert got.readings == want.readings
        assert got.failures == want.failures
        assert got.machines == want.machines
        assert stored_counts(self.settings, self.name) == Counts(
            ledger=sorted(row for topic in self.topics for row in topic.ledger()),
            batches={topic.id: sorted(topic.batches) for topic in self.topics if topic.batches},
            rejected=want.rejected,
            gaps=sorted((topic.id, *gap) for topic in self.topics for gap in topic.gaps),
        )

    def replace_the_dead(self) -> None:
        if self.process.is_dead:
            self.process = Process(self.settings, "A")
        self.process.death = None

    def teardown(self) -> None:
        """At last everything comes in."""
        try:
            self._end_open(commits=not self.is_broken)
            if not self.is_broken:
                self.end_well()
        finally:
            for topic in self.topics:
                _idle.extend(topic.publisher._idle)
            delete_topic(self.settings, self.name)

    def end_well(self) -> None:
        with self.step("all that is left"):
            for partition in self.gaps():
                self.run_accept_gap(partition)
            self.settings = replace(self.settings, lanes=1, batch_size=1000)
            self.process.pipeline.settings = self.settings
            self.catch_up()
            assert backlog(self.process.pipeline).lag == 0


def never(_: float) -> None:
    raise AssertionError("nobody disturbed it, and it waits to try again")


def said(outcome: Outcome) -> str:
    if isinstance(outcome, Written):
        return f"inserted {outcome.inserted}, already {outcome.already_ingested}, rejected {outcome.rejected}"
    return f"{type(outcome).__name__} {outcome}"


@pytest.fixture(scope="module")
def shared_settings(postgres: Settings, broker: Any, administer: Callable[[str], None]) -> Iterator[Settings]:
    """One database for all histories: each has a topic, a group and machines of its own."""
    administer(f"CREATE DATABASE state_machine TEMPLATE {postgres.postgres_db}")
    # Histories lie a few days ahead.
    yield replace(
        postgres,
        postgres_db="state_machine",
        kafka_bootstrap_servers=broker.bootstrap_servers,
        max_future=timedelta(days=DAYS + 2),
    )
    administer("DROP DATABASE state_machine WITH (FORCE)")


@pytest.mark.soak
def test_whatever_happens_the_rows_are_the_oracles_after_every_step(shared_settings: Settings) -> None:
    ((horizon,),) = query(shared_settings, "SELECT horizon FROM readings_horizon")
    machine = type(
        "AnyHistory",
        (AnyHistory,),
        {"shared": shared_settings, "horizon": datetime(horizon.year, horizon.month, horizon.day, tzinfo=UTC)},
    )
    try:
        with watched_copies():
            run_state_machine_as_test(
                machine,
                settings=hypothesis_settings(
                    max_examples=amount(12, 150),
                    stateful_step_count=25,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                    print_blob=True,
                ),
            )
    finally:
        for what, count in sorted(HAPPENED.items()):
            print(f"{count:>8} {what}")
    check_counts(shared_settings)
    if IS_SOAK:
        assert [what for what in MUST_HAPPEN if not HAPPENED[what]] == []
    assert query(shared_settings, "SELECT conname FROM pg_constraint WHERE NOT convalidated") == []


# What the turns are


def test_a_mirror_that_an_older_batch_sets_after_a_newer_one_is_mended(settings: Settings) -> None:
    Publisher(settings).readings({1: 10})
    runs = [
        (Process(settings, name), batch_of(settings, {1: (start, start + 5)})) for name, start in (("A", 0), ("B", 5))
    ]
    with watched_copies():
        turns = Turns(settings, runs, [0, 2], gather=Kind.OFFSETS, on_step=lambda *_: None)
        turns.run()
    commits = [line for line in turns.story if "commit offsets" in line]
    assert commits == ["B: commit offsets {1: 10}", "A: commit offsets {1: 5}", "A: commit offsets {1: 10}"]
    assert group_offsets(settings) == {1: 10}


def test_one_that_waits_for_the_others_lock_is_passed_over_until_it_has_it(settings: Settings) -> None:
    publisher = Publisher(settings)
    publisher.readings({1: 10})
    runs = [(Process(settings, name), batch_of(settings, {1: (0, 10)})) for name in "AB"]
    with watched_copies():
        # The first of them stops before it copies, with the ledger's row locked.
        turns = Turns(settings, runs, [], gather=Kind.COPY, on_step=lambda *_: None)
        first, second = turns.run()
    assert turns.waits == 1
    assert isinstance(first, Written)
    assert isinstance(second, Written)
    assert (first.inserted, second.inserted, second.already_ingested) == (10, 0, 10)
    check_rows(settings, publisher.published)


def test_one_that_dies_leaves_nothing_of_its_transaction(settings: Settings) -> None:
    publisher = Publisher(settings)
    publisher.readings({1: 10})
    process = Process(settings, "A")
    process.death = Death(Kind.BATCH_COMMIT)
    with watched_copies():
        assert isinstance(outcome_of(lambda: process.run(batch_of(settings, {1: (0, 10)}))), Died)
        check_rows(settings, [])
        assert Process(settings, "B").run(batch_of(settings, {1: (0, 10)})).inserted == 10
    check_rows(settings, publisher.published)
