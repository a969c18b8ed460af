"""What was found out about this machine, kept from one process to the next: small JSON files in a cache folder.

The folder is `$XDG_CACHE_HOME/triton_sp`, or `~/.cache/triton_sp`. A file is replaced whole, so a process that reads
while another writes finds the old content or the new one. Nothing in a file is executed.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_file(name: str) -> Path:
    """The file of that name, there or not.

    >>> cache_file("link-cpu-2").name
    'link-cpu-2.json'
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "triton_sp" / f"{name}.json"


def load(path: Path) -> Any:
    """What a file holds.

    Raises:
        FileNotFoundError: there is none. OSError, ValueError: it cannot be read, or is not JSON.
    """
    return json.loads(path.read_text())


def store(path: Path, content: Any) -> Path:
    """Write a file, making its folder if need be, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)
    return path
