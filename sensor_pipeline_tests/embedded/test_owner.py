from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sensor_pipeline.embedded.owner import let_pass, let_read, owner_of
from sensor_pipeline.errors import ConfigurationError


def rights(path: Path) -> str:
    return stat.filemode(path.stat().st_mode)


def test_passing_through_is_allowed_and_nothing_more(tmp_path: Path) -> None:
    inner = tmp_path / "home" / "data"
    inner.mkdir(parents=True)
    (tmp_path / "home").chmod(0o700)
    inner.chmod(0o700)
    let_pass([inner])
    assert [rights(inner), rights(inner.parent)] == ["drwx-----x", "drwx-----x"]


def test_a_tree_that_was_made_under_a_strict_umask_can_be_read_but_not_written(tmp_path: Path) -> None:
    program, text = tmp_path / "program", tmp_path / "text"
    for path, mode in ((program, 0o700), (text, 0o600), (tmp_path, 0o700)):
        path.exists() or path.touch()
        path.chmod(mode)
    let_read(tmp_path)
    assert [rights(tmp_path), rights(program), rights(text)] == ["drwx---r-x", "-rwx---r-x", "-rw----r--"]


def test_an_ordinary_user_runs_it_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid or 1000)
    assert owner_of(tmp_path / "not there yet") is None


def test_an_ordinary_user_is_refused_another_users_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ConfigurationError, match=f"{tmp_path} belongs to another user"):
        owner_of(tmp_path)


def test_root_leaves_it_to_a_user_without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    owner = owner_of(tmp_path / "not there yet")
    assert owner is not None
    assert owner.uid != 0
