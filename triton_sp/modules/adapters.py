"""The fusion adapters of three families, which differ in what counts as a placeholder; see fusion.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from triton_sp.errors import InputError
from triton_sp.modules.fusion import FusionAdapter


class LlavaFusionAdapter(FusionAdapter):
    """LLaVA: each placeholder token stands for a whole image and gives way to its features.

    The arguments are those of FusionAdapter. Samples whose fused length is less than the longest one's are padded at
    their end; `details=True` returns the mask.

    >>> import torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> adapter = LlavaFusionAdapter(nn.Identity())
    >>> text = torch.tensor([[[1.0], [0.0], [2.0], [0.0]]])
    >>> visual = torch.tensor([[7.0], [8.0], [9.0]])                     # an image of one feature, one of two
    >>> adapter(visual, text, torch.tensor([[1, -200, 2, -200]]), image_lengths=[1, 2]).flatten().tolist()
    [1.0, 7.0, 2.0, 8.0, 9.0]
    >>> dist.destroy_process_group()
    """

    expands = True


class InternVLFusionAdapter(FusionAdapter):
    """InternVL: `image_token_id` is IMG_CONTEXT, one for each feature. The arguments are those of FusionAdapter."""


class Qwen2VLFusionAdapter(FusionAdapter):
    """Qwen2-VL: the tokens between a vision start and the next vision end are placeholders, one for each feature.

    Args:
        projection, process_group: as for FusionAdapter; the projection is `visual.merger`.
        vision_start_token_id, vision_end_token_id: the ids around the placeholders of an image or video; they stay.

    >>> import torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> adapter = Qwen2VLFusionAdapter(nn.Identity(), None, vision_start_token_id=3, vision_end_token_id=4)
    >>> adapter.placeholders(torch.tensor([[5, 3, 1, 1, 4, 5]])).int().tolist()
    [[0, 0, 1, 1, 0, 0]]
    >>> dist.destroy_process_group()
    """

    def __init__(
        self, projection: nn.Module, process_group: Any, vision_start_token_id: int, vision_end_token_id: int
    ) -> None:
        super().__init__(projection, process_group)
        self.vision_start_token_id, self.vision_end_token_id = vision_start_token_id, vision_end_token_id

    def placeholders(self, input_ids: Tensor) -> Tensor:
        """(B, L) bool: the tokens between a vision start and the next vision end."""
        start, end = input_ids == self.vision_start_token_id, input_ids == self.vision_end_token_id
        depth = start.long().cumsum(1) - end.long().cumsum(1)
        if bool((depth < 0).any() | (depth > 1).any() | (depth[:, -1:] != 0).any()):
            raise InputError(
                "input_ids",
                expected="a vision end after each vision start",
                found=f"{int(start.sum())} starts and {int(end.sum())} ends, or in another order",
                remedy="pass whole images and videos",
            )
        return (depth == 1) & ~start
