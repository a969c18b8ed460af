"""`triton-sp`, on a rank, and afterwards in COUNTS/rank how many exchanges there were: the work was shared out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from triton_sp import cli
from triton_sp.ranks import collectives

if __name__ == "__main__":
    with collectives.record() as ledger:
        cli.main(sys.argv[1:])
    Path(os.environ["COUNTS"], os.environ["RANK"]).write_text(str(ledger.count("exchange")))
