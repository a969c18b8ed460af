"""What `triton-sp env` prints: what a report of a problem needs to say about this machine, to be pasted as it is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from triton_sp import cache
from triton_sp._version import __version__
from triton_sp.errors import SPError
from triton_sp.ops.dispatch import HAS_TRITON, implementation
from triton_sp.ranks.groups import backends

PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "accelerate", "peft", "trl", "deepspeed"),
    *("liger-kernel", "flash-attn", "flash-attn-4", "nvidia-nccl-cu12", "nvidia-nccl-cu13"),
)
VARIABLES = ("TRITON_SP", "TRITON_INTERPRET", "NCCL_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_")


def report() -> str:
    """The report, as lines `what: found`.

    >>> print(report().splitlines()[0].split()[0])
    triton_sp:
    """
    lines = [("triton_sp", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    lines += [(name, _version(name)) for name in PACKAGES]
    lines += [("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}")]
    lines += [*_gpus(), *_communication(), *_attention(), *_calibration()]
    lines += [(name, value) for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)]
    return "\n".join(f"{name}: {value}" for name, value in lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> Iterator[tuple[str, str]]:
    """Each GPU, which can write to which, and how the machine links them."""
    yield "cuda", f"{torch.version.cuda or 'none'}, hip {torch.version.hip or 'none'}"
    count = torch.cuda.device_count()
    if not count:
        yield "gpus", "none that PyTorch sees"
    for index in range(count):
        found = torch.cuda.get_device_properties(index)
        yield f"gpu {index}", f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.1f} GiB"
    if count > 1:
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        direct = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
        yield "peer access", f"{direct} of {len(pairs)} pairs"
    if count and shutil.which("nvidia-smi"):
        yield "links", "\n" + _output("nvidia-smi", "topo", "-m")


def _communication() -> Iterator[tuple[str, str]]:
    found = backends()
    yield "backends", ", ".join(found) or "none"
    if "nccl" in found:
        from torch.cuda import nccl

        yield "nccl", ".".join(map(str, nccl.version()))


def _attention() -> Iterator[tuple[str, str]]:
    """What computes attention here, and why nothing faster does."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        try:
            yield f"attention on {device}", implementation(device)
        except SPError as error:  # the kernels have failed their self-check
            yield f"attention on {device}", str(error)
    if not HAS_TRITON:
        yield "why not Triton", "it is not installed"
        return
    yield "ptxas", _ptxas()
    from triton_sp.kernels.hopper import gate

    yield "verdict of the Gluon tier", gate.verdict("cuda" if torch.cuda.is_available() else "cpu").reason or "passed"


def _ptxas() -> str:
    """The assembler that Triton uses: the one that an environment variable names, or that came with it."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    own = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    path = os.environ.get("TRITON_PTXAS_PATH") or str(own)
    return f"{path}, {_output(path, '--version').splitlines()[-1]}" if Path(path).exists() else f"none at {path}"


def _output(*command: str) -> str:
    """What a command prints, or why it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout or done.stderr).strip() or f"exit code {done.returncode}"


def _calibration() -> Iterator[tuple[str, str]]:
    """What is kept in the cache folder of this machine: measured links, chosen kernels, verdicts."""
    folder = cache.cache_file("link").parent
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        yield "calibration", f"none in {folder}; triton-sp calibrate measures the links of this machine"
    for file in files:
        try:
            yield file.name, json.dumps(cache.load(file))[:500]
        except (OSError, ValueError) as error:
            yield file.name, f"cannot be read: {error}"
