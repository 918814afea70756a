"""Everything that speaks to Kafka: topic ids, offsets, the drain, the commit; the only place with confluent_kafka."""

from sensor_pipeline.kafka.cluster import Kafka, Topic
from sensor_pipeline.kafka.connection import make_client
from sensor_pipeline.kafka.errors import translate

__all__ = ["Kafka", "Topic", "make_client", "translate"]
