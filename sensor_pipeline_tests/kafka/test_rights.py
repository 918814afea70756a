"""A user who may not: said as what to mend, at the step where it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from confluent_kafka.admin import AclOperation, ResourceType

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.brokers import PASSWORD, TrialBroker, grant
from sensor_pipeline_tests.kafka.inspecting import batch, catch_up, check_rows
from sensor_pipeline_tests.kafka.producing import Publisher, eventually, group_offsets


def test_a_user_gets_on_step_by_step_as_rights_are_granted(
    trial_broker: TrialBroker, make_trial: Callable[..., Settings]
) -> None:
    settings = make_trial()
    publisher = Publisher(settings)
    topic, group = publisher.topic, settings.kafka_group_id
    publisher.readings({0: 5})
    whole = batch(settings, {0: (0, 5)})
    user = Pipeline(trial_broker.as_user(settings))
    user.kafka = Kafka(user.settings, timeout=2)

    def outcome(pipeline: Pipeline) -> str:
        try:
            pipeline.run(whole)
        except ConfigurationError as error:
            message = str(error)
            assert PASSWORD not in message
            assert "\n" not in message
            assert topic in message
            return message
        return "done"

    assert outcome(user) != "done"
    rights = {(ResourceType.TOPIC, topic): AclOperation.DESCRIBE, (ResourceType.GROUP, group): AclOperation.READ}
    grant(settings, rights)
    # Rights reach the broker a moment after they were granted.
    eventually(lambda: "may not read the topic (it needs READ" in outcome(user), "the right to read is asked for")
    check_rows(settings, [])

    grant(settings, {(ResourceType.TOPIC, topic): AclOperation.READ})
    stranger = Pipeline(replace(user.settings, kafka_group_id="another-group"))
    stranger.kafka = Kafka(stranger.settings, timeout=2)
    asked = "may not use the consumer group another-group (it needs READ on it)"
    eventually(lambda: asked in outcome(stranger), "the right to the group is asked for")
    assert group_offsets(replace(settings, kafka_group_id="another-group")) == {}

    eventually(lambda: outcome(user) == "done", "it has all rights")
    check_rows(settings, publisher.published)
    assert group_offsets(settings) == {0: 5}
    publisher.readings({0: 2, 1: 1})
    catch_up(user)
    check_rows(settings, publisher.published)
    assert group_offsets(settings) == {0: 7, 1: 1}


def test_a_wrong_password_is_a_wrong_setting_and_is_not_said(
    trial_broker: TrialBroker, make_trial: Callable[..., Settings]
) -> None:
    settings = trial_broker.as_user(make_trial(), password="wr0ng-and-s3cret")
    with pytest.raises(ConfigurationError) as caught:
        Kafka(settings, timeout=1.5).topic(settings.kafka_topics[0])
    message = str(caught.value)
    assert "refused the log-in" in message
    assert "KAFKA_CLIENT_" in message
    assert "wr0ng-and-s3cret" not in message + repr(settings)
    assert "\n" not in message
