"""What DeepSpeed calls an mpu: how the ranks are divided, asked by the names that it uses.

With this one DeepSpeed averages gradients over all ranks, in every ZeRO stage. Told the size of the sequence group, as
by its own mpu, ZeRO 0 to 2 add over its ranks and ZeRO 3 averages nevertheless (measured with 0.19.8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton_sp.ranks import collectives, groups
from triton_sp.ranks.groups import Group


@dataclass(frozen=True)
class SequenceParallelUnit:
    """How the ranks are divided.

    Attributes:
        sequence: the ranks that share this rank's batches.
        everyone: all ranks.
        model: this rank alone: no weight is divided, so a checkpoint does not depend on the groups.
        data_size, data_rank: how many groups there are, and which one is this rank's.
    """

    sequence: Group
    everyone: Group
    model: Group
    data_size: int
    data_rank: int

    def get_sequence_parallel_group(self) -> Any:
        return self.sequence.process_group

    def get_data_parallel_group(self) -> Any:
        """All ranks: ZeRO 3 (0.19.8) divides weights over this one, but then adds gradients as if over all."""
        return self.everyone.process_group

    def get_data_parallel_world_size(self) -> int:
        return self.data_size

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_sequence_data_parallel_group(self) -> Any:
        return self.everyone.process_group

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.everyone.size

    def get_sequence_data_parallel_rank(self) -> int:
        return self.everyone.rank

    def get_model_parallel_group(self) -> Any:
        return self.model.process_group

    def get_model_parallel_world_size(self) -> int:
        return self.model.size

    def get_model_parallel_rank(self) -> int:
        return self.model.rank


def mpu(group: Any = None) -> SequenceParallelUnit:
    """The mpu for `deepspeed.initialize(mpu=...)` and for `wrap`. Makes process groups: to be called on all ranks.

    Args:
        group: the ranks that share each batch, as for `wrap`; all groups have the same size.

    Raises:
        GroupError: see `wrap`.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> mpu().get_data_parallel_world_size()
    1
    >>> dist.destroy_process_group()
    """
    sequence, everyone = groups.resolve_group(group), groups.resolve_group()
    leaders = collectives.leaders(sequence)
    alone = groups.new_group([[rank] for rank in range(everyone.size)])
    return SequenceParallelUnit(sequence, everyone, alone, len(leaders), leaders.index(groups.world_rank(0, sequence)))
