"""The message that ranks compare before a forward is short; what they compare is not."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from triton_sp import comm
from triton_sp.agreement import agree
from triton_sp.errors import DisagreementError
from triton_sp.testing import RankError


def job(fields: int, differs: bool) -> None:
    tail = dist.get_rank() if differs else "same"
    agree(comm.resolve_group(), lambda: "\n".join(f"field{i}=value" for i in range(fields)) + f"\nlast={tail}")


def test_equal_descriptions_agree(ranks) -> None:
    ranks.run(job, 500, False, ranks=3)


@pytest.mark.parametrize("fields", [2, 500])
def test_a_difference_is_noticed_beyond_the_message_too(ranks, fields: int) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(job, fields, True, ranks=3)
    assert [type(error) for error in raised.value.errors.values()] == [DisagreementError] * 3
