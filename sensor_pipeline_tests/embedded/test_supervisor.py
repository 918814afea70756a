from __future__ import annotations

from dataclasses import dataclass, field

from sensor_pipeline.embedded.supervisor import LONGEST_PAUSE_SECONDS, WELL_SECONDS, Supervisor, pause
from sensor_pipeline.errors import UnavailableError


@dataclass
class FakeChild:
    exit_code: int | None = None

    def obituary(self) -> str:
        return f"ended with exit code {self.exit_code}"


@dataclass
class FakeService:
    child: FakeChild = field(default_factory=FakeChild)
    starts: int = 0
    problem: str = ""

    def start(self) -> None:
        self.starts += 1
        if self.problem:
            raise UnavailableError(self.problem)
        self.child = FakeChild()


def supervise(service: FakeService) -> Supervisor:
    return Supervisor({"Kafka": service}, now=0)  # type: ignore[dict-item]


def test_what_runs_is_left_alone() -> None:
    service = FakeService()
    assert supervise(service).watch(1000) == []
    assert service.starts == 0


def test_what_ended_is_started_again_after_a_pause_and_both_are_said() -> None:
    service = FakeService()
    supervisor = supervise(service)
    service.child.exit_code = 1
    assert supervisor.watch(10) == ["Kafka ended with exit code 1; started again in 1 s"]
    assert supervisor.watch(10.5) == []
    assert supervisor.watch(11) == ["Kafka runs again"]
    assert supervisor.watch(12) == []
    assert service.starts == 1


def test_the_pause_grows_while_it_keeps_ending_and_starts_anew_once_it_was_well() -> None:
    service = FakeService()
    supervisor = supervise(service)
    now = 0.0
    for expected in (1, 2, 4):
        service.child.exit_code = 1
        assert f"in {expected} s" in supervisor.watch(now)[0]
        now += expected
        supervisor.watch(now)
    now += WELL_SECONDS + 1
    service.child.exit_code = 1
    assert "in 1 s" in supervisor.watch(now)[0]


def test_a_start_that_fails_is_said_and_tried_again_later() -> None:
    service = FakeService(problem="no room on disk")
    supervisor = supervise(service)
    service.child.exit_code = 1
    supervisor.watch(0)
    assert supervisor.watch(1) == ["no room on disk; started again in 2 s"]
    service.problem = ""
    assert supervisor.watch(3) == ["Kafka runs again"]


def test_the_pause_doubles_up_to_a_minute() -> None:
    assert [pause(attempt) for attempt in range(4)] == [1, 2, 4, 8]
    assert pause(1000) == LONGEST_PAUSE_SECONDS
