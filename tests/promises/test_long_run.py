"""The table of the long run is whole, and within the bounds that the run itself is held to."""

import long_run
import pandas as pd
import pytest


def test_the_committed_table_keeps_the_bounds() -> None:
    rows = pd.read_csv(long_run.TABLE)
    assert rows.groupby("dtype").size().to_dict() == dict.fromkeys(long_run.DTYPES, long_run.STEPS)
    long_run.check(rows)


def test_the_bounds_see_a_curve_that_drifts() -> None:
    rows = pd.read_csv(long_run.TABLE)
    rows["ranks"] *= 1.1
    with pytest.raises(AssertionError):
        long_run.check(rows)
