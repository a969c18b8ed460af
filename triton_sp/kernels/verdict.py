"""What self-checks have found out about this machine, kept from one process to the next.

A verdict holds for a GPU, its driver, Triton, the assembler that Triton uses, launches that were tuned, and the source
of the kernels: a change in any of these is another file, and calls for a new check. All ranks of a machine find the
same answer. A file that is not a verdict in every part counts as none.
"""

import hashlib
import importlib
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from triton_sp import cache
from triton_sp._version import __version__
from triton_sp.kernels import launch


class Verdict(NamedTuple):
    """Whether kernels may run on a machine, why (not), and how many seconds it took to find out."""

    passed: bool
    reason: str
    seconds: float = 0.0


def machine(index: int, sources: Sequence[str]) -> dict[str, str]:
    """What a verdict on GPU number `index` holds for; `sources` are files below triton_sp/kernels."""
    here = pathlib.Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / name).read_bytes() for name in sources))
    return {
        "gpu": torch.cuda.get_device_name(index),
        "driver": driver(),
        "triton": triton.__version__,
        "assembler": assembler(torch.cuda.get_device_capability(index)),
        "tuned": json.dumps(launch.tuned(), sort_keys=True),
        "triton_sp": __version__,
        "kernel": digest.hexdigest()[:16],
    }


def driver() -> str:
    """The version of the NVIDIA driver; where /proc does not tell, that of the CUDA it brings; on AMD, of HIP."""
    if torch.version.hip is not None:
        return f"HIP {torch.version.hip}"
    try:
        return pathlib.Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return f"CUDA {torch._C._cuda_getDriverVersion()}"


def assembler(capability: tuple[int, int]) -> str:
    """The release of ptxas that Triton assembles with for a chip, and where it lies; for AMD's chips there is none.

    Releases differ in results: from one PTX, 12.8 has made wrong numbers and 13.1 right ones
    (flash-linear-attention PR 1262).
    """
    if torch.version.hip is not None:
        return "LLVM of Triton"
    tool = importlib.import_module("triton.backends.nvidia.compiler").get_ptxas(10 * capability[0] + capability[1])
    return f"ptxas {tool.version}, {tool.path}"


def read(kind: str, where: dict[str, str]) -> Verdict | None:
    """The recorded verdict of a kind ("portable", "gluon"), or None."""
    try:
        record = cache.load(cache.file_for(kind, where))
        fits = record["machine"] == where and type(record["passed"]) is bool and isinstance(record["reason"], str)
        return Verdict(record["passed"], record["reason"], float(record["seconds"])) if fits else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(kind: str, where: dict[str, str], found: Verdict) -> pathlib.Path:
    """Record a verdict, and say where."""
    return cache.store(cache.file_for(kind, where), {"machine": where, **found._asdict()})
