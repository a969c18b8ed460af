"""The Trainer's jobs and the examples have what these need too."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / "engines"), str(ROOT / "examples")]
