"""What is known of the KV that tokens attend to, against values by hand and a simulation of every position."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.config.schema import EngineConfig
from pipelinerl.metrics.provenance import OldContext, kv_metrics, old_context
from pipelinerl.types import GroupMeta, Outcome, RolloutMeta, TurnMeta


def simulated(turns: list[TurnMeta]) -> tuple[list[float], int]:
    """The fraction for each sampled token, and the largest age, by writing down who made each position."""
    fractions, oldest, before = [], 0, 0
    for turn in turns:
        before += turn.context
        versions = [version for version, count in turn.runs for _ in range(count)]
        made: list[int] = []
        for c, version in enumerate(versions):
            if c == 0 or c in turn.kv_from:
                made = [version] * (before + c)
            else:
                made.append(version)  # of the position that this step processes
            assert len(made) == before + c
            fractions.append(sum(maker < version for maker in made) / len(made))
            oldest = max(oldest, version - min(made))
        before += len(versions)
    return fractions, oldest


def test_an_update_in_mid_completion_by_hand() -> None:
    found = old_context([TurnMeta(4, ((7, 2), (8, 3)))])
    assert found.total == pytest.approx(5 / 6 + 5 / 7 + 5 / 8)
    assert found == OldContext(5, found.total, 5 / 6, 1)


def test_kv_that_was_made_anew_is_not_old() -> None:
    assert old_context([TurnMeta(4, ((7, 2), (8, 3)), kv_from=(2,))]) == OldContext(5, 0.0, 0.0, 0)
    # at token 2 the KV is kept, at token 4 made anew, at token 5 kept: only 4 + 4 positions of those are older
    found = old_context([TurnMeta(4, ((1, 2), (2, 2), (3, 1), (5, 1)), kv_from=(4,))])
    assert found.total == pytest.approx(5 / 6 + 5 / 7 + 0 + 8 / 9)
    assert (found.largest, found.age_max) == (8 / 9, 2)


def test_every_turn_prefills_its_whole_context_again() -> None:
    first, second = TurnMeta(3, ((1, 1), (2, 1))), TurnMeta(2, ((2, 2),))
    found = old_context([first, second])
    assert (found.tokens, found.total) == (4, pytest.approx(3 / 4))
    third = TurnMeta(1, ((2, 1), (4, 1)))  # its first token follows 3 + 2 + 2 + 2 + 1 = 10 tokens
    assert old_context([first, second, third]).total == pytest.approx(3 / 4 + 10 / 11)


@st.composite
def turns(draw: st.DrawFn) -> list[TurnMeta]:
    made, version = [], 0
    for _ in range(draw(st.integers(1, 3))):
        counts = draw(st.lists(st.integers(1, 6), max_size=4))
        runs = []
        for count in counts:
            version += draw(st.integers(1, 3))
            runs.append((version, count))
        starts = list(accumulate(counts, initial=0))[1:-1]
        anew = tuple(start for start in starts if draw(st.booleans()))
        made.append(TurnMeta(draw(st.integers(1, 5)), tuple(runs), anew))
    return made


@given(turns())
def test_it_is_what_a_simulation_of_every_position_finds(made: list[TurnMeta]) -> None:
    fractions, oldest = simulated(made)
    found = old_context(made)
    assert found.tokens == len(fractions)
    assert found.total == pytest.approx(sum(fractions), abs=1e-12)
    assert found.largest == pytest.approx(max(fractions, default=0.0), abs=1e-12)
    assert found.age_max == oldest


@given(turns())
def test_recomputing_at_every_update_leaves_no_old_context(made: list[TurnMeta]) -> None:
    anew = [TurnMeta(t.context, t.runs, tuple(accumulate([n for _, n in t.runs], initial=0))[1:-1]) for t in made]
    assert old_context(anew).total == 0 and old_context(anew).age_max == 0


def group(*turns_of: TurnMeta, outcome: Outcome = Outcome.OK) -> GroupMeta:
    rollouts = tuple(RolloutMeta(1.0, outcome, {}, 0, 0, 0, {}, "", (turn,)) for turn in turns_of)
    return GroupMeta(0, "train/0", 0, rollouts, 1.0)


def test_metrics_are_over_the_trained_tokens() -> None:
    old, new = TurnMeta(4, ((7, 2), (9, 3))), TurnMeta(4, ((9, 5),))
    errored = group(TurnMeta(4, ((1, 2), (9, 3))), outcome=Outcome.ENV_ERROR)
    metrics = kv_metrics([group(old, new), errored], EngineConfig())
    assert metrics == {
        "kv/old_context_fraction": pytest.approx((5 / 6 + 5 / 7 + 5 / 8) / 10),
        "kv/old_context_fraction_max": 5 / 6,
        "kv/age_max": 2.0,
    }
    assert kv_metrics([errored], EngineConfig()) == {}


def test_with_prefixes_shared_between_versions_nothing_is_claimed() -> None:
    found = [group(TurnMeta(4, ((7, 2), (9, 3))))]
    assert kv_metrics(found, EngineConfig(prefix_caching=True)) == {}
    assert kv_metrics(found, EngineConfig(prefix_caching=True, cache_salt="version"))
