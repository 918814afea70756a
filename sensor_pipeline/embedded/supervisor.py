"""Starts again what ended although it should run, after a pause that grows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sensor_pipeline.embedded.services import Service
from sensor_pipeline.errors import SensorPipelineError

LONGEST_PAUSE_SECONDS = 60.0
# What ran this long is taken to be well.
WELL_SECONDS = 60.0


def pause(attempt: int) -> float:
    """Seconds to wait before the given attempt (from 0) to start something again."""
    return float(min(2**attempt, LONGEST_PAUSE_SECONDS))


@dataclass
class _State:
    started: float
    attempt: int = 0
    next_start: float | None = None


class Supervisor:
    """Watches services that have been started, in the order they depend on each other. Times in seconds."""

    def __init__(self, services: Mapping[str, Service], now: float) -> None:
        self._services = services
        self._states = {name: _State(now) for name in services}

    def watch(self, now: float) -> list[str]:
        """Look at each service once; what happened, a line each."""
        notes = (self._look(name, service, now) for name, service in self._services.items())
        return [note for note in notes if note]

    def _look(self, name: str, service: Service, now: float) -> str:
        state = self._states[name]
        if state.next_start is not None:
            return self._restart(name, service, now) if now >= state.next_start else ""
        child = service.child
        if child is None or child.exit_code is None:
            return ""
        if now - state.started > WELL_SECONDS:
            state.attempt = 0
        return self._postpone(state, now, f"{name} {child.obituary()}")

    def _restart(self, name: str, service: Service, now: float) -> str:
        state = self._states[name]
        try:
            service.start()
        except SensorPipelineError as error:
            return self._postpone(state, now, str(error))
        state.started, state.next_start = now, None
        return f"{name} runs again"

    def _postpone(self, state: _State, now: float, why: str) -> str:
        wait = pause(state.attempt)
        state.attempt += 1
        state.next_start = now + wait
        return f"{why}; started again in {wait:g} s"
