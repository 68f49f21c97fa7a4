"""The nearest known word: what a message suggests when a user mistyped one. Standard library only."""

from collections.abc import Iterable
from difflib import SequenceMatcher

# Below this similarity a suggestion confuses more than it helps.
_CUTOFF = 0.6
# A right last part in the wrong section (`sampling.group_size`) ranks just below one slip in the whole key.
_LEAF_WEIGHT = 0.85


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The entry of `known` most like `word`, or None when nothing is like it.

    Dotted keys are compared as a whole and by their last part, so that `lr` and `optimizer.lr` find `trainer.lr`.
    """
    scored = [(_similarity(word, candidate), candidate) for candidate in known]
    best = max(scored, default=(0.0, ""), key=lambda pair: pair[0])
    return best[1] if best[0] >= _CUTOFF else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean X?"`, or the empty string."""
    found = nearest(word, known)
    return f"; did you mean {found}?" if found else ""


def _similarity(word: str, candidate: str) -> float:
    word, candidate = word.lower(), candidate.lower()
    matcher = SequenceMatcher(None, word, candidate, autojunk=False)
    # The letters without their order weigh a little: they tell two swapped letters from two wrong ones.
    whole = 0.9 * matcher.ratio() + 0.1 * matcher.quick_ratio()
    if "." not in candidate:
        return whole
    leaves = SequenceMatcher(None, word.rpartition(".")[2], candidate.rpartition(".")[2], autojunk=False).ratio()
    # The small share of `whole` decides between equal last parts in different sections.
    return max(whole, _LEAF_WEIGHT * leaves + 0.1 * whole)
