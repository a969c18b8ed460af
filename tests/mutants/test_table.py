"""What the last `make mutants` found is in the documents, and is enough."""

from __future__ import annotations

from pathlib import Path

from mutants import table

ROOT = Path(__file__).parents[2]


def test_at_least_85_percent_are_noticed_in_every_module() -> None:
    assert table.counts()
    for count in table.counts():
        assert count.share >= 0.85 and count.sampled >= 15, count


def test_the_document_has_the_counts() -> None:
    text = table.DOCUMENT.read_text()
    assert table.written(text) == text


def test_what_changes_no_result_is_a_change_of_the_source() -> None:
    for module, before, after, why in table.EQUIVALENT.rows():
        assert before in (ROOT / module).read_text(), (module, before)
        assert before != after and why


def test_modules_and_tests_are_there() -> None:
    for module, tests in table.MODULES.items():
        assert (ROOT / module).exists(), module
        for test in tests:
            assert not test.startswith("tests/") or (ROOT / test.partition("::")[0]).exists(), test
