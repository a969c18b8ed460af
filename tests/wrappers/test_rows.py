"""Features and hidden states of a tower where ranks take parts of them: which rows, of what the model returned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_sp.anatomy.parts import FeatureMethod, Fusion
from triton_sp.errors import InputError
from triton_sp.plan.shards import Shards
from triton_sp.wrappers.fusion.features import change_rows, check_count, needed_rows
from triton_sp.wrappers.towers.hidden import HiddenShape
from triton_sp.wrappers.towers.tower import TowerPass, TowerStates, without_dense_mask

IMAGES = FeatureMethod("get_image_features", "image_token_id", "images")
VIDEOS = FeatureMethod("get_video_features", "video_token_id", "images")


class Composite(nn.Module):
    """As much of one as is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_token_id=1, video_token_id=2)
        self.embed = nn.Embedding(9, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def fusion(*features: FeatureMethod) -> Any:
    return SimpleNamespace(module=Composite(), features=features)


IDS = torch.tensor([[0, 1, 1, 5, 2, 6], [7, 1, 8, 2, 2, 0]])


@pytest.mark.parametrize("embedded", [False, True])
def test_placeholders_are_counted_by_rank(embedded: bool) -> None:
    """In the stream, which leaves the padding out; by id, or by the embedding of the id."""
    composite: Fusion = fusion(IMAGES, VIDEOS)
    index = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    tokens = composite.module.embed(IDS) if embedded else IDS  # type: ignore[operator]
    found = needed_rows(composite, tokens, index, Shards((3, 0, 5, 2)))
    assert found == {"get_image_features": Shards((2, 0, 1, 0)), "get_video_features": Shards((0, 0, 1, 2))}
    assert needed_rows(fusion(), tokens, index, Shards((10,))) == {}


def test_as_many_features_as_placeholders() -> None:
    check_count(IMAGES, 5, Shards((2, 0, 3)))
    for made in (4, 6):
        with pytest.raises(InputError) as raised:
            check_count(IMAGES, made, Shards((2, 0, 3)))
        assert (raised.value.field, raised.value.found) == ("image_token", "5 in the batch")
        assert raised.value.expected == f"{made} placeholders, as many as get_image_features returns features"


def last_two(rows: Tensor) -> Tensor:
    assert rows.ndim == 2
    return rows[-2:]


def flat(value: Any) -> list[float]:
    return [part.flatten().tolist() for part in value] if isinstance(value, list | tuple) else value.flatten().tolist()


ROWS = torch.arange(6.0)[:, None]


def test_rows_are_changed_in_whatever_holds_them() -> None:
    assert torch.equal(change_rows(ROWS, last_two), ROWS[-2:])
    stacked = change_rows(ROWS.view(2, 3, 1), last_two)  # images of three rows each
    assert stacked.shape == (2, 1, 1) and flat(stacked) == [4, 5]
    for kind in (list, tuple):
        parts = change_rows(kind([ROWS[:2], ROWS[2:]]), last_two)
        assert type(parts) is kind and len(parts) == 1 and torch.equal(parts[0], ROWS[-2:])
        (single,) = change_rows(kind([ROWS.view(1, 6, 1)]), last_two)
        assert single.shape == (2, 1)


def test_the_field_of_an_output_that_has_them_is_changed() -> None:
    pooled = SimpleNamespace(pooler_output=ROWS, last_hidden_state="kept", deepstack_features=[ROWS, [ROWS + 10]])
    assert change_rows(pooled, last_two) is pooled
    assert flat(pooled.pooler_output) == [4, 5] and pooled.last_hidden_state == "kept"
    assert flat(pooled.deepstack_features[0]) == [4, 5] and flat(pooled.deepstack_features[1]) == [[14, 15]]
    for plain in (SimpleNamespace(pooler_output=None, last_hidden_state=ROWS),):
        assert change_rows(plain, last_two) is plain
        assert flat(plain.last_hidden_state) == [4, 5] and plain.pooler_output is None


# --- the hidden states of a tower ----------------------------------------------------------------------------------


class Leaving:
    """A tower of three blocks; what leaves its blocks is negative."""

    stack = SimpleNamespace(blocks=[0, 1, 2])

    def leave(self, state: Tensor) -> Tensor:
        return -state


def test_states_from_between_the_blocks_leave_them_when_they_are_read() -> None:
    """The first went in and the last came out: they are outside already."""
    tower: Any = Leaving()
    states = TowerStates([torch.tensor(float(i)) for i in range(1, 5)], tower)
    outside = [1.0, -2.0, -3.0, 4.0]
    assert [float(states[i]) for i in range(4)] == outside == [float(x) for x in states]
    assert [float(states[i]) for i in range(-4, 0)] == outside
    assert [float(x) for x in states[1:]] == outside[1:] and [float(x) for x in states[::-2]] == outside[::-2]
    assert TowerStates([torch.ones(1)] * 4)[1] == 1 and type(states[:2]) is tuple
    longer = TowerStates([torch.ones(1)] * 5, tower)  # and what a norm made of the last
    assert [float(x) for x in longer] == [1, -1, -1, 1, 1]
    assert TowerStates([None] * 4, tower)[1] is None  # type: ignore[list-item]


def tower_pass(**fields: Any) -> TowerPass:
    made = TowerPass(SimpleNamespace(module=SimpleNamespace(config=SimpleNamespace())), None, None)  # type: ignore[arg-type]
    vars(made).update(fields)
    return made


def test_the_mask_of_the_first_block_is_known_by_its_memory() -> None:
    mask = torch.ones(2, 1, 3, 3)
    tower = tower_pass(mask=mask)
    assert tower.is_planned_for(mask) and tower.is_planned_for(mask.view_as(mask))
    assert not tower.is_planned_for(mask.clone()) and not tower.is_planned_for(mask[:, :, :2])
    assert not tower_pass().is_planned_for(mask)


def test_a_dense_mask_is_not_made_where_images_are_joined() -> None:
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation_internal="sdpa"))
    for joined, implementation in ((None, "sdpa"), (torch.tensor([0, 3]), "flash_attention_2")):
        before = module.config
        with without_dense_mask(tower_pass(stack=SimpleNamespace(module=module), joined=joined)):
            assert module.config._attn_implementation_internal == implementation
        assert module.config is before and before._attn_implementation_internal == "sdpa"


