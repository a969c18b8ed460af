"""The self-checks as a step of `make gpu`: what they find, and what they cost once a machine, as rows of kernels.csv.

Without a GPU the portable kernels are checked in Triton's interpreter, in fp32, on a few small cases.
"""

from __future__ import annotations

import sys
from unittest import mock

import torch

from perf.contest import Settings
from perf.rows import Row
from triton_sp.kernels import attend, attend_backward, check
from triton_sp.kernels.hopper import check as hopper
from triton_sp.kernels.hopper import gate
from triton_sp.kernels.verdict import Verdict

LENGTHS = (17, 0, 9, 5)  # for the interpreter


def verdicts() -> dict[str, Verdict]:
    """What the self-checks say, those that are possible here; they are recorded."""
    if torch.cuda.is_available():
        found = {"portable": check.run()}
        if gate.obstacle(0) or not found["portable"].passed:
            return found
        return found | {kind: hopper.run(0, kind) for kind in (gate.FORWARD, gate.BACKWARD)}
    few = [case for case in check.cases() if case.dim == 72]
    small = [c._replace(heads=c.heads // c.k_heads, k_heads=1, q=LENGTHS, k=LENGTHS, poisoned=3) for c in few]
    with mock.patch.object(check, "cases", lambda: small):
        return {"portable": check.check(torch.device("cpu"), attend.forward, attend_backward.backward, torch.float32)}


def main() -> int:
    """Entry point; 1 if one of them has failed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(device, quick=device.type == "cpu")
    found = verdicts()
    report = settings.report("kernels")
    for name, verdict in found.items():
        status = "ok" if verdict.passed else "wrong"
        row = Row("self-check", "triton_sp", name, "", status=status, note=verdict.reason, clock="wall")
        row.device, row.median_ms = settings.device.type, 1e3 * verdict.seconds
        report.add([row])
        print(f"{name}: {status} after {verdict.seconds:.1f} s: {verdict.reason}", flush=True)
    return int(not all(verdict.passed for verdict in found.values()))


if __name__ == "__main__":
    sys.exit(main())
