"""Parity of every model with every plan forced in turn, on 2, 3 and 4 ranks: `make all-plans`, two hours on 2 cores
beside much other work. `make all-plans ARGS=0` (1, 2) is a third: each model with each plan, on one number of ranks.

tests/plan/test_plans.py runs a few models of each kind on every change; this is the whole product.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from itertools import chain
from pathlib import Path

from kit import parity, zoo
from test_parity import plans
from tqdm import tqdm

from triton_sp.testing import RankError, RankPool

# Norms and rotations of a replicated tower round each rank's gradient to float32 before these are added.
REPLICATED = 1e-6


def main(arguments: list[str]) -> int:
    pool, failures = RankPool(), []
    thirds = [int(x) for x in arguments] or [0, 1, 2]
    cases = [
        (case, plan, size)
        for i, case in enumerate(zoo.CASES.values())
        for j, plan in enumerate(("heads", "segments", "replicate"))
        for size in (2, 3, 4)
        if (i + j + size) % 3 in thirds
    ]
    cases = [item for item in cases if item[2] in item[0].ranks]
    with tempfile.TemporaryDirectory() as folder:
        for case, plan, size in tqdm(cases):
            asked = [replace(p, config=replace(p.config, plan=plan)) for p in plans(case, size)]
            references = {batch: Path(folder) / f"{case.name}-{batch}" for batch in case.batches}
            for batch, path in references.items():
                if not path.exists():
                    parity.write_reference(case, batch, path)
            tolerance = parity.TOLERANCE[case.dtype]
            try:
                found = pool.run(parity.run_all, case.name, asked, references, ranks=size, timeout=1800.0)
                for result in chain(*found):
                    result.assert_within(max(tolerance, REPLICATED if plan == "replicate" else 0.0))
            except (AssertionError, RankError) as error:
                failures.append(f"{case.name}, {plan}, {size} ranks: {error}")
                tqdm.write(failures[-1])
    pool.close()
    print(f"{len(failures)} of {len(cases)} failed, of every model with every plan on 2, 3 and 4 ranks, part {thirds}")
    return len(failures)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
