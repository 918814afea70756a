"""What is wrong with a server's certificate: libpq and librdkafka only say that it was refused, and not why."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

_SECONDS = 3.0

# OpenSSL's codes (x509_vfy.h) → what helps. Whatever else there is has to do with who signed it.
_EXPIRED, _NOT_YET_VALID, _OTHER_NAME, _OTHER_ADDRESS = 10, 9, 62, 64


def certificate_problem(
    host: str,
    port: int,
    *,
    authorities: str | None,
    setting: str,
    check_name: bool = True,
    ask_for_tls: Callable[[socket.socket], None] = lambda connection: None,
) -> str | None:
    """Why this machine refuses a server's certificate, and what to do; None where it does not, or nothing answers.

    Args:
        host: as the client was told it.
        port: of the server.
        authorities: a PEM file of those whose signature counts; None: the system's.
        setting: the variable that names this file.
        check_name: whether the certificate must be for `host`.
        ask_for_tls: what the protocol says before the handshake.
    """
    with suppress(OSError):  # also what else can go wrong in the handshake: of that the client itself has told
        context = ssl.create_default_context(cafile=authorities)
        context.check_hostname = check_name
        with socket.create_connection((host, port), timeout=_SECONDS) as connection:
            ask_for_tls(connection)
            try:
                context.wrap_socket(connection, server_hostname=host).close()
            except ssl.SSLCertVerificationError as error:
                return f"{error.verify_message.rstrip('.')}: {_remedy(error.verify_code, host, setting)}"
    return None


def _remedy(code: int, host: str, setting: str) -> str:
    if code in (_EXPIRED, _NOT_YET_VALID):
        return "give the server a new one, and set the clocks of both by NTP"
    if code in (_OTHER_NAME, _OTHER_ADDRESS):
        return f"use a name that it is for, or give the server one for {host} (subjectAltName)"
    return f"name the file of the authority that signed it in {setting}"
