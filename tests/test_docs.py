"""What the documents name exists: files, links, make targets, and names of the library."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("perf/*.md")]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
THEIRS = {"AyaVisionConfig", "generate_block_attention_mask"}  # names of transformers that the source need not have
WRITTEN = {
    "build/site/",
    "reports/demo.csv",
    "reports/demo.png",
}  # by the commands that the text is about


def quoted(text: str) -> Iterator[str]:
    """What stands between backticks, on one line."""
    return (found[1] for found in re.finditer(r"(?<!`)`([^`\n]+)`", text))


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_links(name: str) -> None:
    text, folder = TEXTS[name], (ROOT / name).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    missing = [link for link in links if not (folder / link).exists()]
    files = {path for path in quoted(text) if re.fullmatch(r"[\w.-]+(/[\w.-]+)+(\.\w+|/)", path)} - WRITTEN
    places = (ROOT, folder, ROOT / "triton_sp")  # as seen from the top, from the document, or inside the library
    missing += [path for path in files if not any((place / path).exists() for place in places)]
    assert not missing


@pytest.mark.parametrize("name", TEXTS)
def test_make_targets(name: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = re.findall(r"(?:`|^    )make ([a-z-]+)", TEXTS[name], re.MULTILINE)
    assert set(asked) <= targets


@pytest.mark.parametrize("name", TEXTS)
def test_names_of_the_library(name: str) -> None:
    """`triton_sp.x.y` with or without a call, wherever a document speaks of it; the changelog also has old ones."""
    if name == "CHANGELOG.md":
        return
    dotted = {path for text in quoted(TEXTS[name]) for path in re.findall(r"\btriton_sp(?:\.[A-Za-z_]\w*)+", text)}
    assert not [path for path in dotted if not exists(path)]


def test_names_of_the_architecture() -> None:
    """Whatever docs/architecture.md names in code style is a file, or a word of the source: it has no dead names."""
    files = [path for room in ("triton_sp", "tests", "tools") for path in (ROOT / room).rglob("*.py")]
    words = {word for path in files for word in re.findall(r"\w+", path.read_text())} | THEIRS
    names = {path.name for path in files}
    named = [text for text in quoted(TEXTS["docs/architecture.md"]) if re.fullmatch(r"[\w.]+", text)]
    missing = [text for text in named if text.endswith(".py") and text not in names]
    missing += [text for text in named if not text.endswith((".py", ".md")) and not set(text.split(".")) <= words]
    assert not missing


def test_names_in_the_source() -> None:
    """Errors and docstrings point at files and names of the library that exist."""
    missing = []
    for path in (ROOT / "triton_sp").rglob("*.py"):
        text = path.read_text()
        files = re.findall(
            r"\btriton_sp/[\w/]+\.py|(?<!/)\b(?:tests|docs|perf|tools|wrappers|plan)/[\w/]+\.(?:py|md)", text
        )
        missing += [name for name in files if not any((place / name).exists() for place in (ROOT, ROOT / "triton_sp"))]
        names = re.findall(r"`(triton_sp(?:\.\w+)+)|remedy=f?\"[^\"]*?\b(triton_sp(?:\.[A-Za-z_]\w*)+)", text)
        missing += [name for pair in names for name in pair if name and not exists(name)]
    assert not missing


def exists(path: str) -> bool:
    """Whether a dotted name can be imported, or got from what can be."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def test_every_test_file_proves_something() -> None:
    """docs/proof.md names all of them."""
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/test_*.py")}
    assert not [path for path in sorted(files) if path not in TEXTS["docs/proof.md"]]
