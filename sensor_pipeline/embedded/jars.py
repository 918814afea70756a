"""Apache Kafka's jars: pinned by SHA-256, fetched from Maven Central once, kept in a cache of this package.

`python -m sensor_pipeline.embedded.jars 4.1.1 > sensor_pipeline/embedded/kafka_jars.txt` pins another version.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from sensor_pipeline.embedded import check_installed
from sensor_pipeline.errors import ConfigurationError, UnavailableError

KAFKA_PROJECT = ("org.apache.kafka", "kafka_2.13")
# Kafka brings slf4j's interface but nothing behind it, so without this the broker would log nothing.
LOGGER_PROJECT = ("org.slf4j", "slf4j-simple")

THREADS = 6
TIMEOUT_SECONDS = 15
ATTEMPTS = 2

Progress = Callable[[int, int], None]
"""Called with bytes fetched so far and bytes to fetch in all, from several threads, one at a time."""


@dataclass(frozen=True, kw_only=True)
class Jar:
    """One file of Maven Central and what it must hold; `size` in bytes."""

    group: str
    artifact: str
    version: str
    sha256: str
    size: int

    @property
    def coordinate(self) -> str:
        """The name Maven knows it by."""
        return f"{self.group}:{self.artifact}:{self.version}"

    def path(self, cache: Path) -> Path:
        """Where it lies in a cache laid out as Maven does."""
        folder = cache.joinpath(*self.group.split("."), self.artifact, self.version)
        return folder / f"{self.artifact}-{self.version}.jar"

    def is_in(self, cache: Path) -> bool:
        """Whether the cache holds it, whole and unaltered."""
        path = self.path(cache)
        return path.is_file() and path.stat().st_size == self.size and sha256_of(path) == self.sha256


def sha256_of(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pinned_jars() -> tuple[Jar, ...]:
    """The jars of the Kafka version that this package runs."""
    lines = Path(__file__).with_name("kafka_jars.txt").read_text().splitlines()
    return tuple(_parse(line) for line in lines if line and not line.startswith("#"))


def _parse(line: str) -> Jar:
    coordinate, sha256, size = line.split()
    group, artifact, version = coordinate.split(":")
    return Jar(group=group, artifact=artifact, version=version, sha256=sha256, size=int(size))


def cache_folder(env: Mapping[str, str] = os.environ) -> Path:
    """Where fetched jars are kept: `SENSOR_PIPELINE_CACHE`, or this user's cache."""
    import platformdirs

    named = env.get("SENSOR_PIPELINE_CACHE", "")
    return (Path(named) if named else Path(platformdirs.user_cache_dir("sensor-pipeline"))).absolute() / "maven"


def fetch(jars: Sequence[Jar], cache: Path, progress: Progress | None = None) -> list[Path]:
    """The jars' paths in `cache`, each fetched if it is missing or altered, and verified.

    Needs no network when all are there.

    Raises:
        UnavailableError: Maven Central cannot be reached, or sends other bytes than those pinned.
        ConfigurationError: the cache cannot be written.
    """
    check_installed()
    from filelock import FileLock

    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Two that start at once would write the same files.
        with FileLock(cache / ".lock"), ThreadPoolExecutor(THREADS) as pool:
            held = pool.map(lambda jar: jar.is_in(cache), jars)
            missing = [jar for jar, is_held in zip(jars, held, strict=True) if not is_held]
            _Download(missing, cache, progress).run(pool)
    except OSError as error:
        raise ConfigurationError(
            f"cannot keep Kafka's jars in {cache} ({error.strerror or error}): make room or make it writable, "
            "or set SENSOR_PIPELINE_CACHE to another folder"
        ) from error
    return [jar.path(cache) for jar in jars]


class _OverError(Exception):
    """Ends a thread whose jar is no longer wanted."""


