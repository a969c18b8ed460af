"""Parity of every model with every plan forced in turn, on 2, 3 and 4 ranks: `make all-plans`, about 10 minutes.

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

from triton_sp.testing import RankPool

# Norms and rotations of a replicated tower round each rank's gradient to float32 before these are added.
REPLICATED = 1e-6


def main() -> int:
    pool, failures = RankPool(), []
    cases = [
        (case, plan, size)
        for case in zoo.CASES.values()
        for plan in ("heads", "segments", "replicate")
        for size in (2, 3, 4)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for case, plan, size in tqdm([item for item in cases if item[2] in item[0].ranks]):
            asked = [replace(p, config=replace(p.config, plan=plan)) for p in plans(case, size)]
            references = {batch: Path(folder) / f"{case.name}-{batch}" for batch in case.batches}
            for batch, path in references.items():
                if not path.exists():
                    parity.write_reference(case, batch, path)
            tolerance = parity.TOLERANCE[case.dtype]
            try:
                for result in chain(*pool.run(parity.run_all, case.name, asked, references, ranks=size)):
                    result.assert_within(max(tolerance, REPLICATED if plan == "replicate" else 0.0))
            except AssertionError as error:
                failures.append(f"{case.name}, {plan}, {size} ranks: {error}")
    pool.close()
    print("\n".join(failures) or "OK: every model, every plan, 2, 3 and 4 ranks")
    return len(failures)


if __name__ == "__main__":
    sys.exit(main())
