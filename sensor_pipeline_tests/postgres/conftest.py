"""A database for all tests of a module, where each test has topics and machines of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from sensor_pipeline.settings import Settings


@pytest.fixture(scope="module")
def shared_settings(
    request: pytest.FixtureRequest, postgres: Settings, administer: Callable[[str], None]
) -> Iterator[Settings]:
    """Settings with a migrated database of the module's own."""
    name = request.module.__name__.rpartition(".")[2]
    administer(f"CREATE DATABASE {name} TEMPLATE {postgres.postgres_db}")
    yield replace(postgres, postgres_db=name)
    administer(f"DROP DATABASE {name} WITH (FORCE)")
