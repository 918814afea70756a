"""Notices from the outbox to the webhook and the log: at least once, in order for each machine.

A notice is closed in the transaction in which its row was locked while it was posted. Whoever is killed between the
two leaves it open, and it is posted again. A webhook that is down, or too busy, keeps its notices for as long as that
lasts: the first attempt that fails ends the round, and the next round begins with another machine's. A notice that
is refused holds up its own machine's only, is tried again after pauses that grow, and is given up after a day of that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from logging import ERROR, INFO

from sensor_pipeline.errors import NoticeRefusedError, UnavailableError
from sensor_pipeline.notices import Notice
from sensor_pipeline.offsets import pause
from sensor_pipeline.postgres import notices
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.webhook import Webhook

# A refused notice is tried again for so long.
REFUSED_FOR = timedelta(days=1)
# So many are looked up, logged or deleted at once.
_DUE_AT_ONCE = 500
_LOGGED_AT_ONCE = 1_000
_DELETED_AT_ONCE = 20_000

Log = Callable[[int, str], None]


@dataclass
class Delivered:
    """What became of notices in one round; `trouble` says why it ended before its time."""

    sent: int = 0
    logged: int = 0
    refused: int = 0
    given_up: int = 0
    trouble: str = ""

    def __str__(self) -> str:
        counts = [f"{count} {name}" for name, count in vars(self).items() if name != "trouble" and count]
        said = [", ".join(counts).replace("_", " ")] if counts else []
        return "; ".join([*said, *([self.trouble] if self.trouble else [])]) or "nothing to deliver"


class Delivery:
    """Delivers what is in the outbox.

    Args:
        database: that holds it.
        webhook: where to post; None: nowhere, and what is logged is delivered.
        log: takes a level of `logging` and a line.
        refused_for: how long a refused notice is tried again.
    """

    def __init__(
        self, database: Database, webhook: Webhook | None, log: Log, *, refused_for: timedelta = REFUSED_FOR
    ) -> None:
        self._database = database
        self._webhook = webhook
        self._log = log
        self._refused_for = refused_for

    def run(self, seconds: float) -> Delivered:
        """Deliver what is due, for about so long: one attempt that is under way may take its own time on top.

        Raises:
            SensorPipelineError: the outbox cannot be read or written; what was posted may be posted again.
        """
        deadline = time.monotonic() + seconds
        result = Delivered()
        if self._webhook is None:
            self._log_all(result, deadline)
        elif rest := self._webhook.rest:
            result.trouble = f"the webhook asked for a pause, of which {rest.total_seconds():,.0f} s are left"
        else:
            self._post_all(self._webhook, result, deadline)
        return result

    def delete_old(self, kept: timedelta) -> int:
        """Delete some of the delivered notices that were found longer ago than that; returns how many."""
        with self._database.begin() as connection:
            return notices.delete_old(connection, kept, _DELETED_AT_ONCE)

    def _log_all(self, result: Delivered, deadline: float) -> None:
        while time.monotonic() < deadline:
            with self._database.begin() as connection:
                found = notices.take_first(connection, _LOGGED_AT_ONCE)
                for notice in found:
                    self._log(INFO, _line(notice, "logged"))
                notices.close(connection, [notice.id for notice in found], "logged")
            result.logged += len(found)
            if len(found) < _LOGGED_AT_ONCE:
                return

    def _post_all(self, webhook: Webhook, result: Delivered, deadline: float) -> None:
        while True:
            with self._database.begin() as connection:
                ids = notices.due(connection, _DUE_AT_ONCE)
            is_any_done = False
            for notice_id in ids:
                if time.monotonic() >= deadline:
                    result.trouble = "the rest follows"
                    return
                is_any_done |= self._post(webhook, notice_id, result)
                if result.trouble:
                    return
            # What is left belongs to another one who delivers.
            if not is_any_done:
                return

    def _post(self, webhook: Webhook, notice_id: int, result: Delivered) -> bool:
        """Post one notice; False where it was not to be had."""
        with self._database.begin() as connection:
            taken = notices.take(connection, notice_id)
            if taken is None:
                return False
            notice = taken.notice
            try:
                webhook.post(notice.body())
            except UnavailableError as error:
                wait = webhook.rest or pause(taken.attempts + 1)
                notices.postpone(connection, notice.id, wait, refused=False)
                result.trouble = str(error)
                self._log(ERROR, _line(notice, "postponed", str(error)))
            except NoticeRefusedError as error:
                is_last = taken.now - (taken.refused_since or taken.now) >= self._refused_for
                if is_last:
                    notices.close(connection, [notice.id], "given_up", attempts=1)
                    result.given_up += 1
                else:
                    notices.postpone(connection, notice.id, pause(taken.attempts + 1), refused=True)
                    result.refused += 1
                self._log(ERROR, _line(notice, "given_up" if is_last else "refused", str(error)))
            else:
                notices.close(connection, [notice.id], "sent", attempts=1)
                result.sent += 1
                self._log(INFO, _line(notice, "sent"))
        return True


def _line(notice: Notice, outcome: str, error: str | None = None) -> str:
    """One structured line: `notice` and the JSON that the webhook gets, with what became of it."""
    return "notice " + json.dumps({"outcome": outcome} | ({"error": error} if error else {}) | notice.body())
