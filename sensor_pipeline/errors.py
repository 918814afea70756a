"""Everything that can go wrong, split by what the reader of the message can do about it.

A message says what was wrong, where (topic, partition, offset, file, setting) and what to do, in one line.
"""


class SensorPipelineError(Exception):
    """Root of the errors that this package raises."""


class ConfigurationError(SensorPipelineError):
    """A setting, a right or a schema is wrong: trying again changes nothing until a person mends it."""


class UnavailableError(SensorPipelineError):
    """A server is down, busy or cut off: nothing was changed, and trying again later can succeed."""


class DataError(SensorPipelineError):
    """What Kafka or the database holds does not allow the batch: a person has to look at it."""


class GapError(DataError):
    """Kafka no longer has offsets that were never ingested."""


class TopicReplacedError(DataError):
    """The topic under this name is not the one the batch was planned for."""


class TooManyRejectedError(DataError):
    """A larger share of a batch's messages would be rejected than `MAX_REJECTED_SHARE` allows."""


class NoticeRefusedError(DataError):
    """The webhook refuses a notice, and not because it is down or busy."""


class ConservationError(DataError):
    """A batch's offsets do not add up to what became of them."""
