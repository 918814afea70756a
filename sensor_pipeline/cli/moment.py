"""A time as an option: ISO 8601, or a duration that lies back."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from sensor_pipeline.settings import parse_duration


class Moment(click.ParamType[datetime]):
    """`2026-01-01T12:00:00+01:00` (without an offset in UTC), or `7 days` for so long ago."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """The time, in its own zone."""
        text = str(value)
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            try:
                return datetime.now(UTC) - parse_duration(text)
            except (ValueError, OverflowError):
                self.fail(f"{text!r} is neither an ISO 8601 time nor a duration such as 12h or 7 days", param, ctx)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
