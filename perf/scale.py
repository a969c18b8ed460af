"""What attention sends on 8, 64 and 1024 GPUs, by formulas that tests/test_scale.py holds to counted bytes.

    python -m perf.sweep scale

One level: heads are exchanged in the whole group. Two levels: they are exchanged inside a node, and keys and values
travel between nodes, to the ranks that hold the same heads there. docs/scaling.md explains both.

Times are an alpha-beta model with assumed links, not measurements: a collective costs `alpha` and `alpha_message` for
each rank that it sends to, and its bytes at the bandwidth of where they go.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from perf.contest import Settings
from perf.rows import Row


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
    Attention("ViT 16 heads of 80, 64k patches", 1 << 16, 16, 16, 80, False),
    Attention("LLM 28/4 heads of 128, 256k tokens", 1 << 18, 28, 4, 128, True),
    Attention("LLM 64/8 heads of 128, 1M tokens", 1 << 20, 64, 8, 128, True),
]
WAYS = {"one level": one_level, "two levels": two_level}


def rows(machines: Machines = Machines()) -> list[Row]:
    """For each layer, number of GPUs and way: bytes inside and between nodes, and the times to send and to attend."""
    table = []
    for layer in LAYERS:
        for ranks in (8, 64, 1024):
            for way, of in WAYS.items():
                sent = of(layer, ranks, machines.node)
                base = Row(
                    "exchange", way, layer.name, kind="modelled", device="cuda", dtype="bfloat16", ranks=ranks,
                    tokens=layer.tokens, longest=layer.tokens, heads=layer.heads, kv_heads=layer.kv_heads,
                    dim=layer.dim, causal=layer.causal, note=f"{machines}",
                )  # fmt: skip
                attend = layer.flops / ranks / machines.flops
                table += [
                    replace(base, direction="inside nodes", sent_bytes=round(sent.inside)),
                    replace(base, direction="between nodes", sent_bytes=round(sent.between)),
                    replace(base, direction="send", median_ms=1e3 * sent.seconds(machines)),
                    replace(base, direction="attend", median_ms=1e3 * attend, flops=layer.flops / ranks),
                ]
    return table


def sweep(settings: Settings) -> int:
    """Write scale.csv anew; the exit code."""
    report = settings.report("scale")
    report.add(rows())
    print(report.path)
    return 0
