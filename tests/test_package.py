"""What people install: the wheel has every file of the library, and works beside torch alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import triton_sp

ROOT = Path(__file__).resolve().parent.parent
FILES = [file.relative_to(ROOT) for file in sorted((ROOT / "triton_sp").rglob("*.py"))]
MODULES = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in FILES]
KERNELS = "triton_sp.kernels"

# The installed package comes first, so that this checkout, which may be installed as well, is out of the way.
PROGRAM = """
import importlib, sys
installed, packages, missing, modules = sys.argv[1], sys.argv[2], sys.argv[3].split(), sys.argv[4].split()
sys.path[:0] = [installed, packages]
sys.modules.update(dict.fromkeys(missing))  # each import of them fails, as if they were not installed
for name in modules:
    assert importlib.import_module(name).__file__.startswith(installed), name
import torch, triton_sp
x = torch.ones(4, 2, 8)
mask = triton_sp.Mask(torch.tensor([0, 1, 4], dtype=torch.int32))
assert torch.allclose(triton_sp.varlen_attention(x, x, x, mask), x)
print(triton_sp.__version__, *[name for name in missing if sys.modules[name] is not None])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: what an earlier build has left in this checkout is not in it."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "triton_sp", folder / "source" / "triton_sp")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", folder / "source", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    pip("install", wheel, "--no-deps", "--no-compile", "--target", wheel.parent / "installed")
    return wheel.parent / "installed"


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--disable-pip-version-check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_wheel_has_every_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    about = f"triton_sp-{triton_sp.__version__}.dist-info"
    code = {name for name in names if name.startswith("triton_sp/")}
    assert code == {file.as_posix() for file in FILES} | {"triton_sp/py.typed"}
    assert f"{about}/licenses/LICENSE" in names


@pytest.mark.parametrize("missing", ["", "triton transformers accelerate liger_kernel"], ids=["full", "torch_alone"])
def test_installed_wheel_imports_and_attends(installed: Path, missing: str) -> None:
    """With all optional packages every module is imported, the kernels too; without, every one but the kernels."""
    if not missing and sys.platform != "linux":
        pytest.skip("Triton is built for Linux")
    modules = [name for name in MODULES if not missing or not name.startswith(KERNELS)]
    assert len(modules) > 40
    packages = Path(torch.__file__).parent.parent
    command = [sys.executable, "-I", "-c", PROGRAM, installed, packages, missing, " ".join(modules)]
    run = subprocess.run(list(map(str, command)), cwd=installed, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == [triton_sp.__version__]


def test_one_version() -> None:
    """`_version.py` says it; the wheel is named by it above, and the newest entry of the changelog is about it."""
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert newest.split()[1] == triton_sp.__version__
    others = [name for name in ("pyproject.toml", "CITATION.cff") if triton_sp.__version__ in (ROOT / name).read_text()]
    assert not others
