"""`make versions`: parity with other versions of transformers, and of torch, into `tests/data/versions.csv`.

Each version is laid over the environment, in a folder of its own, so that torch is there once. "5.24.0/2.14.1" is a
version of transformers with one of torch, which comes with gigabytes of CUDA. What a version does not have is left out,
as `kit/zoo.py` says.
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
VERSIONS = ("4.57.6", "5.5.4", "5.6.2", "5.10.4", "5.16.1", "5.17.0", "5.19.0", "5.24.0")
FILES = ("tests/promises/test_parity.py", "tests/wrappers/test_special.py", "tests/wrappers/test_hybrids.py")
# One of each kind of tower, fusion, decoder and recurrence, on 2 ranks.
CASES = ("qwen2_5_vl-2", "qwen3_vl-2", "llava-2", "gemma3-2", "idefics2-2", "vit-2", "llama-2", "mistral-2", "gpt2",
         "deepseek_v3_5", "llama4_text", "gemma4", "qwen3_5-2", "lfm2-4")  # fmt: skip


def overlay(version: str, folder: Path) -> Path:
    """The folder that has this version and what it needs beside torch."""
    transformers, _, torch = version.partition("/")
    path = folder / version.replace("/", "-torch-")
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(path)]
        subprocess.run([*pip, f"transformers=={transformers}", *([f"torch=={torch}"] if torch else [])], check=True)
    return path


def run(version: str, folder: Path) -> dict[str, Any]:
    """A row of the table."""
    path = overlay(version, folder)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    report = path.with_name(f"{path.name}.xml")
    chosen = "test_parity and (" + " or ".join(CASES) + ")"
    command = [sys.executable, "-m", "pytest", "-q", *FILES, "-k", chosen, f"--junitxml={report}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=False)
    ask = [sys.executable, "-c", "import torch; print(torch.__version__.split('+')[0])"]
    torch = subprocess.run(ask, env=environment, check=True, capture_output=True, text=True).stdout.strip()
    tests = list(ElementTree.parse(report).getroot().iter("testcase"))
    reasons = {test.get("name", "").removeprefix("test_parity"): reason(test) for test in tests}
    refused = [name for name, text in reasons.items() if "UnsupportedModelError" in text]
    failed = [name for name, text in reasons.items() if text and name not in refused]
    row = (
        version.partition("/")[0],
        torch,
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
    rows: dict[tuple[tuple[int, ...], ...], dict[str, Any]] = {}
    if TABLE.exists():
        with TABLE.open() as file:
            rows |= {key_of(row): row for row in csv.DictReader(file)}
    failed = False
    for version in versions:
        row = run(version, folder)
        rows[key_of(row)] = row
        failed |= bool(row["failed"]) or not row["passed"]
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[key] for key in sorted(rows))
    return failed


def key_of(row: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    """The versions of a row, as numbers."""
    return tuple(tuple(map(int, row[name].split("."))) for name in FIELDS[:2])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(VERSIONS), Path(os.environ.get("VERSIONS", ROOT / ".versions"))))
