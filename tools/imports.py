"""Which room of the library imports which: the table and the picture of docs/house.md.

A room is a folder or a file directly in triton_sp/. `python -m tools.imports` writes both; `--check` only says whether
the table is that of the source.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import grimp

from tools.marked import filled

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "house.md"
PICTURE = ROOT / "docs" / "figures" / "imports.svg"
# Folders without an __init__.py are packages of their own to grimp.
ROOTS = ("triton_sp", "triton_sp.wrappers", "triton_sp.kernels", "triton_sp.kernels.hopper")


def room_of(module: str) -> str:
    """The room of a module; the package itself is the room "triton_sp".

    >>> room_of("triton_sp.plan.cost"), room_of("triton_sp.errors"), room_of("triton_sp")
    ('plan', 'errors', 'triton_sp')
    """
    first, *rest = module.split(".")
    return rest[0] if rest else first


@cache
def graph() -> grimp.ImportGraph:
    """All imports of the library, also those inside of functions."""
    return grimp.build_graph(*ROOTS, cache_dir=None)


@cache
def arrows() -> frozenset[tuple[str, str]]:
    """(room, another that it imports)."""
    pairs = ((a, b) for a in graph().modules for b in graph().find_modules_directly_imported_by(a))
    return frozenset((room_of(a), room_of(b)) for a, b in pairs if room_of(a) != room_of(b))


def rooms() -> list[str]:
    """All rooms, each before those that it imports; of equals the alphabetically first.

    Raises:
        ValueError: rooms import each other in a circle.
    """
    waiting, order = {room_of(module) for module in graph().modules}, []
    while waiting:
        free = sorted(room for room in waiting if not any((other, room) in arrows() for other in waiting))
        if not free:
            raise ValueError(f"a circle of imports among {sorted(waiting)}")
        order.append(free[0])
        waiting.discard(free[0])
    return order


def table() -> str:
    """The rooms and what each imports, in Markdown."""
    order = rooms()
    lines = ["| room | imports |", "|---|---|"]
    for room in order:
        below = [f"`{b}`" for b in order if (room, b) in arrows()]
        lines.append(f"| `{room}` | {', '.join(below) or 'none of the others'} |")
    return "\n".join(lines) + "\n"


# --- the picture -------------------------------------------------------------------------------------------------

EVERYWHERE = ("errors", "_version")  # imported by most: left out
ALONE = ("testing",)  # imports none of the others


def direct(shown: list[str]) -> list[tuple[str, str]]:
    """The arrows between these rooms that no chain of others stands for."""
    reached: dict[str, set[str]] = {}
    for room in reversed(rooms()):
        below = {b for a, b in arrows() if a == room}
        reached[room] = below.union(*(reached[b] for b in below))
    return [
        (a, b)
        for a in shown
        for b in shown
        if (a, b) in arrows() and not any((a, c) in arrows() and b in reached[c] for c in shown)
    ]


def places(shown: list[str], links: list[tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """Where each room stands: on the floor under the lowest of those that import it, near the middle of them."""
    floor: dict[str, int] = {}
    for room in shown:
        floor[room] = max((floor[above] + 1 for above, below in links if below == room), default=0)
    for room in set(shown) - {below for _, below in links}:  # that no other imports: close to what it imports
        floor[room] = min(floor[below] for above, below in links if above == room) - 1
    found: dict[str, tuple[float, float]] = {}
    for level in range(max(floor.values()) + 1):
        parents = {r: [found[a][0] for a, b in links if b == r] or [9] for r in shown if floor[r] == level}
        row = sorted(parents, key=lambda room: (sum(parents[room]) / len(parents[room]), room))
        for index, room in enumerate(row):
            found[room] = ((index - (len(row) - 1) / 2) * 1.9, -1.0 * level)
    return found


def draw() -> None:
    """The picture: a room stands above all that it imports."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "triton_sp", "svg.fonttype": "none", "font.family": "sans-serif"})
    shown = [room for room in rooms() if room not in (*EVERYWHERE, *ALONE)]
    links = direct(shown)
    place = places(shown, links)
    figure, axes = plt.subplots(figsize=(8, 8.5))
    for above, below in links:
        (x, y), (u, v) = place[above], place[below]
        bend = 0.5 if x == u and y - v > 1 else 0.0  # around the rooms in between
        line = {"arrowstyle": "-|>", "color": "#7a8499", "shrinkA": 4, "shrinkB": 2}
        line["connectionstyle"] = f"arc3,rad={bend}"
        axes.annotate("", (u, v + 0.22), (x, y - 0.2), arrowprops=line)
    for room, spot in place.items():
        box = {"boxstyle": "round,pad=0.4", "facecolor": "#eef2fb", "edgecolor": "#3b4a6b"}
        axes.text(*spot, room, ha="center", va="center", fontsize=12, bbox=box)
    axes.set_xlim(-4.6, 4.6)
    axes.set_ylim(min(y for _, y in place.values()) - 0.5, 0.5)
    axes.axis("off")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None}, facecolor="white")


def main(check: bool) -> int:
    """Write the table and the picture, or say whether the table is the present one; the exit code."""
    text = PAGE.read_text()
    written = filled(text, "imports", table().splitlines())
    if not check:
        PAGE.write_text(written)
        draw()
    elif written != text:
        print("docs/house.md: the table of imports is not that of the source; run python -m tools.imports")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
