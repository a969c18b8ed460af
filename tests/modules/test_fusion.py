"""The adapters, called as DeepSpeed's are in its documentation and tests, against a splice in one process."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from kit import parity, plain_vits
from kit.plain_vits import WIDTH
from test_loss import Made
from torch import Tensor, nn

import triton_sp
from triton_sp.errors import DisagreementError, InputError
from triton_sp.modules.adapters import InternVLFusionAdapter, LlavaFusionAdapter, Qwen2VLFusionAdapter
from triton_sp.modules.fusion import FusionAdapter
from triton_sp.plan.shards import shard_tokens
from triton_sp.testing import RankError, relative_error

IMAGE, START, END, VOCAB = 1, 3, 4, 50
RAW, VISUAL, HIDDEN = 5, 6, 8  # widths of patches, ViT and LLM


class Model(nn.Module):
    """A script of one's own. `mm_projector` merges `merge` neighbours, as Qwen's merger does."""

    def __init__(self, merge: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vit = nn.Linear(RAW, VISUAL)
        self.mm_projector: Any = nn.Sequential(Merge(merge), nn.Linear(VISUAL * merge, HIDDEN))
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.double()


class Merge(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-2, (-1, self.count)).flatten(-2)


ADAPTERS = {
    "llava": lambda projection: LlavaFusionAdapter(projection, dist.group.WORLD, image_token_id=-200),
    "internvl": lambda projection: InternVLFusionAdapter(projection, dist.group.WORLD, image_token_id=IMAGE),
    "qwen2vl": lambda projection: Qwen2VLFusionAdapter(
        projection, dist.group.WORLD, vision_start_token_id=START, vision_end_token_id=END
    ),
}


@dataclass(frozen=True)
class Case:
    """A batch: ids where 0 is an image (-200, or a run of placeholders), and features of each of them.

    Attributes:
        rows: text lengths and, as tuples of one, images with so many features.
        dense: features as (B, v, C), as DeepSpeed has them; else one stream of all images.
        idle: features of samples without an image, which a dense batch has all the same.
    """

    rows: list[list[Any]]
    dense: bool = False
    idle: int = 0
    merge: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def ids(self, kind: str) -> Tensor:
        rows: list[list[int]] = []
        for row in self.rows:
            ids: list[int] = []
            for item in row:
                if isinstance(item, int):
                    ids += [5 + (7 * len(ids) + i) % 40 for i in range(item)]
                else:
                    ids += [-200] if kind == "llava" else [START, *[IMAGE] * item[0], END]
            rows.append(ids)
        width = max(map(len, rows))
        return torch.tensor([row + [2] * (width - len(row)) for row in rows])

    @property
    def images(self) -> list[list[int]]:
        return [[item[0] for item in row if not isinstance(item, int)] for row in self.rows]

    def patches(self) -> list[Tensor]:
        """Those of each sample."""
        torch.manual_seed(1)
        counts = [sum(images) or self.idle for images in self.images]
        return [torch.randn(self.merge * count, RAW, dtype=torch.float64) for count in counts]


CASES = {
    # DeepSpeed's own tests: one image a sample; two of one length; a sample without; a text alone.
    "one_image": Case([[2, (4,), 3], [2, (4,), 3]], dense=True),
    "two_images": Case([[1, (3,), 2, (3,), 2]], dense=True),
    "one_without": Case([[1, (2,), 2], [4]], dense=True, idle=2),
    "text_alone": Case([[6], [6]], dense=True, idle=4),
    # What its adapters splice wrongly, or crash on.
    "sizes": Case([[1, (5,), 2, (1,), (2,), 4], [7, (3,)], [9]], options={"image_lengths": [5, 1, 2, 3]}),
    "no_remainder_fits": Case([[(13,), 3]], merge=2),
    "shorter_than_ranks": Case([[(1,)]]),
}


def whole(case: Case, kind: str, model: Model) -> tuple[Tensor, Tensor, Tensor]:
    """The fused batch in one process, padded at the end, its mask, and the shifted labels, by loops over samples."""
    ids, rows, labels = case.ids(kind), [], []
    for sample, patches, images in zip(ids, case.patches(), case.images, strict=True):
        features = list(model.mm_projector(model.vit(patches))[: sum(images)].split(images)) if images else []
        parts, targets = [], []
        for token in sample.tolist():
            if kind != "llava" and token == IMAGE:
                rest = features[0]
                parts.append(rest[:1])
                features[:1] = [rest[1:]] if len(rest) > 1 else []
                targets += [-100]
            elif token == -200:
                targets += [-100] * len(features[0])
                parts.append(features.pop(0))
            else:
                parts.append(model.embed_tokens(torch.tensor([token])))
                targets.append(token)
        assert not features
        rows.append(torch.cat(parts))
        labels.append(torch.tensor([*targets[1:], -100]))
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
    padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), mask, padded


def share(tensor: Tensor, unit: int, dim: int) -> Tensor:
    """This rank's part: of uneven sizes, and nothing at all on the first of three ranks."""
    ranks, total = dist.get_world_size(), tensor.shape[dim] // unit
    sizes = [0, total - total // 3, total // 3] if ranks == 3 else list(shard_tokens(total, ranks).sizes)
    return tensor.split([size * unit for size in sizes], dim)[dist.get_rank()]


def run(kind: str, name: str, text_from: str) -> None:
    case = CASES[name]
    reference, model = Model(case.merge), Model(case.merge)
    expected, mask, labels = whole(case, kind, reference)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()

    model.mm_projector = ADAPTERS[kind](model.mm_projector)  # as DeepSpeed says
    ids, patches = case.ids(kind), case.patches()
    local = share(torch.stack(patches), case.merge, 1) if case.dense else share(torch.cat(patches), case.merge, 0)
    text = model.embed_tokens if text_from == "module" else model.embed_tokens(ids.clamp(min=0))
    options = {"details": True} | (case.options if kind == "llava" else {})
    fused = model.mm_projector(model.vit(local), text, ids, **options)
    own = fused.columns
    assert own.stop - own.start == shard_tokens(expected.shape[1], dist.get_world_size()).sizes[dist.get_rank()]
    torch.testing.assert_close(fused.embeds, expected[:, own], rtol=1e-13, atol=1e-13)
    assert torch.equal(fused.attention_mask, mask[:, own])
    assert torch.equal(fused.position_ids, torch.where(mask, mask.cumsum(1) - 1, mask.sum(1, True) - 1)[:, own])
    assert torch.equal(fused.targets(ids), labels[:, own])
    assert torch.equal(model.mm_projector(model.vit(local), text, ids, **options | {"details": False}), fused.embeds)

    (fused.embeds * weights[:, own]).sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None  # also on a rank without a feature: engines wait for it
        dist.all_reduce(parameter.grad)
    found = {key.replace("mm_projector.projection", "mm_projector"): g for key, g in parity.gradients(model).items()}
    assert parity.gradient_error(found, parity.gradients(reference))[0] < 1e-12


def run_all(kind: str) -> None:
    for index, name in enumerate(CASES):
        run(kind, name, ("tensor", "module")[index % 2])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(ranks, kind: str, size: int) -> None:
    ranks.run(run_all, kind, ranks=size)


# --- what does not fit ---------------------------------------------------------------------------------------------


def mismatched(kind: str, features: tuple[int, ...], ids: list[list[int]], options: dict[str, Any]) -> None:
    adapter = ADAPTERS[kind](nn.Identity())
    adapter(torch.zeros(*features, HIDDEN), torch.zeros(len(ids), len(ids[0]), HIDDEN), torch.tensor(ids), **options)


# Of two ranks each gives so many.
WRONG = {
    "too_many": ("internvl", (2,), [[5, IMAGE, IMAGE, IMAGE]], {}, "visual_features"),
    "too_few": ("internvl", (1,), [[5, IMAGE, IMAGE, IMAGE]], {}, "visual_features"),
    "of_another_sample": ("internvl", (2, 1), [[5, IMAGE], [IMAGE, IMAGE]], {}, "visual_features"),
    "samples": ("internvl", (3, 1), [[5, IMAGE], [IMAGE, IMAGE]], {}, "visual_features"),
    "no_multiple": ("llava", (2,), [[5, -200, -200, -200]], {}, "image_lengths"),
    "lengths": ("llava", (2,), [[5, -200, -200]], {"image_lengths": [4]}, "image_lengths"),
    "sum_of_lengths": ("llava", (2,), [[5, -200, -200]], {"image_lengths": [4, 1]}, "visual_features"),
    "no_end": ("qwen2vl", (1,), [[5, START, IMAGE, IMAGE]], {}, "vision end"),
    "end_first": ("qwen2vl", (1,), [[END, START, IMAGE, IMAGE]], {}, "vision end"),
    "mask": ("internvl", (1,), [[IMAGE, IMAGE]], {"attention_mask": torch.ones(1, 3)}, "attention_mask"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mismatch_raises_on_every_rank(ranks, name: str) -> None:
    *arguments, field = WRONG[name]
    with pytest.raises(RankError, match=field) as error:
        ranks.run(mismatched, *arguments, ranks=2)
    assert [type(error.value.errors[rank]) for rank in range(2)] == [InputError] * 2


def other_ids() -> None:
    mismatched("internvl", (1,), [[IMAGE, IMAGE, 5 + dist.get_rank()]], {})


def test_other_ids_on_another_rank(ranks) -> None:
    with pytest.raises(RankError) as error:
        ranks.run(other_ids, ranks=2)
    assert [type(error.value.errors[rank]) for rank in range(2)] == [DisagreementError] * 2


# --- memory ----------------------------------------------------------------------------------------------------------


def largest() -> int:
    """In rows of HIDDEN."""
    adapter = FusionAdapter(nn.Linear(HIDDEN, HIDDEN), None, image_token_id=IMAGE)
    embedding, ids = nn.Embedding(8, HIDDEN), torch.full((1, 600), 5)
    ids[:, 50:450] = IMAGE
    visual = share(torch.randn(400, HIDDEN), 1, 0).requires_grad_()
    with Made() as made:
        adapter(visual, embedding, ids).sum().backward()
    return max(size for kind, size in made.tensors if kind.is_floating_point) // HIDDEN


@pytest.mark.parametrize("size", [2, 4])
def test_no_tensor_of_full_length(ranks, size: int) -> None:
    assert ranks.run(largest, ranks=size) == [600 // size] * size


# --- the ViT ---------------------------------------------------------------------------------------------------------


class Tupled(plain_vits.SDPAAttention):
    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return super().forward(x), kwargs["given"]


def vit_attention(cls: bool, kind: str) -> None:
    """Layers of DeepSpeed's form: norm, attention and an MLP on what each rank has, CLS on all."""
    torch.manual_seed(0)
    attention = Tupled() if kind == "tuple" else plain_vits.MatmulAttention()
    layers = [nn.ModuleList([nn.LayerNorm(WIDTH), copy.deepcopy(attention), nn.Linear(WIDTH, WIDTH)]) for _ in "ab"]
    reference = nn.ModuleList(layers).double()
    model = copy.deepcopy(reference)
    for layer in model:
        layer[1] = triton_sp.UlyssesSPViTAttention(layer[1], dist.group.WORLD, has_cls_token=cls)

    def forward(stack: Any, x: Tensor) -> Tensor:
        for norm, attend, mlp in stack:
            out = attend(norm(x), given=3) if kind == "tuple" else attend(norm(x))
            if kind == "tuple":
                out, extra = out
                assert extra == 3
            x = x + out
            x = x + F.gelu(mlp(x))
        return x

    sizes = {2: (3, 8), 3: (4, 0, 7)}[dist.get_world_size()]
    start = cls + sum(sizes[: dist.get_rank()])
    own = [*([0] if cls else []), *range(start, start + sizes[dist.get_rank()])]
    states = torch.randn(2, cls + 11, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(2, cls + 11, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = forward(reference, states)
    (expected * weights).sum().backward()
    out = forward(model, states[:, own])
    assert relative_error(out, expected[:, own]) < 1e-12
    # Each rank's share of the loss: of the CLS token, which all have, a different part each.
    shares = weights[:, own].clone()
    if cls:
        shares[:, 0] *= (dist.get_rank() + 1) / sum(range(1, dist.get_world_size() + 1))
    (out * shares).sum().backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    found = {name.replace(".attn.", "."): grad for name, grad in parity.gradients(model).items()}
    assert parity.gradient_error(found, parity.gradients(reference))[0] < 1e-10


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("cls", "kind"), [(True, "tuple"), (True, "matmul"), (False, "tuple")])
def test_vit_attention(ranks, cls: bool, kind: str, size: int) -> None:
    ranks.run(vit_attention, cls, kind, ranks=size)
