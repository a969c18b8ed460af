"""What was found out about this machine, kept from one process to the next: small JSON files in a cache folder.

The folder is `$XDG_CACHE_HOME/triton_sp`, or `~/.cache/triton_sp`; without a home directory it is one of this user's
among the temporary files. A file is replaced whole, so a process that reads while another writes finds the old content
or the new one. Only this user can read it; one that another user owns is passed over. Nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LARGEST = 1 << 20  # bytes


def cache_file(name: str) -> Path:
    """The file of that name, there or not.

    >>> cache_file("link-cpu-2").name
    'link-cpu-2.json'
    """
    home = os.environ.get("XDG_CACHE_HOME") or _home()
    return Path(home) / "triton_sp" / f"{name}.json"


def file_for(kind: str, where: Mapping[str, str]) -> Path:
    """The file of what was found out under these circumstances, there or not: others have another file.

    >>> file_for("portable", {"gpu": "H200"}) == file_for("portable", {"gpu": "H100"})
    False
    """
    digest = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()
    return cache_file(f"{kind}-{digest[:16]}")


def _home() -> Path:
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # no $HOME, and nobody of that number in /etc/passwd
        return Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"


def load(path: Path) -> Any:
    """What a file holds.

    Raises:
        FileNotFoundError: there is none of this user's. OSError, ValueError: it cannot be read, is not JSON, or is
            larger than 1 MiB.
    """
    with open(path, "rb") as file:
        owner = os.fstat(file.fileno()).st_uid
        if owner != os.getuid():
            warnings.warn(f"{path} is passed over: user {owner} owns it", stacklevel=2)
            raise FileNotFoundError(path)
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"more than {_LARGEST} bytes")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("lists in lists without end") from error


def store(path: Path, content: Any) -> Path:
    """Write a file, making its folder if need be, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:  # of mode 0600
        try:
            json.dump(content, file, indent=1)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path
