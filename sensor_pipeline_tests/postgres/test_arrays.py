"""An array's literal is read by PostgreSQL as what it was made from."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pandas as pd
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sensor_pipeline.postgres.arrays import array, time_array
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.failure_rows import datetimes
from sensor_pipeline.settings import Settings

many = hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]))


def read_back(settings: Settings, kind: str, literal: str) -> Any:
    with Database(settings).begin() as connection:
        return connection.scalar(sa.text(f"SELECT CAST(:elements AS {kind}[])"), {"elements": literal})


@many
@given(st.lists(names | st.none()))
@example(["", "NULL", "null", None, '"', "\\", '\\"', "{}", "a,b", " a ", "%s :x", "'"])
def test_texts(shared_settings: Settings, texts: list[str | None]) -> None:
    assert read_back(shared_settings, "text", array(texts)) == texts


@many
@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.none()))
def test_integers(shared_settings: Settings, numbers: list[int | None]) -> None:
    assert read_back(shared_settings, "bigint", array(numbers)) == numbers


@many
@given(st.lists(st.datetimes() | st.none()))
@example([datetime.min, datetime.max, None])
def test_times(shared_settings: Settings, moments: list[datetime | None]) -> None:
    column = pd.Series(moments, dtype="datetime64[us]").dt.tz_localize("UTC")
    assert read_back(shared_settings, "timestamptz", time_array(column)) == datetimes(column)
