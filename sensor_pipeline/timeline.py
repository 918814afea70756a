"""Draws which machines failed when."""

from __future__ import annotations

from datetime import datetime
from io import BytesIO
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_MACHINES = 30
_NAME_CHARACTERS = 24
_ROW_INCHES, _WIDTH_INCHES, _DPI = 0.22, 10.0, 80
_ENDED, _ACTIVE = "#4878a8", "#d03030"
# A failure of seconds must be seen in a week: no bar is narrower than this share of the time.
_NARROWEST = 0.002
_EPOCH, _DAY = pd.Timestamp(0, tz="UTC"), pd.Timedelta(days=1)


def draw(failures: pd.DataFrame, until: datetime, spans: dict[str, pd.Timedelta]) -> bytes:
    """A PNG with one panel for each span of time that ends now: a row a machine, a bar a failure, active ones marked.

    Args:
        failures: `machine` (name), `start` and `end` (datetime64[us, UTC]; NaT while active) of all failures in the
            longest span.
        until: the end of every span, with its time zone.
        spans: title to length.
    """
    from matplotlib.figure import Figure

    shown = {title: _within(failures, until, length) for title, length in spans.items()}
    heights = [max(3, min(rows["machine"].nunique(), _MOST_MACHINES)) + 3.5 for rows in shown.values()]
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights) * _ROW_INCHES), dpi=_DPI, layout="constrained")
    panels = figure.subplots(len(spans), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows) in zip(panels, shown.items(), strict=True):
        _panel(axes, title, rows, until, spans[title])
    png = BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _within(failures: pd.DataFrame, until: datetime, length: pd.Timedelta) -> pd.DataFrame:
    """The part of each failure that lies in the span, with `active` marked."""
    since = pd.Timestamp(until) - length
    rows = failures.assign(active=failures["end"].isna(), end=failures["end"].fillna(pd.Timestamp(until)))
    rows["start"] = rows["start"].where(rows["start"] > since, since)
    return rows[(rows["end"] >= since) & (rows["start"] <= until)]


def _panel(axes: Axes, title: str, rows: pd.DataFrame, until: datetime, length: pd.Timedelta) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    of_machine = rows.assign(lasting=rows["end"] - rows["start"]).groupby("machine")[["active", "lasting"]]
    worst = of_machine.agg({"active": "any", "lasting": "sum"}).sort_values(["active", "lasting"], ascending=False)
    machines = sorted(worst.index[:_MOST_MACHINES], reverse=True)
    for at, machine in enumerate(machines):
        of = rows[rows["machine"] == machine]
        lengths = (of["end"] - of["start"]) / _DAY
        bars = [
            (left, max(days, _NARROWEST * length / _DAY))
            for left, days in zip(_days(of["start"]), lengths, strict=True)
        ]
        axes.broken_barh(bars, (at - 0.4, 0.8), color=[_ACTIVE if active else _ENDED for active in of["active"]])
    axes.set_yticks(range(len(machines)), [_short(machine) for machine in machines], fontsize=8, parse_math=False)
    axes.set_ylim(-0.6, max(len(machines), 3) - 0.4)
    last = (pd.Timestamp(until) - _EPOCH) / _DAY
    axes.set_xlim(last - length / _DAY, last)
    locator = AutoDateLocator()  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.set_title(f"{title}: {_summary(rows, len(worst))}", fontsize=10, loc="left")


def _days(moments: pd.Series[pd.Timestamp]) -> pd.Series[float]:
    """As matplotlib counts: days since 1970."""
    return (moments - _EPOCH) / _DAY


def _summary(rows: pd.DataFrame, machines: int) -> str:
    if rows.empty:
        return "no failure"
    shown = (
        f"; {_MOST_MACHINES} of them: those active, then those that failed longest" if machines > _MOST_MACHINES else ""
    )
    return f"{len(rows):,} failures of {machines:,} machines, {rows['active'].sum():,} active (red); UTC{shown}"


def _short(machine: str) -> str:
    return machine if len(machine) <= _NAME_CHARACTERS else machine[: _NAME_CHARACTERS - 1] + "…"
