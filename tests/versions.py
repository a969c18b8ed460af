"""`make versions`: parity with other versions of transformers, into `tests/data/versions.csv`.

Each version is laid over the environment, in a folder of its own, so that torch is there once. What a version does not
have is left out, as `kit/zoo.py` says.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests/data/versions.csv"
FIELDS = ("transformers", "torch", "passed", "refused", "failed")
VERSIONS = ("5.5.4", "5.6.2", "5.10.4", "5.16.1", "5.17.0", "5.19.0", "5.24.0")
FILES = ("tests/promises/test_parity.py", "tests/wrappers/test_special.py", "tests/wrappers/test_hybrids.py")
# One of each kind of tower, fusion, decoder and recurrence, on 2 ranks.
CASES = ("qwen2_5_vl-2", "qwen3_vl-2", "llava-2", "gemma3-2", "idefics2-2", "vit-2", "llama-2", "mistral-2", "gpt2",
         "deepseek_v3_5", "llama4_text", "gemma4", "qwen3_5-2", "lfm2-4")  # fmt: skip


def overlay(version: str, folder: Path) -> Path:
    """The folder that has this version and what it needs beside torch."""
    path = folder / version
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(path)]
        subprocess.run([*pip, f"transformers=={version}"], check=True)
    return path


def run(version: str, folder: Path) -> dict[str, Any]:
    """A row of the table."""
    paths = [str(overlay(version, folder)), str(ROOT)]
    report = folder / f"{version}.xml"
    chosen = "test_parity and (" + " or ".join(CASES) + ")"
    command = [sys.executable, "-m", "pytest", "-q", *FILES, "-k", chosen, f"--junitxml={report}"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=False)
    tests = list(ElementTree.parse(report).getroot().iter("testcase"))
    reasons = {test.get("name", "").removeprefix("test_parity"): reason(test) for test in tests}
    refused = [name for name, text in reasons.items() if "UnsupportedModelError" in text]
    failed = [name for name, text in reasons.items() if text and name not in refused]
    import torch

    row = (
        version,
        torch.__version__.split("+")[0],
        len(tests) - len(refused) - len(failed),
        *map(" ".join, (refused, failed)),
    )
    return dict(zip(FIELDS, row, strict=True))


def reason(test: ElementTree.Element) -> str:
    """Why a test has failed, or nothing."""
    found = [test.find(kind) for kind in ("failure", "error")]
    return "".join(f"{item.get('message')} {item.text}" for item in found if item is not None)


def main(versions: list[str], folder: Path) -> int:
    """Run these versions and put their rows in the table."""
    rows: dict[str, dict[str, Any]] = {}
    if TABLE.exists():
        with TABLE.open() as file:
            rows |= {row["transformers"]: row for row in csv.DictReader(file)}
    for version in versions:
        rows[version] = run(version, folder)
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[name] for name in sorted(rows, key=lambda name: [*map(int, name.split("."))]))
    return any(rows[version]["failed"] for version in versions)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(VERSIONS), Path(os.environ.get("VERSIONS", ROOT / ".versions"))))
