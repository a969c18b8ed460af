"""What DeepSpeed calls an mpu: an object that says how the ranks are divided, under the names that DeepSpeed uses.

With this mpu DeepSpeed averages gradients over all ranks in every ZeRO stage. DeepSpeed's own mpu also tells it the
size of the sequence group, and then ZeRO 0 to 2 add gradients over that group, while ZeRO 3 averages them (measured
with 0.19.8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton_sp.ranks import collectives, groups
from triton_sp.ranks.groups import Group


@dataclass(frozen=True)
class SequenceParallelUnit:
    """How the ranks are divided. The methods are those that DeepSpeed and Megatron ask for.

    Attributes:
        sequence: the ranks that share this rank's batches.
        everyone: all ranks.
        model: this rank alone, because no weight is divided; so a checkpoint does not depend on the groups.
        data_size, data_rank: how many groups there are, and the number of this rank's group.
    """

    sequence: Group
    everyone: Group
    model: Group
    data_size: int
    data_rank: int

    def get_sequence_parallel_group(self) -> Any:
        """The ranks that share this rank's batches."""
        return self.sequence.process_group

    def get_data_parallel_group(self) -> Any:
        """All ranks. ZeRO 3 (0.19.8) divides weights over this group, but averages gradients over all ranks."""
        return self.everyone.process_group

    def get_data_parallel_world_size(self) -> int:
        """How many batches are trained on at a time."""
        return self.data_size

    def get_data_parallel_rank(self) -> int:
        """Which of these batches is this rank's."""
        return self.data_rank

    def get_sequence_data_parallel_group(self) -> Any:
        """All ranks, over which gradients are averaged."""
        return self.everyone.process_group

    def get_sequence_data_parallel_world_size(self) -> int:
        """The number of all ranks."""
        return self.everyone.size

    def get_sequence_data_parallel_rank(self) -> int:
        """This rank's number among all."""
        return self.everyone.rank

    def get_model_parallel_group(self) -> Any:
        """This rank alone."""
        return self.model.process_group

    def get_model_parallel_world_size(self) -> int:
        """1: no weight is divided."""
        return self.model.size

    def get_model_parallel_rank(self) -> int:
        """0, the only one."""
        return self.model.rank


def mpu(group: Any = None) -> SequenceParallelUnit:
    """An mpu for `deepspeed.initialize(mpu=...)` and for `wrap`. It creates process groups: call it on all ranks.

    Args:
        group: the ranks that share each batch, as for `wrap`. All groups must have the same size.

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
