"""A broker of these tests' own, for what must not be done to the one that all share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.brokers import TrialBroker
from sensor_pipeline_tests.kafka.producing import create_topic

_numbers = itertools.count(1)


@pytest.fixture(scope="package")
def running_trial_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrialBroker]:
    """The broker, started once."""
    broker = TrialBroker(tmp_path_factory.mktemp("trial-kafka"))
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def trial_broker(running_trial_broker: TrialBroker) -> Iterator[TrialBroker]:
    """The broker, running at the start and at the end of the test."""
    yield running_trial_broker
    if running_trial_broker.child is None:
        running_trial_broker.start()


@pytest.fixture
def make_trial(trial_broker: TrialBroker, database_settings: Settings) -> Callable[..., Settings]:
    """Makes settings with a topic of that broker, a group and a database of their own."""

    def make(partitions: int = 2, **config: str) -> Settings:
        settings = trial_broker.settings(database_settings, f"trial-{next(_numbers)}")
        create_topic(
            settings,
            settings.kafka_topics[0],
            partitions,
            {key.replace("_", "."): value for key, value in config.items()},
        )
        return settings

    return make
