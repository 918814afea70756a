"""Notices from the outbox to a real HTTP server that fails, stalls, refuses and comes back."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from threading import Event
from typing import Any

import pytest
import sqlalchemy as sa

from sensor_pipeline.delivery import Delivered, Delivery
from sensor_pipeline.embedded import ports
from sensor_pipeline.errors import NoticeRefusedError, SensorPipelineError, UnavailableError
from sensor_pipeline.offsets import OffsetRange
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.settings import Settings
from sensor_pipeline.webhook import Webhook, rest_asked
from sensor_pipeline_tests.kafka.inspecting import query
from sensor_pipeline_tests.oracle import connect
from sensor_pipeline_tests.postgres.tables import dated, until
from sensor_pipeline_tests.receivers import TOKEN, Receiver, receiving
from sensor_pipeline_tests.test_any_history import Log

START = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
# Short, as the test waits for it wherever the server stalls.
ANSWER_SECONDS = 0.5


def told(settings: Settings, *, machines: int, failures: int) -> dict[str, list[tuple[str, str]]]:
    """Let machines fail so often, in a batch for each time; what is to be told of each, in order."""
    log = Log(settings, "readings", "readings-id")
    wanted: dict[str, list[tuple[str, str]]] = {f"m{machine}": [] for machine in range(machines)}
    for number in range(failures):
        start = START + timedelta(seconds=10 * number)
        for machine, notices in wanted.items():
            log.publish(0, dated(machine, start, True))
            log.publish(0, dated(machine, start + timedelta(seconds=1), False))
            notices += [("failure_started", start.isoformat()), ("failure_ended", start.isoformat())]
        log.ingest([OffsetRange(0, 2 * machines * number, 2 * machines * (number + 1))])
    return wanted


def delivery(settings: Settings, url: str | None, log: list[str] | None = None, **more: Any) -> Delivery:
    webhook = Webhook(url, answer_seconds=ANSWER_SECONDS) if url else None
    lines = [] if log is None else log
    return Delivery(Database(settings), webhook, lambda level, line: lines.append(line), **more)


def deliver(settings: Settings, url: str | None, log: list[str] | None = None, **more: Any) -> Delivered:
    return delivery(settings, url, log, **more).run(60)


def time_passes(settings: Settings) -> None:
    """Every pause is over."""
    with connect(settings).begin() as connection:
        connection.execute(sa.text("UPDATE notices SET retry_at = found_at WHERE outcome IS NULL"))


def outcomes(settings: Settings) -> dict[str | None, int]:
    return dict(map(tuple, query(settings, "SELECT outcome, count(*) FROM notices GROUP BY outcome")))


def test_what_is_told_arrives_as_json_with_an_id_of_its_own(database_settings: Settings) -> None:
    wanted = told(database_settings, machines=3, failures=2)
    lines: list[str] = []
    with receiving() as receiver:
        delivered = deliver(database_settings, receiver.url, lines)
        assert str(delivered) == "12 sent"
        assert receiver.by_machine() == wanted
        assert str(deliver(database_settings, receiver.url)) == "nothing to deliver"
    assert receiver.keys == [body["id"] for body in receiver.got]
    assert len(set(receiver.keys)) == 12
    assert outcomes(database_settings) == {"sent": 12}
    logged = [json.loads(line.removeprefix("notice ")) for line in lines]
    assert logged == [{"outcome": "sent"} | body for body in receiver.got]


def test_without_a_webhook_each_notice_is_a_line_in_the_log_and_counts_as_delivered(
    database_settings: Settings,
) -> None:
    told(database_settings, machines=2, failures=2)
    lines: list[str] = []
    assert str(deliver(database_settings, None, lines)) == "8 logged"
    logged = [json.loads(line.removeprefix("notice ")) for line in lines]
    assert [body["outcome"] for body in logged] == ["logged"] * 8
    assert {body["machine"]["machine_id"] for body in logged} == {"m0", "m1"}
    assert outcomes(database_settings) == {"logged": 8}
    with receiving() as receiver:
        assert str(deliver(database_settings, receiver.url)) == "nothing to deliver"
        assert receiver.got == []


def test_a_webhook_that_is_down_loses_no_notice(database_settings: Settings) -> None:
    wanted = told(database_settings, machines=4, failures=3)
    port = ports.any_free()
    url = f"http://127.0.0.1:{port}/"
    for _ in range(3):
        delivered = deliver(database_settings, url)
        assert (delivered.sent, "did not answer (ConnectionError)" in delivered.trouble) == (0, True)
    stalled = Event()
    with receiving(port) as receiver:
        for status in (500, 503, 429, 408):
            receiver.answer = lambda body, status=status: status
            time_passes(database_settings)
            assert f"HTTP {status}" in deliver(database_settings, url).trouble
        receiver.answer = lambda body: 200 if stalled.wait(30) else 500
        time_passes(database_settings)
        assert "did not answer (ReadTimeout)" in deliver(database_settings, url).trouble
        stalled.set()
        # Three, and it is down again.
        receiver.got.clear()
        receiver.answer = lambda body: 200 if len(receiver.got) <= 3 else 502
        time_passes(database_settings)
        assert deliver(database_settings, url).sent == 3
        receiver.answer = lambda body: 200
        time_passes(database_settings)
        assert deliver(database_settings, url).sent == 21
    assert receiver.by_machine() == wanted
    assert outcomes(database_settings) == {"sent": 24}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("as_date", [False, True])
def test_a_webhook_that_asks_for_a_pause_is_left_alone_for_so_long(
    database_settings: Settings, status: int, as_date: bool
) -> None:
    wanted = told(database_settings, machines=3, failures=1)
    now = [1000.0]
    with receiving() as receiver:
        webhook = Webhook(receiver.url, clock=lambda: now[0])
        tries = Delivery(Database(database_settings), webhook, lambda level, line: None)
        asked = format_datetime(datetime.now(UTC) + timedelta(seconds=301), usegmt=True) if as_date else "300"
        receiver.headers = {"Retry-After": asked}
        receiver.answer = lambda body: status if len(receiver.got) == 1 else 200
        assert f"HTTP {status}" in tries.run(60).trouble
        # The notice itself waits for no less, whoever tries it next.
        (left,) = query(
            database_settings,
            "SELECT extract(epoch FROM max(retry_at) - clock_timestamp())::float8 FROM notices WHERE attempts = 1",
        )
        assert 270 < left[0] <= 301
        # The other machines' would be due at once.
        time_passes(database_settings)
        now[0] += 270
        assert "asked for a pause, of which" in tries.run(60).trouble
        assert len(receiver.got) == 1
        now[0] += 31
        assert tries.run(60).sent == 6
        assert receiver.by_machine() == wanted


def test_a_pause_that_is_asked_for_is_bounded_and_one_that_cannot_be_read_is_none() -> None:
    now = datetime(2026, 1, 1, 12, tzinfo=UTC)
    asked = {
        "": 0,
        "0": 0,
        " 120 ": 120,
        "1" * 5000: 3600,
        "1.5": 0,
        "-1": 0,
        "²": 0,
        "soon": 0,
        "Thu, 01 Jan 2026 12:02:00 GMT": 120,
        "Thu, 01 Jan 2026 12:02:00 -0000": 120,
        "Thu, 01 Jan 2026 11:00:00 GMT": 0,
        "Fri, 31 Dec 9999 23:59:59 GMT": 3600,
        "Thu, 99 Jan 2026 12:02:00 GMT": 0,
        "Thu, 01 Jan 2026 12:02:00 +9999": 0,
    }
    assert {text: rest_asked(text, now).total_seconds() for text in asked} == asked


def test_a_webhook_that_stalls_holds_up_a_round_for_no_longer_than_one_attempt(database_settings: Settings) -> None:
    told(database_settings, machines=20, failures=1)
    go_on = Event()
    with receiving() as receiver:
        receiver.answer = lambda body: 200 if go_on.wait(30) else 500
        for round_number in (1, 2, 3):
            assert deliver(database_settings, receiver.url).sent == 0
            assert len(receiver.got) == round_number
        # Each round began with another machine's, none of which has to wait for a pause.
        assert len({body["machine"]["machine_id"] for body in receiver.got}) == 3
        go_on.set()


def test_a_round_ends_with_its_time(database_settings: Settings) -> None:
    told(database_settings, machines=3, failures=1)
    with receiving() as receiver:
        assert delivery(database_settings, receiver.url).run(0).trouble == "the rest follows"
        assert receiver.got == []


def test_a_batch_is_written_while_a_notice_of_its_machine_is_being_posted(database_settings: Settings) -> None:
    told(database_settings, machines=1, failures=1)
    log = Log(database_settings, "more", "more-id")
    log.publish(0, dated("m0", START + timedelta(minutes=5), True))
    arrived, written = Event(), Event()

    def answer(body: Mapping[str, Any]) -> int:
        arrived.set()
        return 200 if written.wait(30) else 500

    with receiving() as receiver, ThreadPoolExecutor() as pool:
        receiver.answer = answer
        patient = Delivery(Database(database_settings), Webhook(receiver.url, answer_seconds=60), lambda *line: None)
        running = pool.submit(patient.run, 60)
        assert arrived.wait(30)
        assert log.ingest([OffsetRange(0, 0, 1)]).inserted == 1
        assert not running.done()
        written.set()
        assert running.result().sent == 3
    assert [kind for kind, _ in receiver.by_machine()["m0"]] == ["failure_started", "failure_ended", "failure_started"]


def refusing(receiver: Receiver, machine: str, status: int = 400) -> None:
    """Refuse the first notice of a machine."""
    refused: list[str] = []

    def answer(body: Mapping[str, Any]) -> int:
        if body["machine"]["machine_id"] == machine and (not refused or body["id"] in refused):
            refused.append(body["id"])
            return status
        return 200

    receiver.answer = answer


@pytest.mark.parametrize("status", [400, 404, 410, 302])
def test_a_refused_notice_holds_up_its_own_machine_only_and_is_given_up_after_a_day(
    database_settings: Settings, status: int
) -> None:
    wanted = told(database_settings, machines=3, failures=2)
    lines: list[str] = []
    with receiving() as receiver:
        refusing(receiver, "m1", status)
        assert str(deliver(database_settings, receiver.url, lines)) == "8 sent, 1 refused"
        assert str(deliver(database_settings, receiver.url, lines)) == "nothing to deliver"
        time_passes(database_settings)
        assert str(deliver(database_settings, receiver.url, lines)) == "1 refused"
        assert receiver.by_machine() == wanted | {"m1": wanted["m1"][:1]}
        with connect(database_settings).begin() as connection:
            connection.execute(sa.text("UPDATE notices SET refused_since = refused_since - interval '1 day'"))
        time_passes(database_settings)
        assert str(deliver(database_settings, receiver.url, lines)) == "3 sent, 1 given up"
    assert receiver.by_machine() == wanted
    assert outcomes(database_settings) == {"sent": 11, "given_up": 1}
    said = [json.loads(line.removeprefix("notice ")) for line in lines]
    assert [body["outcome"] for body in said if body["outcome"] != "sent"] == ["refused", "refused", "given_up"]
    assert f"HTTP {status}" in next(body["error"] for body in said if body["outcome"] == "given_up")


def test_an_outage_is_never_taken_for_a_refusal(database_settings: Settings) -> None:
    told(database_settings, machines=1, failures=1)
    with receiving() as receiver:
        receiver.answer = lambda body: 503
        for _ in range(3):
            assert deliver(database_settings, receiver.url, refused_for=timedelta(0)).given_up == 0
            time_passes(database_settings)
        receiver.answer = lambda body: 200
        assert deliver(database_settings, receiver.url, refused_for=timedelta(0)).sent == 2


def test_a_pause_grows_with_each_attempt(database_settings: Settings) -> None:
    told(database_settings, machines=1, failures=1)
    seconds = []
    with receiving() as receiver:
        receiver.answer = lambda body: 500
        for _ in range(4):
            deliver(database_settings, receiver.url)
            pause = "SELECT extract(epoch FROM retry_at - clock_timestamp()) FROM notices WHERE attempts > 0"
            seconds.append(round(float(query(database_settings, pause)[0][0]), -1))
            time_passes(database_settings)
    assert seconds == [10, 20, 40, 80]


class Deadly(Webhook):
    """Its process is killed when the receiver has taken a notice."""

    def post(self, body: Mapping[str, Any]) -> None:
        super().post(body)
        os.kill(os.getpid(), signal.SIGKILL)


def deliver_and_die(settings: Settings, url: str) -> None:
    Delivery(Database(settings), Deadly(url), lambda *line: None).run(60)


def test_who_is_killed_between_the_post_and_the_commit_posts_again_with_the_same_id(
    database_settings: Settings,
) -> None:
    wanted = told(database_settings, machines=2, failures=2)
    with receiving() as receiver:
        process = multiprocessing.get_context("spawn").Process(
            target=deliver_and_die, args=(database_settings, receiver.url)
        )
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert len(receiver.got) == 1
        assert outcomes(database_settings) == {None: 8}
        # The server lets go of the row a moment after its client is gone.
        until(lambda: deliver(database_settings, receiver.url) and outcomes(database_settings) == {"sent": 8})
    assert len(receiver.got) == 9
    assert receiver.keys.count(receiver.keys[0]) == 2
    assert receiver.by_machine() == wanted


def test_two_who_deliver_at_once_keep_each_machines_order_and_send_nothing_twice(database_settings: Settings) -> None:
    wanted = told(database_settings, machines=12, failures=3)
    with receiving() as receiver, ThreadPoolExecutor() as pool:
        runs = [pool.submit(deliver, database_settings, receiver.url) for _ in range(4)]
        assert sum(run.result().sent for run in runs) + deliver(database_settings, receiver.url).sent == 72
    assert len(receiver.got) == 72
    assert receiver.by_machine() == wanted


# The address is a secret


def test_the_address_is_in_no_log_line_and_in_no_error(
    database_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told(database_settings, machines=1, failures=1)
    said: list[str] = []
    closed = f"http://127.0.0.1:{ports.any_free()}/services/{TOKEN}"
    with receiving() as receiver, no_http() as garbled:
        receiver.headers = {"Location": f"/services/{TOKEN}/next"}
        for status in (302, 400, 500):
            receiver.answer = lambda body, status=status: status
            time_passes(database_settings)
            said += [*everything_said(receiver.url), str(deliver(database_settings, receiver.url, said))]
        receiver.answer = lambda body: 200 if Event().wait(2 * ANSWER_SECONDS) else 500
        for url in (receiver.url, closed, garbled):
            time_passes(database_settings)
            said += [*everything_said(url), str(deliver(database_settings, url, said))]
        receiver.answer = lambda body: 200
        time_passes(database_settings)
        said.append(str(deliver(database_settings, receiver.url, said)))
    assert "1 sent" in said[-1] or "2 sent" in said[-1]
    assert said
    assert TOKEN not in "\n".join(said)
    assert TOKEN not in caplog.text
    assert TOKEN not in repr(Settings.from_env({"ALERT_WEBHOOK_URL": receiver.url}))


def everything_said(url: str) -> list[str]:
    """What an error holds, with all that hangs on it, as somebody who prints its traceback gets it."""
    try:
        Webhook(url, answer_seconds=ANSWER_SECONDS).post({"id": "1", "text": "said"})
    except SensorPipelineError as error:
        return [*traceback.format_exception(error), repr(error.__cause__), repr(error.__context__)]
    return []


class no_http:  # noqa: N801 - a context manager
    """A server that answers with something that is no HTTP."""

    def __enter__(self) -> str:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._pool = ThreadPoolExecutor(1)
        self._pool.submit(self._serve)
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}/services/{TOKEN}"

    def _serve(self) -> None:
        for answer in (b"HTTP/1.1 200 OK\r\nno header at all\r\n\r\n", b"what?\r\n\r\n"):
            connection, _ = self._socket.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    def __exit__(self, *_: object) -> None:
        # Who waits for a connection that never comes gets one.
        with socket.create_connection(self._socket.getsockname()):
            self._socket.close()
        self._pool.shutdown()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (200, None),
        (204, None),
        (299, None),
        (301, NoticeRefusedError),
        (401, NoticeRefusedError),
        (408, UnavailableError),
        (425, UnavailableError),
        (429, UnavailableError),
        (500, UnavailableError),
        (503, UnavailableError),
    ],
)
def test_an_answer_means_taken_later_or_never(status: int, error: type[SensorPipelineError] | None) -> None:
    with receiving() as receiver:
        receiver.answer = lambda body: status
        if error is None:
            Webhook(receiver.url).post({"id": "1", "text": "said"})
        else:
            with pytest.raises(error, match=f"HTTP {status}"):
                Webhook(receiver.url).post({"id": "1", "text": "said"})
    assert receiver.got == [{"id": "1", "text": "said"}]
