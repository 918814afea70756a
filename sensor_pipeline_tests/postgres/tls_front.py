"""TLS in front of a PostgreSQL that has none, as a pooler's or proxy's: `python -m …tls_front PORT CERTIFICATE…`.

The embedded server is built without TLS. What is under test is the other end: libpq with its certificates.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from sensor_pipeline.embedded import ports

_SSL_REQUEST = bytes.fromhex("0000000804d2162f")


@contextmanager
def tls_fronts(port: int, certificates: Mapping[str, Path]) -> Iterator[dict[str, int]]:
    """For each certificate, by its name, a port that has it and leads to the server at `port`."""
    command = [sys.executable, "-m", __name__, str(port), *map(str, certificates.values())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            found = process.stdout.readline().split()
            yield dict(zip(certificates, map(int, found), strict=True))
        finally:
            process.kill()


async def _serve(
    context: ssl.SSLContext, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    with suppress(OSError, asyncio.IncompleteReadError):
        # Who does not ask for TLS is not let in.
        if await reader.readexactly(8) == _SSL_REQUEST:
            writer.write(b"S")
            await writer.start_tls(context)
            from_server, to_server = await asyncio.open_connection(ports.LOOPBACK, port)
            await asyncio.gather(_pass_on(reader, to_server), _pass_on(from_server, writer))
    writer.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _main(port: int, certificates: list[str]) -> None:
    servers = []
    for certificate in certificates:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        servers.append(await asyncio.start_server(partial(_serve, context, port), ports.LOOPBACK, 0))
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    asyncio.run(_main(int(sys.argv[1]), sys.argv[2:]))
