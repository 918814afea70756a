"""Publishing: the publisher, `simulate` and `publish-csv`, counted from the topic by a consumer of the test's own."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result
from confluent_kafka import Consumer, KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from hypothesis import given
from hypothesis import strategies as st

from sensor_pipeline.cli import main
from sensor_pipeline.embedded import ports
from sensor_pipeline.embedded.kafka import KafkaBroker
from sensor_pipeline.errors import ConfigurationError, DataError, UnavailableError
from sensor_pipeline.fleet import Fleet
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.publish import Pace, Publisher
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.data import needs_data, valve_files

WAIT_SECONDS = 60

_numbers = itertools.count(1)


class Published(NamedTuple):
    partition: int
    key: bytes | None
    value: bytes

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.value)


def published(settings: Settings) -> list[Published]:
    """Everything in the topic, partition after partition."""
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka_bootstrap_servers,
            "group.id": "test",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
        }
    )
    topic = settings.kafka_topics[0]
    open_partitions = set(consumer.list_topics(topic, timeout=WAIT_SECONDS).topics[topic].partitions)
    consumer.assign([TopicPartition(topic, partition, 0) for partition in open_partitions])
    messages: list[Published] = []
    deadline = time.monotonic() + WAIT_SECONDS
    while open_partitions:
        assert time.monotonic() < deadline
        for message in consumer.consume(1_000, timeout=0.1):
            error = message.error()
            if error is None:
                messages.append(Published(message.partition(), message.key(), message.value()))
            else:
                assert error.code() == KafkaError._PARTITION_EOF, error
                open_partitions.discard(message.partition())
    consumer.close()
    return sorted(messages, key=lambda message: message.partition)


def create_topic(settings: Settings, topic: str, partitions: int, **config: str) -> None:
    """Returns when the broker knows the topic: that is a little after the controller has made it."""
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    admin.create_topics([NewTopic(topic, partitions, 1, config=config)])[topic].result()
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        with suppress(ConfigurationError):
            Kafka(settings).topic(topic)
            return
        assert time.monotonic() < deadline


def kafka_env(settings: Settings) -> dict[str, str]:
    return {
        "KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "KAFKA_TOPIC": ",".join(settings.kafka_topics),
    }


def run(settings: Settings, *arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=kafka_env(settings))


def started(settings: Settings, *arguments: str) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "sensor_pipeline", *arguments],
        env={**os.environ, **kafka_env(settings)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def await_readings(settings: Settings, number: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while len(published(settings)) < number:
        assert time.monotonic() < deadline


def failures(messages: Sequence[Published]) -> int:
    """How many stretches of failing readings the machines have, in the order of event time."""
    machines = defaultdict(list)
    for message in messages:
        document = message.document
        machines[document["machine_id"]].append((document["timestamp"], document["readings"]["has_failure"]))
    flags = [[False, *(failing for _, failing in sorted(machine))] for machine in machines.values()]
    return sum(now and not before for machine in flags for before, now in itertools.pairwise(machine))


@pytest.fixture
def settings(broker: KafkaBroker) -> Settings:
    """A fresh topic of four partitions; no database."""
    topic = f"published-{next(_numbers)}"
    settings = Settings(kafka_bootstrap_servers=broker.bootstrap_servers, kafka_topics=(topic,))
    create_topic(settings, topic, 4)
    return settings


@pytest.fixture(autouse=True)
def _no_stack_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands use the stack that runs in the working folder."""
    monkeypatch.chdir(tmp_path)


# --- the publisher


def test_messages_without_a_key_go_to_the_partitions_in_turn(settings: Settings) -> None:
    with Publisher(settings, settings.kafka_topics[0]) as publisher:
        for number in range(10_002):
            publisher.send(str(number).encode())
    assert publisher.published == {0: 2_501, 1: 2_501, 2: 2_500, 3: 2_500}
    assert all(int(message.value) % 4 == message.partition and message.key is None for message in published(settings))
    assert len({message.value for message in published(settings)}) == 10_002


