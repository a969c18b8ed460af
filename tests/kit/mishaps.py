"""What can happen to a rank: its process ends or stops, it raises, its memory or its network fails."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn


def strike(module: nn.Module, where: str, action: Callable[[], None]) -> None:
    """Let something happen whenever a step comes to a module, in the "forward" or the "backward"."""
    hook = module.register_forward_pre_hook if where == "forward" else module.register_full_backward_pre_hook
    hook(lambda *_: action())


def fail(error: BaseException) -> NoReturn:
    """Raise it."""
    raise error


def kill() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop(seconds: float | None = None) -> None:
    """Stop this process for good, or until another process wakes it."""
    if seconds is not None:
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def exhaust_memory() -> None:
    """Ask for more memory than there is: no more than this process has, and 64 MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (64 << 20)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        torch.zeros(1 << 28)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def cut_connections() -> None:
    """To every other process: as a network that fails."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue  # it listens only, or is gone
