"""The main job: train two vision-language models on photographs, on one process and sequence-parallel, and compare.

Run it with `make demo`, or `python examples/demo.py`. It starts 2 processes that talk through gloo on the CPU; where
there are several GPUs, one process a GPU (up to 4), and NCCL. Results are written to reports/.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
REPORTS = HERE.parent / "reports"


def main() -> int:
    """Start demo_train.py under torchrun, a process a rank, and report what the ranks found."""
    gpus = torch.cuda.device_count()
    ranks = 4 if gpus >= 4 else 2
    where = f"{ranks} GPUs, NCCL" if gpus >= ranks else f"{ranks} processes on the CPU, gloo"
    print(f"triton_sp demo: {where}. Each model is trained for a few steps twice: as it is, on one process, and")
    print(f"wrapped by triton_sp.wrap, each batch shared by {ranks} ranks. Both must compute the same.\n")
    print(
        "You will see what wrap does with each model, then losses and gradients side by side, the bytes that the ranks"
    )
    print(
        "exchange and the memory of activations, and at last OK, or what disagrees. It takes one to two minutes on two"
    )
    print("cores, of which the first seconds pass with imports.\n", flush=True)

    REPORTS.mkdir(exist_ok=True)
    csv = REPORTS / "demo.csv"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // ranks)), "TRANSFORMERS_VERBOSITY": "error"} | os.environ
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    code = subprocess.run([*torchrun, str(HERE / "demo_train.py"), str(csv)], env=environment).returncode
    if code:
        print("The ranks failed; their messages stand above.")
        return code

    from demo_report import report  # here, so that the ranks start without waiting for the plotting library

    return report(csv, REPORTS / "demo.png")


if __name__ == "__main__":
    sys.exit(main())