def test_messages_with_a_key_stay_in_the_keys_partition(settings: Settings) -> None:
    with Publisher(settings, settings.kafka_topics[0]) as publisher:
        for number in range(1_000):
            publisher.send(b"{}", key=f"machine {number % 20}")
    partitions = defaultdict(set)
    for message in published(settings):
        partitions[message.key].add(message.partition)
    assert len(partitions) == 20
    assert all(len(seen) == 1 for seen in partitions.values())
    assert publisher.published == Counter(message.partition for message in published(settings))


def test_a_topic_that_is_not_there_is_a_wrong_configuration(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="there is no topic nowhere"):
        Publisher(settings, "nowhere")


def test_a_setting_against_reliability_is_refused(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="KAFKA_CLIENT_ACKS"):
        Publisher(replace(settings, kafka_client={"acks": "1"}), settings.kafka_topics[0])


def test_a_message_that_is_too_large_for_the_producer_is_an_error(settings: Settings) -> None:
    with pytest.raises(DataError, match="too large"), Publisher(settings, settings.kafka_topics[0]) as publisher:
        publisher.send(b"x" * 2_000_000)


def test_a_message_that_the_broker_refuses_is_an_error_and_the_others_are_counted(settings: Settings) -> None:
    topic = f"{settings.kafka_topics[0]}-small"
    create_topic(settings, topic, 1, **{"max.message.bytes": "1000"})
    publisher = Publisher(settings, topic)
    publisher.send(b"small")
    publisher.flush()
    publisher.send(b"x" * 5_000)
    with pytest.raises(DataError, match="refuses a message for topic"):
        publisher.flush()
    assert publisher.published == {0: 1}


def test_what_an_error_interrupts_is_not_sent_later(settings: Settings) -> None:
    publisher = Publisher(settings, settings.kafka_topics[0])
    with suppress(KeyboardInterrupt), publisher:
        for number in range(100):
            publisher.send(str(number).encode())
        raise KeyboardInterrupt
    assert publisher.pending == 0
    partitions = Counter(message.partition for message in published(settings))
    assert publisher.published == {partition: partitions[partition] for partition in range(4)}


@given(
    rate=st.floats(0.01, 1e6),
    seconds=st.floats(0.01, 1e4),
    elapsed=st.lists(st.floats(0, 1e4), min_size=1),
)
def test_a_pace_sends_no_message_before_its_time_and_all_by_the_end(
    rate: float, seconds: float, elapsed: list[float]
) -> None:
    pace = Pace(rate, seconds=seconds)
    for now in elapsed:
        due = pace.due(now)
        assert 1 <= due <= pace.limit()
        assert (due - 1) / rate <= now * (1 + 1e-9) + 1e-9
        assert due == pace.limit() or due / rate > now * (1 - 1e-9) - 1e-9
        assert 0 < pace.pause(now, int(due)) <= 0.2
    assert pace.due(seconds) == pace.limit() == pytest.approx(rate * seconds, abs=1)
    assert pace.is_over(seconds, 0)


@pytest.mark.parametrize(
    ("pace", "limit"),
    [
        (Pace(200, seconds=3), 600),
        (Pace(0.1, seconds=30), 3),
        (Pace(200, count=5, seconds=3), 5),
        (Pace(0, count=7), 7),
        (Pace(200), float("inf")),
    ],
)
def test_a_pace_ends_with_its_count_or_its_time(pace: Pace, limit: float) -> None:
    assert pace.limit() == limit
    assert not pace.is_over(2.9, 2)


# --- simulate


