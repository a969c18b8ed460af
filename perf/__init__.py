"""Measurements: every claim about speed, bytes or memory is a row of a CSV that `python -m perf.sweep` makes again."""
