"""Three hosts on this machine: network namespaces, each worker's joined to that of the servers by a link of its own."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from sensor_pipeline.embedded import ports

SERVERS = "10.83.0.1"
WORKERS = (1, 2)
_NEW_NETWORK = 0x40000000


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@cache
def _why_not() -> str | None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and the command ip (Debian: apt-get install iproute2)"
    probe = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"the kernel refuses network namespaces: {made.stderr.strip()}"
    _ip("netns", "del", probe)
    return None


needs_namespaces = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))


class Network:
    """The links of the workers' hosts; `address` is where a worker comes from, as the servers see it."""

    def __init__(self) -> None:
        self._prefix = f"sp{os.getpid()}"

    @property
    def servers(self) -> str:
        return f"{self._prefix}-servers"

    def host(self, worker: int) -> str:
        return f"{self._prefix}-worker-{worker}"

    @staticmethod
    def address(worker: int) -> str:
        return f"10.83.{worker}.2"

    def make(self) -> None:
        _ip("netns", "add", self.servers)
        _ip("-n", self.servers, "link", "set", "lo", "up")
        _ip("-n", self.servers, "address", "add", f"{SERVERS}/32", "dev", "lo")
        for worker in WORKERS:
            host = self.host(worker)
            _ip("netns", "add", host)
            here, there = f"to-worker-{worker}", "to-servers"
            _ip("-n", self.servers, "link", "add", here, "type", "veth", "peer", "name", there, "netns", host)
            _ip("-n", self.servers, "address", "add", f"10.83.{worker}.1/24", "dev", here)
            _ip("-n", self.servers, "link", "set", here, "up")
            _ip("-n", host, "address", "add", f"{self.address(worker)}/24", "dev", there)
            for link in ("lo", there):
                _ip("-n", host, "link", "set", link, "up")
            _ip("-n", host, "route", "add", f"{SERVERS}/32", "via", f"10.83.{worker}.1")

    def cut(self, worker: int) -> None:
        """From now on nothing passes, and nobody is told."""
        _ip("-n", self.servers, "link", "set", f"to-worker-{worker}", "down")

    def mend(self, worker: int) -> None:
        _ip("-n", self.servers, "link", "set", f"to-worker-{worker}", "up")

    def remove(self) -> None:
        for name in (self.servers, *map(self.host, WORKERS)):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextmanager
def three_hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """During the block this thread and all that it starts are on the host of the servers, which listen at `SERVERS`."""
    network = Network()
    with Path("/proc/thread-self/ns/net").open() as home:
        try:
            network.make()
            with Path("/run/netns", network.servers).open() as servers:
                _enter(servers.fileno())
            monkeypatch.setattr(ports, "LOOPBACK", SERVERS)
            yield network
        finally:
            _enter(home.fileno())
            network.remove()


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns")
