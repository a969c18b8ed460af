"""log_probs: what preference and policy training are made of, in the place of a loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from triton_sp.errors import GroupError, InputError, UnsupportedModelError
from triton_sp.scores import TokenScores
from triton_sp.wrappers.install import installation_of
from triton_sp.wrappers.scores import ScoreRequest, asking, score_alone


def log_probs(model_: nn.Module, batch: Mapping[str, Any], *, temperature: float = 1.0) -> TokenScores:
    """The log-probability of each label of a batch, and more, on every rank and with a gradient; no loss, no logits.

    DPO, GRPO and other losses of one's own are formed of these, by each rank from all of them: then the mean of the
    ranks' gradients is the single-process gradient, as with `out.loss`. The sequence is sharded as ever, and the head
    runs on a chunk of the labelled tokens at a time, and again in the backward.

    Args:
        model_: a wrapped language model, or vision and language model; or what an engine has put around it (DDP, PEFT).
        batch: the arguments of its forward, the same on every rank. `labels` (B, S): the tokens to be judged, often the
            `input_ids`, and -100 elsewhere.
        temperature: what logits are divided by.

    Returns:
        TokenScores: `log_probs`, `entropy`, `is_top1` and `label_mask`, each (B, S - 1): entry i is of
        `labels[:, i + 1]`.

    Raises:
        GroupError: the model is not wrapped. InputError: no labels, a temperature that is not positive, or a batch that
        cannot be sharded. UnsupportedModelError: a model without a head, or one that does to its logits what its
        configuration does not say.

    >>> import torch, torch.distributed as dist, triton_sp
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = triton_sp.wrap(LlamaForCausalLM(tiny))
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> scores = triton_sp.log_probs(model, {"input_ids": ids, "labels": ids})
    >>> scores.log_probs.shape, bool((scores.log_probs < 0).all())
    (torch.Size([1, 2]), True)
    >>> (-scores.log_probs.mean()).backward()
    >>> dist.destroy_process_group()
    """
    installation = installation_of(model_)
    if installation is None:
        raise GroupError("model", expected="a wrapped model", found="one without a group", remedy="call wrap first")
    entry: Any = installation.anatomy.entry
    if installation.anatomy.decoder is None or getattr(entry, "get_output_embeddings", lambda: None)() is None:
        raise UnsupportedModelError(
            type(entry).__name__,
            expected="a model with a language-modelling head",
            found="none",
            remedy="wrap the whole model, e.g. LlamaForCausalLM",
        )
    if not temperature > 0:
        raise InputError(
            "temperature", expected="a positive number", found=f"{temperature}", remedy="1.0 changes nothing"
        )
    if not isinstance(batch.get("labels"), Tensor):
        raise InputError(
            "labels", expected="a tensor (B, S)", found="none", remedy="input_ids, with -100 where no score is wanted"
        )
    request = ScoreRequest(float(temperature))
    if installation.group.size == 1:
        return score_alone(installation, model_, dict(batch), request)
    with asking(request):
        return model_(**batch)