def test_simulate_publishes_what_it_reports(settings: Settings) -> None:
    result = run(settings, "simulate", "--count", 5_001, "--rate", 0, "--failure-rate", 0.1, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    messages = published(settings)
    documents = [message.document for message in messages]
    assert report["readings"] == len(messages) == 5_001
    assert report["failing_readings"] == sum(document["readings"]["has_failure"] for document in documents) > 0
    assert report["failures_started"] == failures(messages) > 0
    assert report["partitions"] == {str(p): n for p, n in Counter(m.partition for m in messages).items()}
    partitions = Counter((document["machine_id"], m.partition) for document, m in zip(documents, messages, strict=True))
    assert len(partitions) == 20 * 4
    assert {message.key for message in messages} == {None}


def test_simulate_publishes_the_fleet_of_its_seed_and_start(settings: Settings) -> None:
    arguments = ["--seed", 7, "--start", "2026-01-01T12:00:00", "--event-rate", 10, "--machines", 3, "--sensors", 2]
    assert run(settings, "simulate", "--count", 1_000, "--rate", 0, *arguments).exit_code == 0
    start = datetime(2026, 1, 1, 12, tzinfo=UTC)
    fleet = Fleet(seed=7, start=start, rate=10, machines=3, sensors=2)
    assert {m.value for m in published(settings)} == {r.message for r in itertools.islice(fleet.readings(), 1_000)}


def test_simulate_keyed_keeps_each_machine_in_one_partition(settings: Settings) -> None:
    assert run(settings, "simulate", "--count", 500, "--rate", 0, "--keyed").exit_code == 0
    messages = published(settings)
    assert all(message.key == message.document["machine_id"].encode() for message in messages)
    assert len({(message.key, message.partition) for message in messages}) == 20


def test_simulate_keeps_its_rate_in_real_time_and_in_event_time(settings: Settings) -> None:
    before = datetime.now(UTC).replace(tzinfo=None)
    result = run(settings, "simulate", "--duration", 1.5, "--rate", 300, "--json")
    after = datetime.now(UTC).replace(tzinfo=None)
    assert json.loads(result.stdout)["readings"] == 450
    times = sorted(datetime.fromisoformat(message.document["timestamp"]) for message in published(settings))
    assert before <= times[0] <= times[-1] <= after
    assert (times[-1] - times[0]).total_seconds() == pytest.approx(449 / 300, abs=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_simulate_delivers_and_reports_when_a_signal_ends_it(settings: Settings, number: signal.Signals) -> None:
    process = started(settings, "simulate", "--rate", "500", "--json")
    await_readings(settings, 100)
    process.send_signal(number)
    out, err = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, err) == (0, "")
    report = json.loads(out)
    assert report["readings"] == sum(report["partitions"].values()) == len(published(settings))


@pytest.fixture(scope="module")
def stoppable_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    broker = KafkaBroker(tmp_path_factory.mktemp("stoppable"), ports.any_free())
    yield broker
    broker.stop()


@pytest.fixture
def own(stoppable_broker: KafkaBroker) -> tuple[KafkaBroker, Settings]:
    """A broker that a test may stop, running, and a fresh topic on it."""
    if stoppable_broker.child is None:
        stoppable_broker.start()
    topic = f"published-{next(_numbers)}"
    settings = Settings(kafka_bootstrap_servers=stoppable_broker.bootstrap_servers, kafka_topics=(topic,))
    create_topic(settings, topic, 4)
    return stoppable_broker, settings


def test_simulate_waits_for_a_broker_that_went_away_and_says_so_once(own: tuple[KafkaBroker, Settings]) -> None:
    own_broker, settings = own
    process = started(settings, "simulate", "--rate", "200", "--json")
    await_readings(settings, 1)
    own_broker.stop()
    assert process.stderr is not None
    assert "takes nothing" in process.stderr.readline()
    own_broker.start()
    assert "is back" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["readings"] == len({message.value for message in published(settings)})


def test_what_is_not_delivered_in_time_is_counted_in_the_error(own: tuple[KafkaBroker, Settings]) -> None:
    own_broker, settings = own
    topic = settings.kafka_topics[0]
    short_queue = replace(settings, kafka_client={"queue.buffering.max.messages": "10"})
    patient, impatient, full = (
        Publisher(settings, topic),
        Publisher(settings, topic, patience=1),
        Publisher(short_queue, topic, patience=1),
    )
    own_broker.stop()
    for publisher in (patient, impatient):
        for _ in range(3):
            publisher.send(b"{}")
    with pytest.raises(UnavailableError, match=r"3 of 3 messages were not delivered to topic published.*check that"):
        patient.flush(within=1)
    with pytest.raises(UnavailableError, match="3 of 3 messages were not delivered"):
        impatient.flush()
    for _ in range(10):
        full.send(b"{}")
    with pytest.raises(UnavailableError, match="10 of 10 messages were not delivered"):
        full.send(b"{}")


@pytest.mark.parametrize(
    "wrong",
    [
        ("--rate", "-1"),
        ("--rate", "nan"),
        ("--duration", "nan"),
        ("--duration", "0"),
        ("--count", "0"),
        ("--failure-rate", "1"),
        ("--start", "yesterday"),
    ],
)
def test_simulate_refuses_wrong_options(wrong: tuple[str, str]) -> None:
    result = CliRunner().invoke(main, ["simulate", *wrong])
    assert result.exit_code == 2
    assert wrong[0] in result.stderr


@pytest.mark.parametrize("command", [("simulate",), ("publish-csv", "a.csv")])
def test_a_missing_topic_is_one_clear_line(settings: Settings, command: tuple[str, ...]) -> None:
    Path("a.csv").write_text("timestamp,A,has_failure\n2026-01-01,1,0\n")
    result = run(settings, *command, "--topic", "nowhere")
    assert result.exit_code == 1
    assert result.stderr.startswith("sensor-pipeline: there is no topic nowhere at ")
    assert result.stderr.count("\n") == 1


# --- publish-csv


def written(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def table(*lines: str) -> str:
    return "\n".join(["timestamp,A,B,has_failure", *lines, ""])


def messages_of(settings: Settings, *arguments: object) -> list[Published]:
    result = run(settings, "publish-csv", *arguments)
    assert result.exit_code == 0, result.output
    return published(settings)


def test_a_line_becomes_a_reading_with_every_digit_as_written(settings: Settings) -> None:
    file = written(
        "press 4.csv",
        "timestamp;Temp é;Flow;Mode;has_failure\r\n"
        "2026-01-01 12:00:00;0.0265878;1.50e+2;auto \"\"x;0.0\r\n"
        "\r\n"
        "2026-01-01T12:00:01.123456;-12345678901234567890.0; ;007;1\r\n",
    )  # fmt: skip
    messages = messages_of(settings, file)
    assert [message.value.decode() for message in messages] == [
        '{"machine_id": "press 4", "timestamp": "2026-01-01T12:00:00", "readings": {"readings": '
        '{"Temp é": 0.0265878, "Flow": 1.50e+2, "Mode": "auto \\"\\"x"}, "has_failure": false}}',
        '{"machine_id": "press 4", "timestamp": "2026-01-01T12:00:01.123456", "readings": {"readings": '
        '{"Temp é": -12345678901234567890.0, "Flow": null, "Mode": "007"}, "has_failure": true}}',
    ]


def test_text_that_is_no_number_is_published_and_noted_once_a_column(settings: Settings) -> None:
    file = written("a.csv", table("2026-01-01,+1,1,0", "2026-01-02,NaN,2,0"))
    result = run(settings, "publish-csv", file)
    assert result.stderr == "note: a.csv, line 2, column 'A': '+1' is no number; such text is published as a string\n"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_separator_is_found_in_the_header_and_said(settings: Settings, separator: str) -> None:
    names = ["timestamp", '"Flow, l/s; mean"', "has_failure"]
    file = written("a.csv", "\n".join(separator.join(cells) for cells in (names, ["2026-01-01", "1", "0"])))
    result = run(settings, "publish-csv", file)
    assert f"separator: {separator!r}" in result.stdout
    assert published(settings)[0].document["readings"]["readings"] == {"Flow, l/s; mean": 1}


def test_another_separator_can_be_named(settings: Settings) -> None:
    file = written("a.csv", "timestamp|A,B|has_failure\n2026-01-01|1|0\n")
    assert messages_of(settings, file, "--separator", "|")[0].document["readings"]["readings"] == {"A,B": 1}


@pytest.mark.parametrize(
    ("text", "failing"),
    [("1", True), ("1.0", True), ("true", True), ("True", True), ("0", False), ("0.0", False), ("FALSE", False)],
)
def test_a_failure_is_a_number_or_a_boolean(settings: Settings, text: str, failing: bool) -> None:
    file = written("a.csv", table(f"2026-01-01,1,2,{text}"))
    assert messages_of(settings, file)[0].document["readings"]["has_failure"] is failing


def test_readings_of_all_files_go_to_the_partitions_in_turn(settings: Settings) -> None:
    files = [
        written(f"{name}.csv", table(*(f"2026-01-01T00:00:{second:02},1,2,0" for second in range(7)))) for name in "abc"
    ]
    result = run(settings, "publish-csv", *files)
    assert "21 readings (0 failing), machines: 3, files: 3\npartitions: 0: 6, 1: 5, 2: 5, 3: 5\n" in result.stdout
    assert Counter(message.partition for message in published(settings)) == {0: 6, 1: 5, 2: 5, 3: 5}


def test_a_machine_is_named_by_its_file_an_option_or_a_column(settings: Settings) -> None:
    Path("other").mkdir()
    a, other = written("a.csv", table("2026-01-01,M 1,2,0")), written("other/a.csv", table("2026-01-01,M 2,2,0"))
    result = run(settings, "publish-csv", a, other)
    assert result.exit_code == 1
    assert "2 files are called 'a'" in result.stderr
    assert "--machine-id" in result.stderr
    run(settings, "publish-csv", a)
    run(settings, "publish-csv", a, other, "--machine-id", "press 4")
    run(settings, "publish-csv", a, other, "--machine-id-column", "A")
    documents = [message.document for message in published(settings)]
    assert Counter(d["machine_id"] for d in documents) == {"a": 1, "press 4": 2, "M 1": 1, "M 2": 1}
    assert {tuple(d["readings"]["readings"]) for d in documents if d["machine_id"].startswith("M")} == {("B",)}


GOOD = "2026-01-01,1,2,0"


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (table(GOOD, "2026-01-01,1,2"), (), "bad.csv, line 3: 3 cells, but the header names 4 columns"),
        (table(GOOD, "2026-01-01,1,2,0,0"), (), "bad.csv, line 3: 5 cells"),
        (table(GOOD, "2026-01-01,1,2,maybe"), (), "bad.csv, line 3, column 'has_failure': 'maybe' is neither"),
        (table(GOOD, "2026-01-01,1,2,"), (), "bad.csv, line 3, column 'has_failure': '' is neither"),
        (table(GOOD, "2026-01-01,1,2,2"), (), "bad.csv, line 3, column 'has_failure': '2' is neither"),
        (table(GOOD, "01.02.2026,1,2,0"), (), "bad.csv, line 3, column 'timestamp': '01.02.2026' is not an ISO 8601"),
        (table(GOOD, "2026-01-01T10:14.5,1,2,0"), (), "bad.csv, line 3: not a reading (timestamp_unreadable)"),
        (table(GOOD, "9000-01-01,1,2,0"), (), "bad.csv, line 3: its time is more than MAX_FUTURE ahead of now"),
        (table(GOOD, "2026-01-01,1e999,2,0"), (), "bad.csv, line 3: not a reading (value_out_of_range)"),
        (table(GOOD, "2026-01-01,1\x002,2,0"), (), "bad.csv, line 3: not a reading (string_has_nul)"),
        (table(GOOD, '2026-01-01,"1"2,2,0'), (), "bad.csv, line 3: ',' expected after '\"'"),
        (table(GOOD, '2026-01-01,"1,2,0', *[GOOD] * 5), (), "bad.csv, line 8: unexpected end of data"),
        (table(GOOD).encode() + "2026-01-01,ä,2,0\n".encode("latin-1"), (), "bad.csv, line 3: byte 12 is not UTF-8"),
        (table(GOOD).encode("utf-16"), (), "bad.csv, line 1: byte 1 is not UTF-8"),
        (table(GOOD, "x" * 1_100_000), (), "bad.csv, line 3: longer than 1,048,576 bytes"),
        (table(GOOD).replace("\n", "\r"), (), "bad.csv, line 1: new-line character"),
        ("", (), "bad.csv, line 1 is empty: it has to name the columns"),
        ("\n\n", (), "bad.csv, line 1 is empty: it has to name the columns"),
        ("timestamp,A,A,has_failure\n", (), "bad.csv, line 1: more than one column 'A'"),
        (",timestamp,has_failure\n", (), "bad.csv, line 1: a column has no name"),
        (
            table(GOOD),
            ("--time-column", "when", "--exclude", "C"),
            "bad.csv has no column 'C' (--exclude), 'when' (--time-column): it has 'timestamp', 'A', 'B', "
            "'has_failure' (separator ',')",
        ),
        (table(GOOD), ("--machine-id-column", "C"), "bad.csv has no column 'C' (--machine-id-column): it has"),
        (table(GOOD), ("--machine-id", ""), "bad.csv, line 2: not a reading (machine_id_empty)"),
        (table(GOOD), ("--machine-id", "m" * 256), "bad.csv, line 2: not a reading (machine_id_too_long)"),
    ],
)
def test_one_bad_line_is_named_and_nothing_is_published(
    settings: Settings, content: str | bytes, options: tuple[str, ...], says: str
) -> None:
    good, bad = written("good.csv", table(GOOD).replace("B", "C")), written("bad.csv", content)
    result = run(settings, "publish-csv", *([bad] if options else [good, bad]), *options)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"sensor-pipeline: {says}")
    assert result.stderr.count("\n") == 1
    assert published(settings) == []


