"""Scorers: what counts as the answer in a completion."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.tasks.scorers import exact_match, last_number, last_word, parse_last_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 42", Fraction(42)),
        ("1,234", Fraction(1234)),
        ("1,234,567.", Fraction(1234567)),
        ("1,234, which is right", Fraction(1234)),
        ("either 1,23 or", Fraction(23)),
        ("$12.50", Fraction(25, 2)),
        ("-$3", Fraction(-3)),
        ("$-3", Fraction(-3)),
        ("It is -3.", Fraction(-3)),
        ("It is \u22123.", Fraction(-3)),
        ("10-3", Fraction(3)),
        ("10 - 3", Fraction(3)),
        ("10 - 3 = 7.", Fraction(7)),
        ("x-3", Fraction(3)),
        ("(2)-3", Fraction(3)),
        ("(-3)", Fraction(-3)),
        ("12.", Fraction(12)),
        (".5", Fraction(1, 2)),
        ("50%", Fraction(50)),
        ("1.5e3", Fraction(1500)),
        ("1e-07", Fraction(1, 10_000_000)),
        ("1/2", Fraction(1, 2)),
        ("-1/2", Fraction(-1, 2)),
        ("60/5=12", Fraction(12)),
        ("1 / 2", Fraction(2)),
        ("5/0", None),
        ("5kg", Fraction(5)),
        ("7 molecules of H2O", Fraction(7)),
        ("\\boxed{42}", Fraction(42)),
        ("**18**", Fraction(18)),
        ("7 and then 8 apples", Fraction(8)),
        ("no number", None),
        ("", None),
        ("9" * 101, None),
    ],
)
def test_the_last_number_of_a_text(text: str, value: Fraction | None) -> None:
    assert parse_last_number(text) == value


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("so 12.50 dollars", "12.5", 1.0),
        ("0.5", "1/2", 1.0),
        ("1/3", "0.333", 0.0),
        ("3 + 4 = 7\n#### 7", "#### 7", 1.0),
        ("7 or 8", "7", 0.0),
        ("seven", "7", 0.0),
        ("", "7", 0.0),
    ],
)
def test_last_number_compares_exact_values(text: str, answer: str, reward: float) -> None:
    assert last_number(text, answer) == reward


def test_a_text_without_number_never_matches_an_answer_without_number() -> None:
    assert last_number("none", "none") == 0.0


@given(st.integers(-(10**12), 10**12), st.booleans())
def test_an_integer_is_found_with_and_without_grouping(value: int, grouped: bool) -> None:
    written = f"{value:,}" if grouped else str(value)
    assert last_number(f"First 5 then {written}.", str(value)) == 1.0


@given(st.integers(-(10**6), 10**6), st.integers(0, 999))
def test_a_decimal_is_found_exactly(whole: int, thousandths: int) -> None:
    text = f"about 3, precisely {whole}.{thousandths:03d}."
    sign = -1 if whole < 0 else 1
    assert parse_last_number(text) == whole + sign * Fraction(thousandths, 1000)


@given(st.text())
def test_any_text_gets_a_verdict(text: str) -> None:
    assert last_number(text, "7") in (0.0, 1.0)


def test_a_long_repetitive_text_is_scored_at_once() -> None:
    """Time grows with the length, not with its square: these would take minutes otherwise."""
    assert last_number("1" + ",000" * 60_000 + ",0", "7") == 0.0
    assert last_number("1" * 200_000, "7") == 0.0


def test_exact_match_forgives_only_white_space_around() -> None:
    assert exact_match(" 013458\n", "013458") == 1.0
    assert exact_match("013 458", "013458") == 0.0
    assert exact_match("13458", "013458") == 0.0


def test_last_word_looks_at_nothing_before_it() -> None:
    assert last_word("9 1 348", "348") == 1.0
    assert last_word("348 9", "348") == 0.0
    assert last_word("348.", "348") == 0.0
    assert last_word("  ", "348") == 0.0
