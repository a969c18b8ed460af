"""The command `triton-sp`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from triton_sp import comm, cost
from triton_sp.calibrate import measure_link


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point.

    >>> main(["--help"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    parser = argparse.ArgumentParser(prog="triton-sp", description="sequence-parallel training of Hugging Face models")
    commands = parser.add_subparsers(dest="command", required=True)
    calibrate = commands.add_parser(
        "calibrate",
        help="measure latency, bandwidth and speed of a group on this machine and keep them for the planner",
        description="Starts its own ranks, or measures those it is started on: torchrun ... -m triton_sp.cli calibrate",
    )
    calibrate.add_argument("--ranks", type=int, help="ranks of a group; default: the GPUs, or 2 without one")
    parsed = parser.parse_args(arguments)
    if "RANK" in os.environ:
        _calibrate()
    else:
        ranks = parsed.ranks or max(torch.cuda.device_count(), 0) or 2
        comm.start_ranks(ranks, "triton_sp.cli", "calibrate")


def _calibrate() -> None:
    """On every rank: measure together; the first of each machine stores the result."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    group = comm.join_world(device)
    link = measure_link(group, device)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        file = cost.store_link(link, device.type, group.size)
        print(
            f"{group.size} ranks on {device.type}: latency {link.latency * 1e6:.0f} us, "
            f"bandwidth {link.bandwidth / 1e9:.2f} GB/s, compute {link.compute / 1e12:.3g} TFLOP/s -> {file}"
        )
    comm.leave_world()


if __name__ == "__main__":
    main(sys.argv[1:])
