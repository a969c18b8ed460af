"""The order in which programs take tiles: heaviest first, so that no long one is left when all others are done.

A launch has a program for each tile and head, and a GPU starts them in order. Where a stream is causal its last rows
see most keys; of packed documents the longest have the heaviest tiles. What an order is worth is simulated in
tests/kernels/test_schedule.py: for packed documents of 16k tokens on one rank of 8, 0.66 of the GPU becomes 0.96.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from triton_sp.kernels import launch
from triton_sp.kernels.mask import Mask
from triton_sp.kernels.tiles import extent, locate


@triton.jit
def order(program, tiles, heads, causal, LAST_FIRST: tl.constexpr):
    """The tile and the head of a program where there is no table. If `causal` is 1 all heads of the last tile come
    first, or of the first where that sees most; if 0 one head after the other, whose keys then stay in the L2 cache.

    >>> [order.fn(program, 3, 2, 1, True) for program in range(6)]
    [(2, 0), (2, 1), (1, 0), (1, 1), (0, 0), (0, 1)]
    >>> [order.fn(program, 3, 2, 0, True) for program in range(6)]
    [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    """
    tile = program // heads
    if LAST_FIRST:
        tile = tiles - 1 - tile
    tile = causal * tile + (1 - causal) * (program % tiles)
    return tile, causal * (program % heads) + (1 - causal) * (program // tiles)


@triton.jit
def place(table_ptr, cu_ptr, segments, total, heads, causal, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """What this program does: segment, its start, its length, the first row of the tile in it, and the head."""
    program = tl.program_id(0)
    if table_ptr is not None:
        head = program % heads
        entry = table_ptr + program // heads * 2
        segment, first = tl.load(entry), tl.load(entry + 1)
        start, length = extent(segment, cu_ptr, segments, total, True)
    else:
        tile, head = order(program, tl.num_programs(0) // heads, heads, causal, LAST_FIRST)
        segment, start, length, first = locate(tile, cu_ptr, segments, total, BLOCK)
    return segment, start, length, first, head


def heads_each(tiles: int, k_heads: int, group: int, device: torch.device) -> int:
    """How many query heads a program of dk and dv sums over: its key head's `group`, or 1 where that leaves the GPU
    empty: a rank of 8 often has one key head, and one program for all its heads would use a quarter of an H100 at 8k
    tokens. What is then added up in fp32 stays small, as no more than four such programs a multiprocessor are split.

    >>> heads_each(64, 1, 4, torch.device("cpu")), heads_each(128, 8, 4, torch.device("cpu"))
    (1, 4)
    """
    return 1 if tiles * k_heads < 4 * launch.processors(device) else group


def table_of(mask: Mask, rows: int, keys: int, block: int, of_keys: bool = False) -> Tensor | None:
    """The tiles of a mask, heaviest first: made once where the mask keeps what is made of it and has several segments;
    elsewhere None, and programs search."""
    if mask.kept is None or mask.cu_seqlens_q.numel() <= 2:
        return None
    key = ("tiles of keys" if of_keys else "tiles of rows", block)
    if key not in mask.kept:
        mask.kept[key] = sorted_tiles(mask, rows, keys, block, of_keys)
    return mask.kept[key]


def row_ranges_of(mask: Mask, keys: int) -> Tensor | None:
    """The rows that see each key, where `key_ranges` says which keys each row sees."""
    if mask.key_ranges is None:
        return None
    kept = {} if mask.kept is None else mask.kept
    if ("row ranges", 0) not in kept:
        kept["row ranges", 0] = invert(mask.key_ranges, keys)
    return kept["row ranges", 0]


def invert(key_ranges: Tensor, keys: int) -> Tensor:
    """The rows that see each key, from the keys that each row sees: (2, T) -> (2, T_k), int32, no host read.

    >>> invert(torch.tensor([[0, 0, 0, 1], [3, 3, 3, 4]]), 4).tolist()
    [[0, 0, 0, 3], [3, 4, 4, 4]]
    """
    key, key_ranges = torch.arange(keys, dtype=key_ranges.dtype, device=key_ranges.device), key_ranges.contiguous()
    # Ranges never decrease: the rows before the first one that sees a key end by it, the ones behind start past it.
    return torch.stack([torch.searchsorted(key_ranges[bound], key, right=True, out_int32=True) for bound in (1, 0)])


def sorted_tiles(mask: Mask, rows: int, keys: int, block: int, of_keys: bool) -> Tensor:
    """int32 (tiles, 2): segment and first row of each tile, by how many keys it sees; or first key, by rows. Nothing is
    read on the host. Tiles without a row come last; `locate` says how many tiles there are.

    >>> mask = Mask(torch.tensor([0, 3, 3, 8]), causal=True)
    >>> sorted_tiles(mask, 8, 8, 4, False).tolist()      # rows 4 of 3..8 see 5 keys, rows 0..3 four, segment 0 three
    [[2, 4], [2, 0], [0, 0], [1, 0], [2, 8], [3, 0]]
    """
    cu_q, cu_k, used, _ = mask.tables
    assert cu_q is not None and cu_k is not None
    own, total = (cu_k, keys) if of_keys else (cu_q, rows)
    segments = len(own) - 1
    counts_q, counts_k = (F.pad(cu.diff(), (0, 1)) for cu in (cu_q, cu_k))
    if used is not None:
        counts_k = F.pad(used, (0, 1))
    starts = own.long().clamp(0, total)
    lengths = F.pad(starts, (0, 1), value=total).diff()
    tile = torch.arange(total // block + segments + 1, device=own.device)
    begin = starts // block + torch.arange(segments + 1, device=own.device)
    segment = (torch.searchsorted(begin, tile, right=True) - 1).clamp(0, segments)
    first = ((tile - begin[segment]) * block).clamp(min=0)
    stop = torch.minimum(first + block, lengths[segment])
    ranges = row_ranges_of(mask, keys) if of_keys else mask.key_ranges
    if ranges is None:
        seen, own_count = (counts_q, counts_k) if of_keys else (counts_k, counts_q)
        behind, ahead = (mask.right, mask.left) if of_keys else (mask.left, mask.right)
        shift, limit = (seen - own_count)[segment], seen[segment]
        weight = torch.minimum(stop + shift + ahead, limit) - (first + shift - behind).clamp(min=0)
    else:
        bounds = F.pad(ranges.long(), (0, 1))  # an entry more: a tile without a row may begin at the end
        weight = bounds[1][starts[segment] + stop - 1] - bounds[0][(starts[segment] + first).clamp(max=total)]
    weight = torch.where(first < lengths[segment], weight.clamp(min=0), -1)
    chosen = weight.argsort(descending=True, stable=True)
    return torch.stack([segment, first], 1)[chosen].int()
