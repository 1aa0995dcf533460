"""Whether code from the coordinator is kept away from the data: users, owners, modes.

Flower runs whatever Python the coordinator's bundle holds, as the *node's* user.  The data, the
policy and the trainer belong to another user.  Then the bundle reaches the data only through the
trainer's socket, and the policy is enforced.  Where any of this does not hold, the policy is
*advisory*: it binds an honest bundle only.

What is looked at are owners and mode bits, along the whole path.  Access control lists, mounts and
what else the node's user may do (``sudo``, containers, debuggers) are not seen.
"""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clients.site import Home, SiteSettings
from fedalign.errors import ConfigError


@dataclass(frozen=True)
class Account:
    """An OS user, with or without an entry in the user database."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str


def account(text: str) -> Account:
    """Return the user named or numbered ``text``.

    A number without an entry has the group of the same number and ``/`` as home.  Raises
    ``ConfigError`` for a name that does not exist.
    """
    try:
        entry = pwd.getpwuid(int(text)) if text.isdecimal() else pwd.getpwnam(text)
    except KeyError:
        if text.isdecimal():
            return Account(int(text), int(text), (int(text),), text, "/")
        raise ConfigError(
            f"there is no user '{text}'. Make one (useradd --system {text}), or give a number."
        ) from None
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return Account(entry.pw_uid, entry.pw_gid, groups, entry.pw_name, entry.pw_dir)


def cannot_run(user: Account) -> str:
    """Say why a user cannot run this Python and fedalign; empty where it can.  Needs root.

    A virtual environment often points to a Python in somebody's home.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", "import fedalign, clients"],
            user=user.uid,
            group=user.gid,
            extra_groups=user.groups,
            cwd="/",
            env={"PATH": os.defpath},
            capture_output=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = error.strerror if isinstance(error, OSError) else "no answer within 60 s"
    else:
        if not done.returncode:
            return ""
        why = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason"])[-1]
    return (
        f"user {user.name} cannot run {Path(sys.executable).resolve()} with fedalign ({why}). "
        "Install both where every user may read them, for instance: "
        "/usr/bin/python3 -m venv /opt/fedalign"
    )


def data_files(settings: SiteSettings) -> list[Path]:
    """Return the files of the site's data; none for a source that is not on this machine."""
    path = Path(settings.data.path)
    if settings.data.source == "hf" or not path.exists():
        return []
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def problems(home: Home, settings: SiteSettings, trainer: int, node: int) -> list[str]:
    """Return why the policy is advisory, one sentence each; empty where it is enforced.

    Args:
        home: the site's folder.
        settings: tells where the data are.
        trainer: uid of the trainer.
        node: uid that the bundle runs as.
    """
    found: list[str] = []
    if trainer == node:
        found.append(
            f"the trainer and the node run as the same user ({_user(node)}): code from the "
            "coordinator can read the data and change the policy. Start as root with "
            "--trainer-user and --node-user."
        )
    if node == 0:
        found.append("the node runs as root, which can read everything. Give --node-user.")
    for path in data_files(settings):
        found += _private(path, trainer)
    if not data_files(settings) and settings.data.source == "hf":
        found.append(
            f"the data come from the hub ({settings.data.path}); whether its cache on this machine "
            "is private is not looked at. Keep private data in a file of the trainer's user."
        )
    for path in (home.settings, home.policy, home.trainer):
        found += _private(path, trainer) if path.exists() else []
    for place in (home.path, *home.path.parents):
        if _can_write(place, node) and node != trainer:
            found.append(
                f"{place} can be changed by the node's user, who could put another folder in the "
                "place of the trainer's. Its owner must be root or the trainer's user, mode 0711."
            )
    for place in (Path(__file__).parent, Path(sys.prefix)):
        if _can_write(place, node) and node != trainer:
            found.append(f"{place}: the node's user can change the code that the trainer runs.")
    return found


def _private(path: Path, owner: int) -> Iterator[str]:
    """Yield what lets others than ``owner`` and root read a file or folder."""
    state = path.stat()
    if state.st_uid not in (owner, 0):
        yield (
            f"{path} belongs to {_user(state.st_uid)}, not to the trainer's user "
            f"({_user(owner)}). Change its owner (chown)."
        )
    elif readable_by_others(path):
        yield (
            f"{path} can be read by others (mode {stat.S_IMODE(state.st_mode):04o}). Take it from "
            f"them: chmod go= {path}"
        )


def readable_by_others(path: Path) -> bool:
    """Say whether mode bits let anybody but the owner reach and read a file or folder."""
    real = path.resolve()
    if not real.stat().st_mode & 0o044:
        return False
    return all(parent.stat().st_mode & 0o011 for parent in real.parents)


def _can_write(path: Path, uid: int) -> bool:
    """Say whether a user can add, remove and rename entries of a folder."""
    if uid == 0:
        return False  # said once, not for every folder
    state = path.stat()
    if state.st_uid == uid:
        return True
    if state.st_mode & stat.S_ISVTX:
        return False
    if state.st_mode & 0o002:
        return True
    return bool(state.st_mode & 0o020) and state.st_gid in account(str(uid)).groups


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name}, {uid}"
    except KeyError:
        return str(uid)
