"""What the site shows beside docs/: the files that pages link to, a table of all errors, and llms.txt.

mkdocs calls the functions `on_...` (mkdocs.yml names this file as a hook).
"""

from __future__ import annotations

import ast
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r'^( *)>>> .*\n(?:\1(?!""").+\n)*', re.MULTILINE)
ERRORS = "<!-- errors -->"
KINDS = (
    *("InputError", "GroupError", "UnsupportedModelError", "DisagreementError"),
    *("VerificationError", "UnsupportedKernelError"),
)


@event_priority(100)  # before mkdocstrings looks for the copy
def on_config(config: Any) -> Any:
    """Copy the library as mkdocstrings can read it: with an __init__.py in every folder, and headings over examples."""
    copy = ROOT / "build" / "library" / "triton_sp"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "triton_sp", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (path for path in copy.rglob("*") if path.is_dir()):
        (folder / "__init__.py").touch()
    for path in copy.rglob("*.py"):
        path.write_text(EXAMPLE.sub(_headed, path.read_text()))
    return config


def _headed(example: re.Match[str]) -> str:
    """The lines of an example, as a section of their docstring."""
    lines = example[0].splitlines()
    return "\n".join([f"{example[1]}Examples:", *(f"    {line}" for line in lines)]) + "\n"


# --- files outside docs/ that pages link to ------------------------------------------------------------------------


def on_files(files: Files, config: Any) -> Files:
    """Make a page of every file of the repository that a page links to, and of those that these link to."""
    waiting = [(f"docs/{file.src_uri}", ROOT / "docs" / file.src_uri) for file in files.documentation_pages()]
    seen = set()
    while waiting:
        place, path = waiting.pop()
        for target in outside(place, path.read_text()):
            if target in seen:
                continue
            seen.add(target)
            files.append(_shown(config, target))
            if target.endswith(".md"):
                waiting.append((target, ROOT / target))
    return files


def outside(place: str, text: str) -> Iterator[str]:
    """The files of the repository outside docs/ that the text of the file `place` links to.

    >>> list(outside("docs/a.md", "[1](b.md) [2](../README.md#x) [3](https://a.b/c)"))
    ['README.md']
    """
    for _, link, _ in LINK.findall(FENCE.sub("", text)):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
        if "://" not in link and not target.startswith("docs/") and (ROOT / target).is_file():
            yield target


def _shown(config: Any, target: str) -> File:
    """A page with the text of a file, or the file itself if it is a picture or a table."""
    suffix, place = Path(target).suffix, f"repository/{target}"
    if suffix == ".md":
        return File.generated(config, place, content=_relinked((ROOT / target).read_text(), target))
    if suffix == ".py":
        code = (ROOT / target).read_text()
        return File.generated(config, f"{place}.md", content=f"# {target}\n\n````` python\n{code}\n`````\n")
    return File.generated(config, place, abs_src_path=str(ROOT / target))


def _relinked(text: str, place: str) -> str:
    """The text of the file `place`, with links as they have to be on the site."""
    on_site = place.removeprefix("docs/") if place.startswith("docs/") else f"repository/{place}"

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), match[2]))
        if "://" in match[2] or not (ROOT / target).is_file():
            return match[0]
        there = target.removeprefix("docs/") if target.startswith("docs/") else f"repository/{target}"
        there += ".md" * target.endswith(".py")
        return f"{match[1]}{posixpath.relpath(there, posixpath.dirname(on_site))}{match[3]}"

    parts = FENCE.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the table of errors, and turn links to other files of the repository to their pages."""
    if page.file.src_uri.startswith("repository/"):
        return markdown
    return _relinked(markdown.replace(ERRORS, error_table()), f"docs/{page.file.src_uri}")


# --- the table of errors -------------------------------------------------------------------------------------------


def error_table() -> str:
    """Every error that the library raises for its users, as the code has it."""
    found = sorted({row for path in sorted((ROOT / "triton_sp").rglob("*.py")) for row in raised(path.read_text())})
    lines = ["| error | field | expected | remedy |", "|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in found])


def raised(code: str) -> Iterator[tuple[str, str, str, str]]:
    """(kind, field, expected, remedy) of each error that is made in a text of Python; … for what varies.

    >>> list(raised('raise InputError("labels", expected=f"{n} of them", found="none", remedy="pass them")'))
    [('InputError', 'labels', '… of them', 'pass them')]
    """
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in KINDS and {"expected", "remedy"} <= set(given) and call.args:
            yield name, *(_words(node) for node in (call.args[0], given["expected"], given["remedy"]))
        elif name == "require" and len(call.args) == 6:
            _, kind, field, expected, _, remedy = call.args
            yield _words(kind), *(_words(node) for node in (field, expected, remedy))


def _words(node: ast.expr) -> str:
    """A string as it stands in the code, … for each part of it that varies."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.id if isinstance(node, ast.Name) and node.id in KINDS else "…"


# --- for language models --------------------------------------------------------------------------------------------


def on_post_build(config: Any) -> None:
    """Write llms.txt (https://llmstxt.org): what the library is, and a line for each page."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for title, source in _pages(config.nav):
        text = (ROOT / "docs" / source).read_text()
        lines.append(f"- [{title}]({source.removesuffix('.md')}.html): {_first_sentence(text)}")
    (Path(config.site_dir) / "llms.txt").write_text("\n".join(lines) + "\n")


def _first_sentence(text: str) -> str:
    """The first sentence of a page, without links."""
    paragraph = next((part for part in re.split(r"\n\s*\n", text) if re.match(r"[A-Z`*]", part)), "")
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
    return re.split(r"(?<=[.:?])\s", plain)[0]


def _pages(nav: list[Any]) -> Iterator[tuple[str, str]]:
    for item in nav:
        for title, value in item.items():
            yield from _pages(value) if isinstance(value, list) else [(title, value)]
