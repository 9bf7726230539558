"""The system user an embedded server runs as when root starts it, and what that user must be able to reach."""

import os
import pwd
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from overtone.errors import EnvironmentProblemError
from overtone.logging import get_logger

NAMES = ("overtone", "postgres", "_postgres")
"""Users to run as, first found; the first is made if none exists."""

_log = get_logger()


@dataclass(frozen=True, slots=True)
class Account:
    """A user other than root."""

    name: str
    uid: int
    gid: int


def server_account(data_dir: Path) -> Account | None:
    """Whom to run the server of `data_dir` as; None if the present user will do, as any but root will.

    A data folder that exists already settles it: its owner.

    Raises:
        EnvironmentProblemError: there is no such user and none can be made.
    """
    if os.geteuid() != 0:
        return None
    if data_dir.exists() and data_dir.stat().st_uid != 0:
        owner = _lookup(data_dir.stat().st_uid)
        if owner:
            return owner
    return next((found for found in map(_lookup, NAMES) if found), None) or _make_account(NAMES[0])


def give(path: Path, account: Account | None) -> None:
    """Make `path` belong to `account`; nothing to do for None."""
    if account:
        os.chown(path, account.uid, account.gid)


def make_traversable(folder: Path, account: Account) -> None:
    """Let `account` pass through `folder` and the folders above it, changing only those where it cannot.

    Passing through means the execute bit alone: names inside stay unlisted.
    """
    for place in (folder, *folder.parents):
        mode = place.stat().st_mode
        if not _may(place, account, stat.S_IXUSR):
            _open(place, mode | stat.S_IXOTH, account)


def make_readable(tree: Path, account: Account) -> None:
    """Let `account` read everything under `tree` and run what its owner may run."""
    make_traversable(tree.parent, account)
    for place in (tree, *tree.rglob("*")):
        if place.is_symlink():
            continue
        mode = place.stat().st_mode
        needed = stat.S_IRUSR | (mode & stat.S_IXUSR)
        if not _may(place, account, needed):
            _open(place, mode | needed >> 6, account)


def _may(place: Path, account: Account, owner_bits: int) -> bool:
    found = place.stat()
    shift = 0 if found.st_uid == account.uid else 3 if found.st_gid == account.gid else 6
    return (found.st_mode << shift) & owner_bits == owner_bits


def _open(place: Path, mode: int, account: Account) -> None:
    try:
        place.chmod(stat.S_IMODE(mode))
    except OSError as error:
        raise EnvironmentProblemError(
            f"The database server runs as user {account.name}, which cannot reach {place}, and its mode cannot be"
            f" changed ({error.strerror}). Choose another OVERTONE_HOME, or set DATABASE_URL."
        ) from error
    _log.info("postgres.path_opened", path=str(place), mode=oct(stat.S_IMODE(mode)), user=account.name)


def _lookup(user: str | int) -> Account | None:
    try:
        entry = pwd.getpwnam(user) if isinstance(user, str) else pwd.getpwuid(user)
    except KeyError:
        return None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _make_account(name: str) -> Account:
    program = shutil.which("useradd", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program:
        command = [program, "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", name]
        done = subprocess.run(command, capture_output=True, check=False)
        found = _lookup(name)
        if found:
            _log.info("postgres.user_made", user=name)
            return found
        problem = f"useradd failed: {done.stderr.decode(errors='replace').strip()}"
    else:
        problem = "there is no useradd here"
    raise EnvironmentProblemError(
        f"PostgreSQL does not run as root, and no user {' or '.join(NAMES)} exists ({problem})."
        f" Run as another user, make the user {name}, or set DATABASE_URL."
    )
