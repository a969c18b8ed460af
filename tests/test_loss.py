"""The loss stage: chunks of logits instead of all of them, the same loss and gradients as transformers has them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from kit import parity, tiny, zoo
from kit.interpreter import interpret
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_pt_utils import LabelSmoother

import triton_sp
from triton_sp import SPConfig, loss
from triton_sp.errors import SPError
from triton_sp.loss import LogitTransform
from triton_sp.testing import RankError, relative_error


class Made(TorchDispatchMode):
    """The (dtype, elements) of every tensor that some operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[tuple[torch.dtype, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.tensors.add((x.dtype, x.numel()))
        return out

    @property
    def sizes(self) -> set[int]:
        return {size for _, size in self.tensors}


@contextmanager
def saved_elements() -> Iterator[list[int]]:
    """The sizes of what is kept for the backward."""
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield sizes


def chunks_of(rows: int, vocabulary: int) -> Any:
    return mock.patch.object(loss, "CHUNK_ELEMENTS", rows * vocabulary)


# --- cross entropy over logits that are there ----------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignored", [[2, 3], [], list(range(7))])
def test_cross_entropy(smoothing: float, ignored: list[int]) -> None:
    """Chunks that divide the tokens and chunks that do not; a batch without targets is 0, not NaN."""
    targets = torch.arange(7) % 5
    targets[ignored] = -100
    expected = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    whole = F.cross_entropy(expected, targets, reduction="sum", label_smoothing=smoothing)
    (3 * whole).backward()
    for rows in (1, 3, 7, 100):
        logits = expected.detach().clone().requires_grad_()
        with chunks_of(rows, 5):
            found = loss.cross_entropy(logits, targets, smoothing)
            (3 * found).backward()
        assert relative_error(found, whole) < 1e-14
        assert relative_error(logits.grad, expected.grad) < 1e-14


def test_no_token_and_masked_words() -> None:
    empty = torch.zeros(0, 5, requires_grad=True)
    total = loss.cross_entropy(empty, torch.zeros(0, dtype=torch.long))
    total.backward()
    assert total == 0 and empty.grad is not None and empty.grad.shape == (0, 5)
    masked = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    loss.cross_entropy(masked, torch.tensor([0])).backward()
    assert masked.grad is not None and masked.grad.tolist() == [[-0.5, 0.5, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_exists_by_the_chunk(dtype: torch.dtype) -> None:
    logits, targets = torch.randn(64, 50).to(dtype).requires_grad_(), torch.arange(64) % 50
    wide = logits.detach().float().requires_grad_()
    F.cross_entropy(wide, targets, reduction="sum").backward()
    with chunks_of(8, 50), saved_elements() as saved, Made() as made:
        total = loss.cross_entropy(logits, targets)
        total.backward()
    assert max(size for kind, size in made.tensors if kind == torch.float32) == 8 * 50
    assert sorted(saved) == [64, 64, 64 * 50]  # a norm and a target a token, and the logits themselves
    assert total.dtype == torch.float32
    assert relative_error(logits.grad, wide.grad) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


# --- a head that runs in chunks ------------------------------------------------------------------------------------


TRANSFORMS = {"plain": LogitTransform(), "scale": LogitTransform(0.25), "softcap": LogitTransform(2.0, 3.0)}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_head(transform: str, bias: bool) -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(6, 50, bias, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64)
    targets = torch.arange(40).masked_fill(torch.arange(40) % 3 == 0, -100)
    expected, found = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    whole = F.cross_entropy(TRANSFORMS[transform](head(expected)), targets, reduction="sum", label_smoothing=0.1)
    whole.backward()
    grads = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    with chunks_of(7, 50), saved_elements() as saved, Made() as made:
        total = loss.head_cross_entropy(head, found, targets, TRANSFORMS[transform], 0.1)
        total.backward()
    assert relative_error(total, whole) < 1e-14 and relative_error(found.grad, expected.grad) < 1e-14
    for parameter, grad in zip(head.parameters(), grads, strict=True):
        assert relative_error(parameter.grad, grad) < 1e-14
    assert max(*saved, *made.sizes) == 7 * 50 < 40 * 50


# --- wrapped models ------------------------------------------------------------------------------------------------


def assert_parity(model: nn.Module, batch: tiny.Batch, config: SPConfig, tolerance: float) -> None:
    """The loss and gradients of a wrapped model against those of a copy in one process."""
    expected = parity.exact_step(copy.deepcopy(model), batch, config.label_smoothing)
    parity.assert_close(parity.step(triton_sp.wrap(model, config=config), batch), expected, tolerance)


def chunked_parity(name: str, batch: str, smoothing: float) -> None:
    with chunks_of(4, tiny.VOCAB):
        config = SPConfig(chunked_loss=True, label_smoothing=smoothing, plan="heads")
        case = zoo.CASES[name]
        model = case.model()
        assert_parity(model, case.batch(batch), config, parity.TOLERANCE[case.dtype])
        assert model(**case.batch(batch)).logits is None


# gemma2 caps its logits; llama, with fewer tokens than a chunk in some shards, smooths its labels.
@pytest.mark.parametrize(
    ("name", "batch", "smoothing", "size"),
    [
        ("llama", "left_pad", 0.1, 4),
        ("gemma2", "plain", 0.0, 2),
        ("qwen2_5_vl", "plain", 0.0, 2),
        ("llama", "plain", 0.2, 1),
    ],
)
def test_chunked_loss(ranks, name: str, batch: str, smoothing: float, size: int) -> None:
    ranks.run(chunked_parity, name, batch, smoothing, ranks=size)


def variant(kind: str) -> nn.Module:
    """Heads of other makes."""
    options: dict[str, Any] = {"tie_word_embeddings": True} if kind == "tied" else {}
    family = {"scaled": "Cohere", "divided": "Granite"}.get(kind, "Llama")
    if family == "Cohere":
        options["logit_scale"] = 0.25
    elif family == "Granite":
        options["logits_scaling"] = 4.0
    model = tiny.build(f"{family}ForCausalLM", tiny.text_config(family, **options), "sdpa", torch.float64)
    if kind == "bias":
        model.lm_head.bias = nn.Parameter(torch.randn(tiny.VOCAB, dtype=torch.float64))
    elif kind == "frozen":
        model.lm_head.requires_grad_(False)
    elif kind == "low_rank":
        model.lm_head = LowRank(model.lm_head)
    return model


class LowRank(nn.Module):
    """A head with an adapter, as PEFT makes it."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.down = nn.Linear(tiny.WIDTH, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, tiny.VOCAB, bias=False, dtype=torch.float64)
        with torch.no_grad():  # the same on every rank
            for index, parameter in enumerate((self.down.weight, self.up.weight)):
                parameter.copy_(tiny.pixels(*parameter.shape, dtype=torch.float64, seed=index))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def heads_of_all_makes() -> None:
    for kind in ("tied", "bias", "frozen", "low_rank", "scaled", "divided"):
        with chunks_of(4, tiny.VOCAB):
            torch.manual_seed(0)
            tolerance = 1e-6 if kind == "scaled" else 1e-10  # Cohere's norms round to float32
            config = SPConfig(chunked_loss=True, plan="heads")
            assert_parity(variant(kind), zoo.CASES["llama"].batch("plain"), config, tolerance)


def test_heads_of_all_makes(ranks) -> None:
    ranks.run(heads_of_all_makes, ranks=2)


def sharded_head(own_unit: bool) -> None:
    """FSDP2: the head's weight is gathered while the head runs and while its backward does, and only then."""
    model, batch = zoo.CASES["llama"].model(), zoo.CASES["llama"].batch("plain")
    single = copy.deepcopy(model)
    single(**batch).loss.backward()
    for layer in [*model.model.layers, *([model.lm_head] if own_unit else [])]:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(model)
    triton_sp.wrap(model, config=SPConfig(chunked_loss=True, plan="heads"))
    with chunks_of(4, tiny.VOCAB):
        model(**batch).loss.backward()
    found = {name: grad.full_tensor() for name, grad in parity.gradients(model).items()}
    assert parity.gradient_error(found, parity.gradients(single))[0] < 1e-5


@pytest.mark.parametrize("own_unit", [True, False])
def test_sharded_head(ranks, own_unit: bool) -> None:
    ranks.run(sharded_head, own_unit, ranks=2)


def no_larger_tensor() -> None:
    """Vocabulary 20 times the width: with logits they are what is largest, without them the weight of the head is."""
    vocabulary, rows = 2000, 5
    config = tiny.text_config("Llama", vocab_size=vocabulary)
    ids = torch.arange(60)[None] % 89
    largest = {}
    for chunked in (False, True):
        model = tiny.build("LlamaForCausalLM", config, "sdpa", torch.float64)
        triton_sp.wrap(model, config=SPConfig(chunked_loss=chunked, plan="heads"))
        model.lm_head.weight.requires_grad_(False)
        model.model.embed_tokens.weight.requires_grad_(False)
        with chunks_of(rows, vocabulary), saved_elements() as saved, Made() as made:
            model(input_ids=ids, labels=ids).loss.backward()
        parameters = {p.numel() for p in model.parameters()} | {model.lm_head.weight.numel()}
        largest[chunked] = max(x for x in (*saved, *made.sizes) if x not in parameters)
    assert largest == {False: 30 * vocabulary, True: rows * vocabulary}


def test_no_tensor_of_all_logits(ranks) -> None:
    ranks.run(no_larger_tensor, ranks=2)


def smoothing_as_transformers_has_it() -> None:
    """What Trainer does with label_smoothing_factor, on gathered logits, is what SPConfig(label_smoothing=) does."""
    batch, smoother = zoo.CASES["llama"].batch("right_pad"), LabelSmoother(0.1)
    labels = batch.pop("labels")
    results = []
    for config in (SPConfig(gather_logits=True), SPConfig(label_smoothing=0.1)):
        for items in (None, 7):
            model = zoo.CASES["llama"].model()
            triton_sp.wrap(model, config=config)
            if config.gather_logits:
                total = smoother(model(**batch), labels, shift_labels=True, num_items_in_batch=items)
            else:
                total = model(**batch, labels=labels, num_items_in_batch=items).loss
            total.backward()
            triton_sp.sync_gradients(model)
            results.append((total.detach(), parity.gradients(model)))
    for expected, found in zip(results[:2], results[2:], strict=True):
        # The smoother sums in float32 whatever the logits are.
        parity.assert_close(found, expected, 1e-5)
    with pytest.raises(SPError, match="label_smoothing_factor"):
        model(**batch, num_items_in_batch=7)
    with pytest.raises(SPError, match="label_smoothing_factor"):
        triton_sp.share_batches(SimpleNamespace(accelerator=None, model=model, label_smoother=smoother))


def test_label_smoothing(ranks) -> None:
    ranks.run(smoothing_as_transformers_has_it, ranks=2)


class Odd(hf.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def refused(kind: str) -> None:
    if kind == "odd":
        model = Odd(tiny.text_config("Llama"))
        model.train()
    else:
        model = variant("scaled")
        model.logit_scale = 0.5  # not what the configuration says
    triton_sp.wrap(model, config=SPConfig(chunked_loss=True))
    model(**zoo.CASES["llama"].batch("plain"))


@pytest.mark.parametrize("kind", ["odd", "changed"])
def test_logits_that_are_changed_otherwise(ranks, kind: str) -> None:
    with pytest.raises(RankError) as error:
        ranks.run(refused, kind, ranks=2)
    assert set(error.value.errors) == {0, 1}
    assert all("chunked_loss" in str(e) and "1 -> " in str(e) for e in error.value.errors.values())


def nothing_valid() -> None:
    """Ranks without targets, and a batch without any: 0, and gradients of 0."""
    model, batch = zoo.CASES["llama"].model(), zoo.CASES["llama"].batch("plain")
    triton_sp.wrap(model, config=SPConfig(chunked_loss=True))
    assert model(**batch | {"labels": batch["labels"].index_fill(1, torch.arange(2, 37), -100)}).loss > 0
    empty = model(**batch | {"labels": torch.full_like(batch["labels"], -100)}).loss
    empty.backward()
    assert empty == 0
    assert model.lm_head.weight.grad is not None
    assert not any(grad.any() for grad in parity.gradients(model).values())
    assert "a chunk of this rank's tokens at a time" in str(triton_sp.explain(model))
    model.eval()
    with torch.no_grad():
        out = model(**batch)
    assert out.logits is not None and out.loss > 0


def test_nothing_valid(ranks) -> None:
    ranks.run(nothing_valid, ranks=2)


# --- Liger-Kernel --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs Liger-Kernel: pip install -e '.[dev]'")
def test_liger() -> None:
    """The package as it is, on the CPU."""
    interpret(Path(__file__).parent, "liger_cases.py")
