"""A time as an option: ISO 8601, or a duration that lies back."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from sensor_pipeline.settings import parse_moment


class Moment(click.ParamType[datetime]):
    """`2026-01-01T12:00:00+01:00` (without an offset in UTC), or `7 days` for so long ago."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """The time, in its own zone."""
        try:
            return parse_moment(str(value), datetime.now(UTC))
        except ValueError as error:
            self.fail(str(error), param, ctx)
