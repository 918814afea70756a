"""Certificates made on the spot, by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path


class Authority:
    """One that signs; `certificate` is the file by which others know it."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.certificate = folder / f"{name}.pem"
        self._key = folder / f"{name}.key"
        self._openssl("req", "-x509", *_new_key(self._key), "-out", self.certificate, "-subj", f"/CN={name}")

    def sign(self, name: str, for_names: str, *, days: int = 2) -> Path:
        """A server's key and certificate in one file; `for_names` as in `IP:127.0.0.1,DNS:localhost`."""
        key, request, signed = (self._folder / f"{name}.{end}" for end in ("key", "csr", "crt"))
        names = ("-addext", f"subjectAltName={for_names}")
        self._openssl("req", *_new_key(key), "-out", request, "-subj", f"/CN={name}", *names)
        by = ("-CA", self.certificate, "-CAkey", self._key, "-copy_extensions", "copy")
        self._openssl("x509", "-req", "-in", request, *by, "-days", str(days), "-out", signed)
        both = self._folder / f"{name}.pem"
        both.write_text(key.read_text() + signed.read_text())
        return both

    def _openssl(self, *arguments: str | Path) -> None:
        done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def _new_key(file: Path) -> tuple[str | Path, ...]:
    return ("-newkey", "rsa:2048", "-nodes", "-keyout", file)
