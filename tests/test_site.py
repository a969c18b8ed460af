"""The site is built, strictly: no page, picture, heading or name of the library that a page refers to is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_docs import ROOT

import triton_sp
from triton_sp import errors


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True, timeout=200)
    return folder


def test_reference(site: Path) -> None:
    """Every public name has an entry, with its example set as code."""
    html = (site / "reference.html").read_text()
    names = [name for name in triton_sp.__all__ if name not in ("errors", "__version__")]
    assert not [name for name in names if f'id="triton_sp.{name}"' not in html]
    assert "&gt;&gt;&gt;" in html and "<blockquote>" not in html


def test_errors(site: Path) -> None:
    """Every kind of error is explained, and the table has what the code raises."""
    html = (site / "troubleshooting.html").read_text()
    kinds = [name for name, kind in vars(errors).items() if isinstance(kind, type) and name != "SPError"]
    assert not [kind for kind in kinds if f'id="{kind.lower()}"' not in html]
    assert "labels[attention_mask == 0] = -100" in html and html.count("<tr>") > 60


def test_pages(site: Path) -> None:
    """Every page of the navigation is there, and in llms.txt; a linked file of the repository is shown."""
    pages = re.findall(r": ([\w/-]+)\.md\n", (ROOT / "mkdocs.yml").read_text())
    assert len(pages) > 20
    known = (site / "llms.txt").read_text()
    assert not [page for page in pages if not (site / f"{page}.html").exists() or f"]({page}.html)" not in known]
    assert (site / "repository" / "triton_sp" / "stages.py.html").exists()


def test_examples_that_pages_show_exist() -> None:
    """mkdocs checks the files; here, that pages show every example of an engine."""
    shown = {
        found for page in (ROOT / "docs").rglob("*.md") for found in re.findall(r'--8<-- "(.+)"', page.read_text())
    }
    examples = {f"examples/{path.name}" for path in (ROOT / "examples").glob("train_*.py")}
    assert examples <= shown


def test_configuration_fetches_nothing() -> None:
    """No fonts or scripts from elsewhere."""
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.SafeLoader)
    assert settings["theme"]["font"] is False and settings["strict"] is True and "extra_javascript" not in settings