@pytest.mark.parametrize(("name", "says"), [("none.csv", "No such file"), ("folder", "is not a file")])
def test_what_is_no_file_is_named(settings: Settings, name: str, says: str) -> None:
    Path("folder").mkdir()
    result = run(settings, "publish-csv", name)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"sensor-pipeline: {name} ")
    assert says in result.stderr


@pytest.mark.parametrize(
    "wrong", [(), ("a.csv", "--separator", "ab"), ("a.csv", "--machine-id", "a", "--machine-id-column", "b")]
)
def test_publish_csv_refuses_wrong_use(wrong: tuple[str, ...]) -> None:
    assert CliRunner().invoke(main, ["publish-csv", *wrong]).exit_code == 2


def test_an_interrupted_command_says_how_much_was_published(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written("a.csv", table(*[GOOD] * 10))
    send = Publisher.send

    def interrupted(publisher: Publisher, message: bytes, key: str | None = None) -> None:
        send(publisher, message, key)
        publisher.flush()
        if sum(publisher.published.values()) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(Publisher, "send", interrupted)
    result = run(settings, "publish-csv", file)
    assert result.exit_code == 1
    assert "published before that: at least 7 of 10 readings" in result.stderr
    assert len(published(settings)) == 7


@needs_data
def test_the_labelled_experiments_become_sixteen_machines(settings: Settings) -> None:
    files = valve_files()
    options = ["--time-column", "datetime", "--failure-column", "anomaly", "--exclude", "changepoint"]
    messages = messages_of(settings, *files, *options)
    expected = Counter()
    for file in files:
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines, delimiter=";"):
                sensors = {k: float(v) for k, v in row.items() if k not in ("datetime", "anomaly", "changepoint")}
                moment = row["datetime"].replace(" ", "T")
                expected[file.stem, moment, row["anomaly"] == "1.0", *sorted(sensors.items())] += 1
    found = Counter()
    for message in messages:
        document = message.document
        sensors, failing = document["readings"]["readings"], document["readings"]["has_failure"]
        found[document["machine_id"], document["timestamp"], failing, *sorted(sensors.items())] += 1
    assert found == expected
    assert len({machine for machine, *_ in found}) == 16
    assert found.total() == 18_160
    assert Counter(message.partition for message in messages) == dict.fromkeys(range(4), 4_540)
