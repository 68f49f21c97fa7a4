"""Scorers: pure functions of plain arguments that run in grader processes.

A scorer returns the reward, or a mapping of named parts whose sum is the reward; every value a finite number. To
import a scorer's module is part of starting a grader, so this one needs nothing but the standard library.
"""

import re
from collections import deque
from decimal import Decimal
from fractions import Fraction
from zlib import crc32

MAX_LITERAL = 100  # characters; a longer run of digits is no answer, and big integers are slow

_GROUPED = r"\d{1,3}(?:,\d{3}){1,10}(?!,?\d)"
_NUMBER = re.compile(
    r"(?<![A-Za-z_\d])"  # the 2 of H2O is no number
    r"(?P<sign>(?:(?<![\w)\]}])[-\u2212])?)"  # in 5-3 and x-3 the minus is an operator
    r"\$?"
    r"(?:(?P<top>\d+)/(?P<bottom>\d+)(?!\.?\d)"
    rf"|(?P<decimal>(?:{_GROUPED}|\d+)(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d{{1,3}}(?!\d))?)",
    re.ASCII,
)


def exact_match(text: str, answer: str) -> float:
    """1 when `text` is `answer`, but for white space around them."""
    return float(text.strip() == answer.strip())


def last_word(text: str, answer: str) -> float:
    """1 when the last white-space separated word of `text` is `answer`."""
    return float(text.split()[-1:] == [answer.strip()])


def last_number(text: str, answer: str) -> float:
    """1 when the last number in `text` equals the last number in `answer`; 0 when `text` has none."""
    given = parse_last_number(text)
    return float(given is not None and given == parse_last_number(answer))


def toss(text: str) -> float:
    """A coin: 0 or 1, the same whenever `text` is."""
    return float(crc32(text.encode("utf-8", "surrogatepass")) & 1)


def parse_last_number(text: str) -> Fraction | None:
    """The exact value of the last number in `text`, or None.

    Read as numbers: `42`, `-3`, `1,234`, `$12.50`, `.5`, `12.` (a full stop), `50%` (as 50), `1.5e3`, and `1/2`
    written without spaces (as one half). Not read as one number: mixed numbers (`1 1/2` ends in one half), other
    groupings (`1,23` ends in 23), and digits that follow a letter (`H2O`).
    """
    last = deque(_NUMBER.finditer(text), maxlen=1)
    if not last or len(last[0].group()) > MAX_LITERAL:
        return None
    match = last[0]
    if match["top"] is not None:
        value = Fraction(int(match["top"]), int(match["bottom"])) if int(match["bottom"]) else None
    else:
        value = Fraction(Decimal(match["decimal"].replace(",", "") + (match["exponent"] or "")))
    return -value if value is not None and match["sign"] else value
