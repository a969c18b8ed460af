"""Laws of the attend kernels over drawn lengths, heads, masks and dtypes. Run as attend_cases.py is."""

from attend_kit import DTYPES, ON_GPU, Case, assert_exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DIMS = st.sampled_from([64, 72, 80] if ON_GPU else range(16, 97, 8))  # on a GPU each one more is seconds of compiling


@settings(max_examples=60 if ON_GPU else 4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_properties(data):
    lengths = st.integers(0, 36)
    segments = data.draw(st.lists(st.tuples(lengths, lengths), max_size=2))
    k_heads = data.draw(st.integers(1, 2))
    case = Case(
        [q for q, _ in segments],
        [k for _, k in segments],
        [data.draw(st.integers(0, k)) for _, k in segments] if data.draw(st.booleans()) else None,
        slack=data.draw(st.integers(0, 5)),
        heads=k_heads * data.draw(st.integers(1, 2)),
        k_heads=k_heads,
        dim=data.draw(DIMS),
        v_dim=data.draw(st.just(0) | DIMS),
        dtype=data.draw(st.sampled_from(DTYPES)),
        causal=data.draw(st.booleans()),
        window=data.draw(st.none() | st.integers(1, 30)),
        softcap=data.draw(st.none() | st.floats(1, 10)),
    )
    assert_exact(case)
