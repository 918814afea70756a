"""`kill -9` at random moments, over one long backlog, until nothing of it is left."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerProcess

import pytest

from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import check_counts, query
from sensor_pipeline_tests.kills import stages
from sensor_pipeline_tests.kills.stages import THREADS_A_LANE, Stage
from sensor_pipeline_tests.kills.test_points import check_end, check_mirror_is_not_ahead
from sensor_pipeline_tests.kills.victim import FORKS
from sensor_pipeline_tests.publishing import Publisher, message
from sensor_pipeline_tests.soak import amount

KILLS = amount(25, 200)
MESSAGES = amount(20_000, 200_000)
LANES = 3
# Each must be hit, and no more processes than these are started for that.
MUST_BE_HIT = {Stage.DRAIN, Stage.WRITE, Stage.DATABASE_COMMIT, Stage.OFFSET_COMMIT}
MOST_PROCESSES = 4 * KILLS


def publish_fleet(publisher: Publisher, dice: random.Random, start: int, count: int) -> None:
    """Readings of twelve machines without keys: failures, late readings, equal timestamps, poison."""
    failing = dict.fromkeys(range(12), False)
    for number in range(start, start + count):
        machine = dice.randrange(12)
        if dice.random() < 0.04:
            failing[machine] = not failing[machine]
        second = number // 12 - (dice.randrange(900) if dice.random() < 0.1 else 0)
        flag = failing[machine] if dice.random() < 0.95 else not failing[machine]
        publisher.send(dice.randrange(4), message(f"machine-{machine}", second, flag))
        if dice.random() < 0.01:
            publisher.send(dice.randrange(4), b"poison", bad="not_json", key=b"key")
        if number % 10_000 == 0:
            publisher.flush()
    publisher.flush()


class Killer:
    """Starts processes that catch up, one after the other, and kills each."""

    def __init__(self, settings: Settings, dice: random.Random) -> None:
        self.hit: Counter[Stage] = Counter()
        self._settings = settings
        self._dice = dice

    def kill(self) -> bool:
        """Kill the next one, and note what its threads were doing; false if it came to its end before."""
        process, shown = self._start()
        wanted = self._wanted()
        not_before = time.monotonic() + self._dice.random()
        while process.exitcode is None and not (time.monotonic() > not_before and wanted & set(shown)):
            time.sleep(0.0002)
        time.sleep(self._dice.choice([0, 0, 0.05]) * self._dice.random())
        process.kill()
        process.join()
        if process.exitcode == 0:
            return False
        assert process.exitcode == -signal.SIGKILL
        self.hit.update({Stage(at) for at in shown})
        return True

    def let_end(self) -> None:
        """Let one come to its end."""
        process, _ = self._start()
        process.join()
        assert process.exitcode == 0

    def _start(self) -> tuple[ForkServerProcess, Sequence[int]]:
        shown = FORKS.RawArray("i", LANES * THREADS_A_LANE)
        process = FORKS.Process(target=stages.catch_up, args=(self._settings, shown), daemon=True)
        process.start()
        return process, shown

    def _wanted(self) -> set[Stage]:
        """Anything, or one that is as seldom as it is short: the one that was hit least."""
        return self._dice.choice([set(Stage), {min(MUST_BE_HIT, key=self.hit.__getitem__)}])


@pytest.mark.soak
def test_a_long_backlog_ingested_under_random_kills_ends_in_the_oracles_rows(settings: Settings) -> None:
    settings = replace(settings, batch_size=500, lanes=LANES)
    seed = random.randrange(10**6)
    dice = random.Random(seed)
    publisher = Publisher(settings)
    publish_fleet(publisher, dice, 0, MESSAGES)
    killer = Killer(settings, dice)
    kills, with_progress, waves, before = 0, 0, 1, 0
    for _ in range(MOST_PROCESSES):
        if kills >= KILLS and set(killer.hit) >= MUST_BE_HIT:
            break
        if not killer.kill():
            publish_fleet(publisher, dice, waves * MESSAGES, MESSAGES)
            waves += 1
            continue
        kills += 1
        check_counts(settings)
        check_mirror_is_not_ahead(settings)
        done = query(settings, "SELECT coalesce(sum(readings + rejected), 0) FROM ingested_offsets")[0][0]
        with_progress += done > before
        before = done
    left = len(publisher.published) - before
    killer.let_end()
    check_end(settings, publisher.published)
    named = ", ".join(f"{count} {stage.name.lower()}" for stage, count in sorted(killer.hit.items()))
    print(
        f"seed {seed}: {kills} kills over {len(publisher.published)} messages; {with_progress} after progress; "
        f"hit {named}; {left} messages were left at the end"
    )
    assert set(killer.hit) >= MUST_BE_HIT