class _Download:
    """Fetches jars by jgo and counts the bytes of all of them together."""

    def __init__(self, jars: Sequence[Jar], cache: Path, progress: Progress | None) -> None:
        self._jars = jars
        self._cache = cache
        self._progress = progress or (lambda done, total: None)
        self._total = sum(jar.size for jar in jars)
        self._done: dict[str, int] = {}
        self._lock = Lock()
        self._is_over = False

    def run(self, pool: ThreadPoolExecutor) -> None:
        futures = [pool.submit(self._fetch, jar) for jar in self._jars]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # after the first failure, or Ctrl-C, nothing more is fetched
            self._is_over = True
            pool.shutdown(cancel_futures=True)
        errors = (future.exception() for future in futures if not future.cancelled())
        for error in errors:
            if error and not isinstance(error, _OverError):
                raise error

    def _fetch(self, jar: Jar) -> None:
        problem = ""
        for _ in range(ATTEMPTS):
            if self._is_over:
                raise _OverError
            # jgo trusts whatever lies in its cache, half a file too.
            jar.path(self._cache).unlink(missing_ok=True)
            problem = self._try(jar)
            if not problem:
                return
        raise UnavailableError(
            f"cannot fetch {jar.coordinate} for the embedded Kafka ({ATTEMPTS} attempts; the last one: {problem}). "
            "Check the network and HTTPS_PROXY and try again, or set KAFKA_BOOTSTRAP_SERVERS to a broker of your own"
        )

    def _try(self, jar: Jar) -> str:
        """Fetch once; what went wrong, or nothing."""
        import requests

        try:
            self._resolve(jar)
        except requests.RequestException as error:
            return f"Maven Central does not answer, {type(error).__name__}"
        except RuntimeError:  # jgo's word for any answer but 200
            return "Maven Central does not hand it out"
        if jar.is_in(self._cache):
            return ""
        found = sha256_of(jar.path(self._cache))
        jar.path(self._cache).unlink()
        return f"its SHA-256 is {found}, not {jar.sha256} as pinned"

    def _resolve(self, jar: Jar) -> None:
        from jgo.maven import MavenContext, PythonResolver

        @contextmanager
        def count(filename: str, size: int) -> Iterator[Callable[[int], None]]:
            self._done[filename] = 0
            yield lambda more: self._add(filename, more)

        context = MavenContext(
            repo_cache=self._cache, timeout=TIMEOUT_SECONDS, resolver=PythonResolver(progress_callback=count)
        )
        context.project(jar.group, jar.artifact).at_version(jar.version).artifact().resolve()

    def _add(self, filename: str, more: int) -> None:
        if self._is_over:
            raise _OverError
        with self._lock:
            self._done[filename] += more
            self._progress(sum(self._done.values()), self._total)


def resolve(kafka_version: str) -> list[Jar]:
    """What a Kafka version needs at run time, as Maven resolves it, in order of coordinate.

    Fetches every jar, into a folder that is thrown away.
    """
    from jgo.maven import MavenContext

    with tempfile.TemporaryDirectory() as folder:
        context = MavenContext(repo_cache=Path(folder), timeout=TIMEOUT_SECONDS)
        kafka = context.create_dependency(":".join((*KAFKA_PROJECT, kafka_version)))
        _, nodes = context.resolver.get_dependency_list([kafka])
        artifacts: list[Any] = [kafka.artifact, *(node.dep.artifact for node in nodes)]
        slf4j = next(artifact.version for artifact in artifacts if artifact.artifactId == "slf4j-api")
        artifacts.append(context.project(*LOGGER_PROJECT).at_version(slf4j).artifact())
        return sorted((_pin(artifact) for artifact in artifacts), key=lambda jar: jar.coordinate)


def _pin(artifact: Any) -> Jar:
    path = artifact.resolve()
    return Jar(
        group=artifact.groupId,
        artifact=artifact.artifactId,
        version=artifact.version,
        sha256=sha256_of(path),
        size=path.stat().st_size,
    )


def _main() -> None:
    version = sys.argv[1]
    lines = [f"{jar.coordinate} {jar.sha256} {jar.size}\n" for jar in resolve(version)]
    header = (
        f"# Apache Kafka {version}: group:artifact:version, SHA-256, bytes.\n"
        f"# Made by: python -m sensor_pipeline.embedded.jars {version}\n"
    )
    sys.stdout.write(header + "".join(lines))


if __name__ == "__main__":
    _main()
