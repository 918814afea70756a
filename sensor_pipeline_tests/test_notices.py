"""Which change of a failure, and which state of a topic, becomes which notice."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from random import Random

import pandas as pd
import pytest

from sensor_pipeline.notices import (
    Kind,
    MachineChange,
    Notice,
    batch_failed,
    changes,
    falling_behind,
    rejected_over_limit,
)
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.pace import Pace
from sensor_pipeline.postgres.failure_rows import failure_frame
from sensor_pipeline_tests.soak import amount

BASE = datetime(2026, 1, 1, 12, tzinfo=UTC)
# (machine, start, last, end) in seconds after BASE.
Failures = Mapping[int, tuple[int, int, int, int | None]]
NOW = datetime(2026, 1, 2, tzinfo=UTC)


def at(second: int) -> datetime:
    return BASE + timedelta(seconds=second)


def frame(failures: Failures) -> pd.DataFrame:
    """In order of machine and start."""
    rows = sorted(failures.items(), key=lambda item: item[1][:2])
    return failure_frame(
        (i, m, at(start), at(last), None if end is None else at(end)) for i, (m, start, last, end) in rows
    )


def told(before: Failures, after: Failures) -> list[tuple[str, int]]:
    """(kind, id) of each notice, in order."""
    found = changes(frame(before), frame(after), before.keys() - after.keys())
    return list(zip(found["kind"].tolist(), found["id"].tolist(), strict=True))


STARTED, ENDED, CORRECTED, WITHDRAWN = Kind.STARTED, Kind.ENDED, Kind.CORRECTED, Kind.WITHDRAWN


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {}, []),
        ({}, {1: (1, 0, 0, None)}, [(STARTED, 1)]),
        ({}, {1: (1, 0, 3, 5)}, [(STARTED, 1), (ENDED, 1)]),
        ({1: (1, 0, 0, None)}, {1: (1, 0, 9, None)}, []),
        ({1: (1, 0, 3, 5)}, {1: (1, 0, 4, 5)}, []),
        ({1: (1, 0, 0, None)}, {1: (1, 0, 3, 5)}, [(ENDED, 1)]),
        ({1: (1, 2, 2, None)}, {1: (1, 0, 2, None)}, [(CORRECTED, 1)]),
        ({1: (1, 0, 3, 5)}, {1: (1, 0, 3, 4)}, [(CORRECTED, 1)]),
        ({1: (1, 0, 3, 5)}, {1: (1, 0, 9, None)}, [(CORRECTED, 1)]),
        ({1: (1, 2, 2, None)}, {1: (1, 0, 2, 5)}, [(CORRECTED, 1), (ENDED, 1)]),
        ({1: (1, 0, 3, 5)}, {}, [(WITHDRAWN, 1)]),
        # split
        ({1: (1, 0, 8, None)}, {1: (1, 0, 3, 4), 2: (1, 5, 8, None)}, [(ENDED, 1), (STARTED, 2)]),
        # joined
        ({1: (1, 0, 3, 4), 2: (1, 5, 8, None)}, {1: (1, 0, 8, None)}, [(WITHDRAWN, 2), (CORRECTED, 1)]),
        # of several machines, each in order of time
        (
            {7: (2, 9, 9, None)},
            {7: (2, 9, 9, 10), 8: (1, 20, 20, None), 9: (1, 3, 3, 4), 10: (2, 12, 12, None)},
            [(STARTED, 9), (ENDED, 9), (STARTED, 8), (ENDED, 7), (STARTED, 10)],
        ),
    ],
)
def test_a_change_gives_its_notices_in_order(
    before: Failures, after: Failures, expected: list[tuple[str, int]]
) -> None:
    assert told(before, after) == expected


def test_the_time_of_a_notice_is_that_of_what_it_tells() -> None:
    before = {1: (1, 0, 3, None), 2: (2, 0, 3, 5), 3: (3, 5, 5, None), 4: (4, 0, 3, 9)}
    after = {1: (1, 0, 3, 9), 3: (3, 1, 7, None), 4: (4, 0, 3, 8), 5: (5, 2, 6, 7)}
    found = changes(frame(before), frame(after), [2])
    rows = zip(found["kind"], found["id"], found["at"].dt.to_pydatetime(), strict=True)
    assert {(kind, i): (moment - BASE).seconds for kind, i, moment in rows} == {
        (ENDED, 1): 9,
        (WITHDRAWN, 2): 5,
        (CORRECTED, 3): 7,
        (CORRECTED, 4): 8,
        (STARTED, 5): 2,
        (ENDED, 5): 7,
    }


def some_failures(random: Random) -> dict[int, tuple[int, int, int, int | None]]:
    """Failures of three machines; the same few ids again and again, since failures keep theirs."""
    failures = {}
    for failure_id in random.sample(range(1, 10), random.randrange(8)):
        start = random.randrange(10)
        last = start + random.randrange(5)
        failures[failure_id] = (failure_id % 3, start, last, random.choice([None, last, last + random.randrange(5)]))
    return failures


def test_what_was_told_adds_up_to_the_failures_as_they_are() -> None:
    for seed in range(amount(300, 20_000)):
        random = Random(seed)
        known: dict[int, tuple[datetime, datetime | None]] = {}
        before: dict[int, tuple[int, int, int, int | None]] = {}
        for _ in range(6):
            after = some_failures(random)
            told = changes(frame(before), frame(after), before.keys() - after.keys())
            for kind, i, start, end in zip(
                told["kind"], told["id"], told["start"].dt.to_pydatetime(), told["end"], strict=True
            ):
                end = None if pd.isna(end) else end.to_pydatetime()
                assert (i in known) == (kind != STARTED)
                if kind == ENDED:
                    assert end is not None
                if kind == WITHDRAWN:
                    assert known.pop(i) == (start, end)
                else:
                    known[i] = (start, end)
            as_they_are = {i: (at(s), None if e is None else at(e)) for i, (_, s, _, e) in after.items()}
            assert known == as_they_are, f"seed {seed}"
            before = after


# What a notice says


def body(kind: Kind, end: datetime | None = None) -> dict[str, object]:
    change = MachineChange(7, "a1b2", 17, BASE, end)
    return Notice(42, kind, BASE + timedelta(seconds=1), change).body()


def test_a_notice_of_a_machine_says_what_the_tables_say() -> None:
    assert body(Kind.ENDED, at(2_530)) == {
        "text": "Machine a1b2 failed from 2026-01-01 12:00:00 UTC to 2026-01-01 12:42:10 UTC, for 42 min",
        "title": "Machine a1b2: failure ended",
        "state": "ok",
        "alert_uid": "failure 17",
        "id": "20260101T120001.000000Z-42",
        "kind": "failure_ended",
        "found_at": "2026-01-01T12:00:01+00:00",
        "machine": {"id": 7, "machine_id": "a1b2"},
        "failure": {
            "id": 17,
            "start_time": "2026-01-01T12:00:00+00:00",
            "end_time": "2026-01-01T12:42:10+00:00",
            "is_active": False,
        },
    }


@pytest.mark.parametrize(
    ("kind", "end", "text", "state"),
    [
        (STARTED, None, "Machine a1b2 started to fail at 2026-01-01 12:00:00 UTC", "alerting"),
        (STARTED, at(5), "Machine a1b2 started to fail at 2026-01-01 12:00:00 UTC", "alerting"),
        (CORRECTED, None, "Corrected: machine a1b2 failed from 2026-01-01 12:00:00 UTC, and still fails", "alerting"),
        (
            CORRECTED,
            at(5),
            "Corrected: machine a1b2 failed from 2026-01-01 12:00:00 UTC to 2026-01-01 12:00:05 UTC, for 5 s",
            "ok",
        ),
        (
            WITHDRAWN,
            None,
            "Withdrawn: machine a1b2 did not fail from 2026-01-01 12:00:00 UTC, by what is known now",
            "ok",
        ),
        (
            ENDED,
            at(93_784),
            "Machine a1b2 failed from 2026-01-01 12:00:00 UTC to 2026-01-02 14:03:04 UTC, for 1 day 2 h 3 min",
            "ok",
        ),
    ],
)
def test_a_notice_says_it_in_a_sentence(kind: Kind, end: datetime | None, text: str, state: str) -> None:
    said = body(kind, end)
    assert (said["text"], said["state"]) == (text, state)


# The pipeline's own


def test_falling_behind_says_how_much_comes_in_and_goes_out() -> None:
    pace = Pace(timedelta(minutes=15), arrived=1_800, ingested=900, waiting=1_100, lag=2_900)
    notice = falling_behind("t", pace, NOW)
    assert "over 15 min 2.0 readings/s in, 1.0 out; lag 2,900, of which 1,100 have waited for longer" in notice.text
    assert notice.details == {"topic": "t", "lag": 2_900, "waiting": 1_100, "arrived": 1_800, "ingested": 900}


def test_rejected_messages_over_the_limit_are_told_with_both_numbers() -> None:
    notice = rejected_over_limit("t", 101, 100, NOW)
    assert "101 messages were rejected within 1 h, more than ALERT_REJECTED=100" in notice.text


BATCH = Batch("t", "id", (OffsetRange(0, 5, 9), OffsetRange(2, 1, 2)))


def test_a_lane_that_fails_for_one_reason_is_one_subject_and_a_gap_is_its_partitions() -> None:
    def subject(batch: Batch | None, lane: str | None, error: str) -> tuple[str, str]:
        notice = batch_failed("ingest_batch", "run-1", batch, lane, error, "said", NOW)
        return notice.kind, notice.subject

    assert subject(BATCH, "0@t", "UnavailableError") == (Kind.BATCH_FAILED, "0@t UnavailableError")
    assert subject(BATCH, None, "UnavailableError") == (Kind.BATCH_FAILED, "run-1 UnavailableError")
    assert subject(None, None, "") == (Kind.BATCH_FAILED, "run-1")
    assert subject(BATCH, "0@t", "GapError") == (Kind.GAP, "t 0 2")


def test_a_failed_batch_is_told_with_its_error_and_not_at_any_length() -> None:
    notice = batch_failed("ingest_batch", "run-1", BATCH, "0@t", "DataError", "word " * 1_000, NOW)
    assert notice.text.startswith("Batch t 0:5-9 2:1-2 failed: word word")
    assert len(notice.text) == 1_000
    assert notice.details["ranges"] == ["0:5-9", "2:1-2"]
