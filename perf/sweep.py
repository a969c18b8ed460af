"""The front of all measurements: `python -m perf.sweep NAME`, or from anywhere `triton-sp sweep NAME`.

Each sweep writes perf/results/<device>/<sweep>.csv, a row at a time, in the schema of rows.py. A sweep that is started
again goes on where it stopped; `--fresh` begins anew, `--quick` tries everything out on small cases.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Sequence

import torch

from perf.contest import Settings

SWEEPS = {
    "kernels": "attend, pack and unpack beside their peers, on one device",
    "exchange": "an attention layer on 1, 2 and 4 ranks, beside DeepSpeed's",
    "model": "whole models on 1, 2 and 4 ranks, beside DeepSpeed AutoSP and ALST",
    "fuse": "features on their way from tower to language model, routed and by gather-then-slice",
    "agree": "what comparing the ranks, and verifying a layer, cost a step",
    "scale": "what attention sends on 8, 64 and 1024 GPUs, by formula",
    "end_to_end": "steps of a few layers with what computes attention swapped, and a profile of each",
    "host": "what an attention layer and a whole forward cost the host, with launches and exchanges stubbed",
    "plan": "what it costs the host to plan a batch of a million tokens",
    "single_rank": "one rank of 8 of an 8B model on 1M visual tokens: its memory, its time",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code of the sweep."""
    listed = "\n".join(f"  {name:12} {text}" for name, text in SWEEPS.items())
    parser = argparse.ArgumentParser(
        "perf.sweep", description=f"{__doc__}\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", choices=list(SWEEPS))
    parser.add_argument("--quick", action="store_true", help="few small cases, into results/<device>/quick/")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no case after that")
    parser.add_argument("--slow", action="store_true", help="also peers that compile for many seconds a case")
    parser.add_argument("--part", choices=["headline", "packs", "rest"], default="", help="of the sweep kernels")
    parsed = parser.parse_args(arguments)
    device = torch.device(parsed.device)
    settings = Settings(device, parsed.quick, parsed.fresh, parsed.budget, parsed.slow, parsed.part)
    if device.type == "cpu":
        torch.set_num_threads(1)  # so that CPU time is time
    return importlib.import_module(f"perf.{parsed.sweep}").sweep(settings)


if __name__ == "__main__":
    sys.exit(main())
