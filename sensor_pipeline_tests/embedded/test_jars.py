from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import pytest

from sensor_pipeline.embedded import jars
from sensor_pipeline.embedded.jars import Jar
from sensor_pipeline.errors import ConfigurationError, UnavailableError

CONTENT = b"a jar"


def jar(name: str = "thing", content: bytes = CONTENT) -> Jar:
    digest = hashlib.sha256(content).hexdigest()
    return Jar(group="org.example", artifact=name, version="1.0", sha256=digest, size=len(content))


class Central:
    """Maven Central as jgo would use it: each answer is bytes, or an exception."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: bytes | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []
        monkeypatch.setattr(jars._Download, "_resolve", lambda download, jar: self._resolve(download._cache, jar))

    def _resolve(self, cache: Path, jar: Jar) -> None:
        self.asked.append(jar.coordinate)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert not jar.path(cache).exists(), "jgo refuses to overwrite"
        jar.path(cache).parent.mkdir(parents=True, exist_ok=True)
        jar.path(cache).write_bytes(answer)


def test_a_missing_jar_is_fetched_and_then_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    central = Central(monkeypatch, CONTENT)
    [path] = jars.fetch([jar()], tmp_path)
    assert path.read_bytes() == CONTENT
    assert jars.fetch([jar()], tmp_path) == [path]
    assert len(central.asked) == 1


def test_an_altered_jar_in_the_cache_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Central(monkeypatch, CONTENT, CONTENT)
    [path] = jars.fetch([jar()], tmp_path)
    path.write_bytes(CONTENT[::-1])
    jars.fetch([jar()], tmp_path)
    assert path.read_bytes() == CONTENT


def test_a_jar_that_arrives_altered_is_fetched_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    central = Central(monkeypatch, b"half a", CONTENT)
    [path] = jars.fetch([jar()], tmp_path)
    assert path.read_bytes() == CONTENT
    assert len(central.asked) == 2


def test_a_jar_that_stays_altered_is_refused_by_name_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Central(monkeypatch, b"other", b"other")
    with pytest.raises(UnavailableError, match=r"org\.example:thing:1\.0 .*SHA-256 .* not .* as pinned"):
        jars.fetch([jar()], tmp_path)
    assert not jar().path(tmp_path).exists()


def test_without_a_network_one_line_says_what_was_tried_and_how_to_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(UnavailableError) as caught:
        jars.fetch([jar("one"), jar("two")], tmp_path)
    message = str(caught.value)
    assert "Maven Central does not answer" in message
    assert "KAFKA_BOOTSTRAP_SERVERS" in message
    assert "\n" not in message


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigurationError, match="SENSOR_PIPELINE_CACHE"):
        jars.fetch([jar()], blocked / "cache")


def test_the_cache_is_where_the_environment_says(tmp_path: Path) -> None:
    assert jars.cache_folder({"SENSOR_PIPELINE_CACHE": str(tmp_path)}) == tmp_path / "maven"


def test_every_pinned_jar_is_the_one_that_maven_central_hands_out_and_is_then_used_without_a_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned = jars.pinned_jars()
    jars.fetch(pinned, jars.cache_folder())
    monkeypatch.setattr(socket, "socket", None)
    paths = jars.fetch(pinned, jars.cache_folder())
    assert {path.name.rsplit("-", 1)[0] for path in paths} >= {"kafka_2.13", "kafka-clients", "slf4j-simple"}


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    smallest = min(jars.pinned_jars(), key=lambda jar: jar.size)
    seen: list[tuple[int, int]] = []
    jars.fetch([smallest], tmp_path, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (smallest.size, smallest.size)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
