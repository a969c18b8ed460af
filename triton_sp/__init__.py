"""Sequence-parallel training of unmodified Hugging Face vision-language models.

>>> import triton_sp
>>> [name for name in triton_sp.__all__ if name[0].islower()][:6]
['errors', 'explain', 'log_probs', 'mpu', 'record_step', 'share_batches']
"""

from triton_sp import errors
from triton_sp._version import __version__
from triton_sp.api import log_probs, sync_gradients, unwrap, wrap
from triton_sp.config import SPConfig
from triton_sp.engines.loaders import share_batches
from triton_sp.engines.mpu import mpu
from triton_sp.explain import explain
from triton_sp.kernels.mask import Mask
from triton_sp.modules.adapters import InternVLFusionAdapter, LlavaFusionAdapter, Qwen2VLFusionAdapter
from triton_sp.modules.encoder import UlyssesSPViTAttention
from triton_sp.modules.fusion import FusionAdapter
from triton_sp.ops.varlen import varlen_attention
from triton_sp.timeline import record_step
from triton_sp.wrappers.inputs.packing import PackingCollator
from triton_sp.wrappers.losses.scores import TokenScores

__all__ = [
    "FusionAdapter",
    "InternVLFusionAdapter",
    "LlavaFusionAdapter",
    "Mask",
    "PackingCollator",
    "Qwen2VLFusionAdapter",
    "SPConfig",
    "TokenScores",
    "UlyssesSPViTAttention",
    "__version__",
    "errors",
    "explain",
    "log_probs",
    "mpu",
    "record_step",
    "share_batches",
    "sync_gradients",
    "unwrap",
    "varlen_attention",
    "wrap",
]
