"""Free ports on loopback."""

from __future__ import annotations

import socket
from collections.abc import Collection

from sensor_pipeline.errors import UnavailableError

LOOPBACK = "127.0.0.1"
TRIES = 200


def is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the servers do: a port whose last connections linger is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def next_free(preferred: int, taken: Collection[int] = ()) -> int:
    """The preferred port if it is free and not in `taken`, otherwise the next one that is.

    Raises:
        UnavailableError: none of the next 200 is free.
    """
    for port in range(preferred, min(preferred + TRIES, 65536)):
        if port not in taken and is_free(port):
            return port
    raise UnavailableError(f"no free port from {preferred} on: stop a server that listens there")


def any_free() -> int:
    """A free port chosen by the system."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Whether a server accepts connections on this loopback port."""
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True
