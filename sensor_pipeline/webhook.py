"""Notices by HTTP. The address is a secret: whoever has it can post, so that no log line and no error holds it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import SplitResult, urlsplit

from sensor_pipeline.errors import NoticeRefusedError, UnavailableError

# So long for a connection, and so long for the answer: a sensor's tick waits for it.
CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 5.0

# The receiver is asked again later, as when it does not answer.
_LATER = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
_HTTP_LOGGERS = ("urllib3.connectionpool", "urllib3.connection")


class Webhook:
    """Posts JSON to an address.

    Args:
        url: the address.
        connect_seconds: how long a connection may take.
        answer_seconds: how long the answer may take.
    """

    def __init__(
        self, url: str, *, connect_seconds: float = CONNECT_SECONDS, answer_seconds: float = ANSWER_SECONDS
    ) -> None:
        self._url = url
        self._timeout = (connect_seconds, answer_seconds)
        # The HTTP client logs paths: each request's at DEBUG, and that of one with a wrong header as a warning.
        hide = _Hide(urlsplit(url))
        for name in _HTTP_LOGGERS:
            logging.getLogger(name).addFilter(hide)

    def post(self, body: Mapping[str, Any]) -> None:
        """Post one notice, and return once the receiver has taken it (HTTP 2xx).

        Args:
            body: JSON; its `id` is sent as `Idempotency-Key` too.

        Raises:
            UnavailableError: it did not answer, or asks to be asked later: 408, 425, 429 or 5xx.
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
                status = response.status_code
        except requests.RequestException as error:
            trouble = type(error).__name__
        # Not within the handler: the client's error, which would hang on ours, holds the address.
        if trouble:
            raise UnavailableError(
                f"the webhook did not answer ({trouble}); check ALERT_WEBHOOK_URL and the way there, and wait"
            )
        if status in _LATER or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise UnavailableError(f"the webhook answered HTTP {status}; it is asked again later")
        if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            raise NoticeRefusedError(f"the webhook refused the notice with HTTP {status}; check ALERT_WEBHOOK_URL")


class _Hide(logging.Filter):
    """Lets no record through that holds an address's path or query."""

    def __init__(self, url: SplitResult) -> None:
        super().__init__()
        self._secrets = [part for part in (url.path, url.query) if part.strip("/")]

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(secret in record.getMessage() for secret in self._secrets)
