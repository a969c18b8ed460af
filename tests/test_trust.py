"""Files that others may have damaged or written, and what the library never does: it executes nothing that it reads."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from triton_sp import cache
from triton_sp.errors import InputError
from triton_sp.kernels import launch
from triton_sp.plan import cost

SOURCES = sorted((Path(__file__).resolve().parent.parent / "triton_sp").rglob("*.py"))
GOOD = {"name": "calibrated cpu", "latency": 1e-4, "bandwidth": 1e9, "compute": 1e10}
DAMAGED = {
    "cut short": json.dumps(GOOD)[:20],
    "empty": "",
    "another version": json.dumps(GOOD | {"jitter": 1}),
    "without compute": json.dumps({key: value for key, value in GOOD.items() if key != "compute"}),
    "a bandwidth of 0": json.dumps(GOOD | {"bandwidth": 0}),
    "strings": json.dumps(GOOD | {"bandwidth": "1e9"}),
    "not a number": json.dumps(GOOD | {"latency": float("nan")}),
    "infinite": json.dumps(GOOD | {"compute": float("inf")}),
    "a truth": json.dumps(GOOD | {"compute": True}),
    "a list": "[1, 2]",
    "null": "null",
    "nested": "[" * 100_000,
    "bytes": "\udcff\udcfe",
    "huge": "[" + "1," * (1 << 20) + "1]",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cost._calibrated.cache_clear()
    launch.tuned.cache_clear()
    yield tmp_path
    cost._calibrated.cache_clear()
    launch.tuned.cache_clear()


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_link(folder: Path, kind: str) -> None:
    path = cache.cache_file("link-cpu-2")
    path.parent.mkdir()
    path.write_bytes(DAMAGED[kind].encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="calibrate again"):
        cost.find_link("auto", "cpu", 2)


def test_a_folder_in_the_place_of_a_link(folder: Path) -> None:
    cache.cache_file("link-cpu-2").mkdir(parents=True)
    with pytest.raises(InputError, match="IsADirectory"):
        cost.find_link("auto", "cpu", 2)


def test_what_is_written_is_this_users_and_whole(folder: Path) -> None:
    path = cost.store_link(cost.Link(**GOOD), "cpu", 2)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(TypeError):
        cache.store(path, {"latency": object()})
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no half-written file beside it
    assert cost.find_link("auto", "cpu", 2).bandwidth == 1e9


def test_another_users_file_is_passed_over(folder: Path, monkeypatch) -> None:
    cost.store_link(cost.Link(**GOOD), "cpu", 2)
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with pytest.warns(UserWarning, match="passed over"):
        assert cost.find_link("auto", "cpu", 2) == cost.LINKS["gloo"]


def test_without_a_home_directory(monkeypatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert str(os.getuid()) in str(cache.cache_file("link-cpu-2"))


TUNED = {
    "none": None,
    "cut short": '{"cuda:90 forward 72": [64',
    "a list": "[]",
    "a number": '{"cuda:90 forward 72": 64}',
    "strings": '{"cuda:90 forward 72": ["64", 64, {}]}',
    "no power of two": '{"cuda:90 forward 72": [63, 64, {}]}',
    "too large": '{"cuda:90 forward 72": [4096, 64, {}]}',
    "a truth": '{"cuda:90 forward 72": [true, 64, {}]}',
    "code": '{"cuda:90 forward 72": [64, 64, {"num_warps": "__import__"}]}',
}


@pytest.mark.parametrize("kind", TUNED)
def test_a_damaged_table_of_launches(folder: Path, monkeypatch, kind: str) -> None:
    path = folder / "tuned.json"
    if TUNED[kind] is not None:
        path.write_text(TUNED[kind])
    monkeypatch.setenv("TRITON_SP_TUNED", str(path))
    with pytest.raises(InputError) as raised:
        launch.tuned()
    assert raised.value.field == "TRITON_SP_TUNED" and str(path) in raised.value.found


def test_a_good_table_of_launches(folder: Path, monkeypatch) -> None:
    (folder / "tuned.json").write_text('{"cuda:90 forward 72": [64, 32, {"num_warps": 8, "num_stages": 2}]}')
    monkeypatch.setenv("TRITON_SP_TUNED", str(folder / "tuned.json"))
    assert launch.tuned()["cuda:90 forward 72"][0] == 64


FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "subprocess", "dill", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "system", "popen"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_that_is_read_is_executed(path: Path) -> None:
    """No pickle, eval, exec or shell, and no model code from the network. (testing.py sends functions between its own
    processes by multiprocessing, see SECURITY.md; environment.py asks fixed commands for what they print.)"""
    tree = ast.parse(path.read_text())
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & FORBIDDEN_MODULES - ({"subprocess"} if path.name == "environment.py" else set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            plain = node.func.id if isinstance(node.func, ast.Name) else ""
            of_os = (
                node.func.attr if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "os" else ""
            )
            assert not {plain, of_os} & FORBIDDEN_CALLS, f"line {node.lineno}"
            words = {keyword.arg for keyword in node.keywords}
            assert not words & {"trust_remote_code", "shell"}, f"line {node.lineno}"
