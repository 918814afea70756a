"""Notices by HTTP. The address is a secret: whoever has it can post, so that no log line and no error holds it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import SplitResult, urlsplit

from sensor_pipeline.errors import NoticeRefusedError, UnavailableError

# So long for a connection, and so long for the answer: a sensor's tick waits for it.
CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 5.0
# Whatever a receiver asks for: people wait for their notices.
LONGEST_REST = timedelta(hours=1)

# The receiver is asked again later, as when it does not answer.
_LATER = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
_HTTP_LOGGERS = ("urllib3.connectionpool", "urllib3.connection")


class Webhook:
    """Posts JSON to an address.

    Args:
        url: the address.
        connect_seconds: how long a connection may take.
        answer_seconds: how long the answer may take.
        clock: gives seconds that only go forward.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_seconds: float = CONNECT_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._timeout = (connect_seconds, answer_seconds)
        self._clock = clock
        self._rests_until = clock()
        # The HTTP client logs paths: each request's at DEBUG, and that of one with a wrong header as a warning.
        hide = _Hide(urlsplit(url))
        for name in _HTTP_LOGGERS:
            logging.getLogger(name).addFilter(hide)

    @property
    def rest(self) -> timedelta:
        """For how long the receiver has asked to be left alone from now on (`Retry-After`); zero where it has not."""
        return timedelta(seconds=max(0.0, self._rests_until - self._clock()))

    def post(self, body: Mapping[str, Any]) -> None:
        """Post one notice, and return once the receiver has taken it (HTTP 2xx).

        Args:
            body: JSON; its `id` is sent as `Idempotency-Key` too.

        Raises:
            UnavailableError: it did not answer, or asks to be asked later: 408, 425, 429 or 5xx. `rest` may say when.
            NoticeRefusedError: any other answer, a redirect among them, which no POST survives.
        """
        # Only where a notice is sent: each run imports what is above.
        import requests

        trouble = ""
        try:
            with requests.post(
                self._url,
                json=body,
                headers={"Idempotency-Key": str(body["id"]), "User-Agent": "sensor_pipeline"},
                timeout=self._timeout,
                allow_redirects=False,
                stream=True,  # what it says beside the status is nobody's concern
            ) as response:
                status, retry_after = response.status_code, response.headers.get("Retry-After", "")
        except requests.RequestException as error:
            trouble = type(error).__name__
        # Not within the handler: the client's error, which would hang on ours, holds the address.
        if trouble:
            raise UnavailableError(
                f"the webhook did not answer ({trouble}); check ALERT_WEBHOOK_URL and the way there, and wait"
            )
        if status in _LATER or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._rests_until = self._clock() + rest_asked(retry_after, datetime.now(UTC)).total_seconds()
            raise UnavailableError(f"the webhook answered HTTP {status}; it is asked again later")
        if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            raise NoticeRefusedError(f"the webhook refused the notice with HTTP {status}; check ALERT_WEBHOOK_URL")


def rest_asked(retry_after: str, now: datetime) -> timedelta:
    """What a header `Retry-After` asks for: seconds, or a date (RFC 9110, 10.2.3).

    Returns:
        At most `LONGEST_REST`; zero where the date is past, or the header empty or none of the two.
    """
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        seconds = float(text)
    else:
        try:
            date = parsedate_to_datetime(text)
        except ValueError:
            return timedelta()
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds()
    return timedelta(seconds=min(max(0.0, seconds), LONGEST_REST.total_seconds()))


class _Hide(logging.Filter):
    """Lets no record through that holds an address's path or query."""

    def __init__(self, url: SplitResult) -> None:
        super().__init__()
        self._secrets = [part for part in (url.path, url.query) if part.strip("/")]

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(secret in record.getMessage() for secret in self._secrets)