class Streams:
    """What a placement decides: the stream of each kind of segments."""

    first = SimpleNamespace(own=range(4, 9))

    def of(self, cu_seqlens: Tensor) -> Any:
        return SimpleNamespace(own=range(len(cu_seqlens)))


def placement() -> Any:
    def enter(x: Tensor, stream: Any) -> Tensor:
        return x[stream.own.start : stream.own.stop]

    return SimpleNamespace(stream_in=lambda cu_seqlens, streams: streams.of(cu_seqlens), enter=enter)


def test_blocks_get_the_stream_of_their_segments() -> None:
    cu_seqlens = torch.tensor([0, 2, 3])
    tower = tower_pass(streams=Streams(), placement=placement())
    assert tower.stream() is Streams.first and tower.stream(cu_seqlens).own == range(3)


def test_tables_are_cut_as_tokens_are() -> None:
    shape = HiddenShape(torch.Size((2, 5, 3)), torch.device("cpu"), False, None)
    tower = tower_pass(streams=Streams(), placement=placement(), shape=shape, dense=False)
    packed = torch.arange(10.0)[:, None]
    assert flat(tower.table(packed)) == [4, 5, 6, 7, 8]
    rotations = packed.view(2, 5, 1).expand(2, 5, 7)
    found = tower.table(rotations)
    assert flat(found[..., 0]) == [4, 5, 6, 7, 8] and found.shape == (1, 5, 7)
    assert flat(tower.table(torch.arange(30.0).view(10, 1, 3))[:, 0, 0]) == [12, 15, 18, 21, 24]
    assert tower.index_in_image().tolist() == [4, 0, 1, 2, 3]
    images = tower_pass(streams=Streams(), placement=placement(), shape=shape, dense=True)
    assert flat(images.table(torch.arange(4.0)[:, None], prefix=-1.0)) == [3, -1, 0, 1, 2]
