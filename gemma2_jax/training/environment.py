"""What a run ran with, in WORKDIR/environment.json: an entry for each start of it, by process 0.

An entry has the versions of the packages that compute, the devices and their driver, the host, the commit of the code,
the command and the time. It has no variables of the environment, and of URLs in the command neither password nor query.
"""

import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from gemma2_jax.cluster import platforms

_COMPUTING = "jax jaxlib jax-cuda12-plugin jax-cuda13-plugin flax optax orbax-checkpoint grain transformers numpy"
PACKAGES = ("gemma2-jax", *_COMPUTING.split())
_GIT_SECONDS = 10  # that Git may take on a slow disk


def record_start(workdir: Path, step: int) -> None:
    """Adds this start, from `step` on, to WORKDIR/environment.json. Every process calls it, and process 0 writes."""
    if jax.process_index() != 0:
        return
    path = workdir / "environment.json"
    entries = [*_read_entries(path), describe_environment(step)]
    complete = path.with_suffix(".tmp")
    complete.write_text(json.dumps(entries, indent=1) + "\n")
    complete.replace(path)


def _read_entries(path: Path) -> list[dict[str, Any]]:
    """The starts so far; none where somebody has made another file of it, as nothing depends on them."""
    try:
        entries = json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return []
    return entries if isinstance(entries, list) else []


def describe_environment(step: int) -> dict[str, Any]:
    """The entry of a start that goes on after `step`, as JSON."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": hide_secrets(shlex.join(sys.orig_argv)),
        "folder": str(Path.cwd()),
        "versions": {"python": platform.python_version()} | _find_versions(),
        "devices": dict(Counter(device.device_kind for device in jax.devices())),
        "processes": jax.process_count(),
        "backend": jax.devices()[0].client.platform_version,
        "driver": platforms.find_driver(),
        "host": socket.gethostname(),
        "system": f"{_find_distribution()}, {platform.platform()}",
        "cpus": os.cpu_count(),
        "commit": find_commit(Path(__file__)),
    }


def hide_secrets(text: str) -> str:
    """A text whose URLs have *** for a user's name and password, and for a query, which may be a signature."""
    text = re.sub(r"(\w://)[^/@\s'\"]+@", r"\1***@", text)
    return re.sub(r"(\w://[^\s?'\"]+\?)[^\s'\"]+", r"\1***", text)


def find_commit(file: Path) -> str | None:
    """The commit of the Git repository that a file is tracked in, ending in -dirty where files of it have been changed.

    None where it is in no repository, or there is no Git.
    """
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if _ask_git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None  # installed into an environment that lies in a repository of something else
    return _ask_git(file.parent, *describe)


def _ask_git(folder: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def _find_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # a plugin for other devices
    return versions


def _find_distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.system()
