"""Who runs PostgreSQL where we are root, as which it refuses to run, and how that user gets at its files."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sensor_pipeline.errors import ConfigurationError

# The first that this machine has; nobody is on every machine, so that no user has to be made.
UNPRIVILEGED_USERS = ("postgres", "nobody")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The system user that a process runs as."""

    uid: int
    gid: int


def owner_of(data: Path) -> Owner | None:
    """Who must run the server of this data directory (which need not be there yet): None for ourselves.

    Raises:
        ConfigurationError: the data are another user's, or there is no user without rights.
    """
    made_by = data.stat().st_uid if data.exists() else None
    if os.geteuid() != 0:
        if made_by not in (None, os.geteuid()):
            raise ConfigurationError(f"{data} belongs to another user: run as that user, or use another --data-dir")
        return None
    for user in (made_by, *UNPRIVILEGED_USERS):
        entry = _entry(user)
        if entry and entry.pw_uid != 0:
            return Owner(uid=entry.pw_uid, gid=entry.pw_gid)
    raise ConfigurationError(
        f"PostgreSQL does not run as root, and there is no user {' or '.join(UNPRIVILEGED_USERS)}: "
        "run as another user, or set POSTGRES_HOST to a server of your own"
    )


def let_pass(paths: Iterable[Path]) -> None:
    """Let any user reach these folders by name: the right to pass through is added where it is missing."""
    for path in paths:
        for folder in (path, *path.parents):
            _add(folder, stat.S_IXOTH)


def let_read(tree: Path) -> None:
    """Let any user read and execute what its owner can (pip keeps others out under a strict umask)."""
    for path in (tree, *tree.rglob("*")):
        mode = path.stat().st_mode
        _add(path, (mode & (stat.S_IRUSR | stat.S_IXUSR)) >> 6)


def _add(path: Path, rights: int) -> None:
    mode = path.stat().st_mode
    if mode | rights != mode:
        path.chmod(mode | rights)


def _entry(user: int | str | None) -> pwd.struct_passwd | None:
    try:
        if user is None:
            return None
        return pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
    except KeyError:
        return None
