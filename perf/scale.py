"""What attention sends on 8, 64 and 1024 GPUs, by formulas that tests/test_scale.py holds to counted bytes.

    python perf/scale.py [file.csv]

One level: heads are exchanged in the whole group. Two levels: they are exchanged inside a node, and keys and values
travel between nodes, to the ranks that hold the same heads there. docs/scaling.md explains both.

Times are an alpha-beta model with assumed links, not measurements: a collective costs `alpha` and `alpha_message` for
each rank that it sends to, and its bytes at the bandwidth of where they go.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Attention:
    """One attention layer over one stream, forward."""

    name: str
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    causal: bool
    itemsize: int = 2

    @property
    def flops(self) -> float:
        return 4 * self.tokens**2 * self.heads * self.dim * (0.5 if self.causal else 1.0)


@dataclass(frozen=True)
class Machines:
    """Assumed: nodes of 8 with NVLink, one 400 Gbit/s port a GPU between them, 400 TFLOP/s in attention."""

    node: int = 8
    inside: float = 350e9
    between: float = 45e9
    alpha: float = 30e-6
    alpha_message: float = 1e-6
    flops: float = 400e12


@dataclass(frozen=True)
class Sent:
    """What one rank sends in one layer, forward."""

    inside: float  # bytes to ranks of its node
    between: float  # bytes to others
    messages: int
    collectives: int

    def seconds(self, machines: Machines) -> float:
        moved = max(self.inside / machines.inside, self.between / machines.between)  # two sets of wires
        return self.collectives * machines.alpha + self.messages * machines.alpha_message + moved


def one_level(x: Attention, ranks: int, node: int) -> Sent:
    """q, k, v to the ranks of their heads and the outputs back. A key/value head goes to every rank that needs it."""
    local = x.tokens / ranks
    a_rank = 2 * x.heads / ranks + 2 * max(x.kv_heads / ranks, 1)  # heads that go to, or come from, one rank
    to_one = x.itemsize * x.dim * local * a_rank
    node = min(node, ranks)
    return Sent(to_one * (node - 1), to_one * (ranks - node), 2 * (ranks - 1), 2)


def two_level(x: Attention, ranks: int, node: int) -> Sent:
    """The same inside a node, over the node's tokens; then its keys and values to the other nodes."""
    node = min(node, ranks)
    nodes, local = ranks // node, x.tokens / ranks
    kv = max(x.kv_heads / node, 1)
    to_one = x.itemsize * x.dim * local * (2 * x.heads / node + 2 * kv)
    between = x.itemsize * x.dim * 2 * kv * (x.tokens / nodes) * (nodes - 1)
    return Sent(to_one * (node - 1), between, 2 * (node - 1) + nodes - 1, 2 + (nodes > 1))


LAYERS = [
    Attention("ViT, 64k patches", 1 << 16, 16, 16, 80, False),
    Attention("LLM 28/4, 256k", 1 << 18, 28, 4, 128, True),
    Attention("LLM 64/8, 1M", 1 << 20, 64, 8, 128, True),
]


def rows(machines: Machines = Machines()) -> list[dict[str, object]]:
    """The table: a row for each layer, number of GPUs and way."""
    table: list[dict[str, object]] = []
    for layer in LAYERS:
        for ranks in (8, 64, 1024):
            compute = layer.flops / ranks / machines.flops
            for way in (one_level, two_level):
                sent = way(layer, ranks, machines.node)
                seconds = sent.seconds(machines)
                row = {"layer": layer.name, "gpus": ranks, "way": way.__name__, **asdict(sent)}
                row |= {"send_ms": 1e3 * seconds, "attend_ms": 1e3 * compute, "overhead": seconds / compute}
                table.append(row)
    return table


def main(arguments: list[str]) -> None:
    table = rows()
    if arguments:
        with open(arguments[0], "w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    print(f"{'layer':18}{'GPUs':>5}  {'way':10}{'in node MB':>11}{'between MB':>11}{'send ms':>9}{'attend ms':>10}")
    for row in table:
        megabytes = f"{row['inside'] / 1e6:11.1f}{row['between'] / 1e6:11.1f}"  # type: ignore[operator]
        times = f"{row['send_ms']:9.2f}{row['attend_ms']:10.2f}"
        print(f"{row['layer']:18}{row['gpus']:5}  {row['way']:10}{megabytes}{times}")


if __name__ == "__main__":
    main(sys.argv[1:])
