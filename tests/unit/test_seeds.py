"""Seeds of completions."""

from itertools import product

from pipelinerl.rollout.seeds import completion_seed


def test_every_completion_of_every_purpose_has_a_seed_of_its_own() -> None:
    seeds = [
        completion_seed(run, purpose, group, rollout, turn)
        for run, purpose, group, rollout, turn in product(
            (0, 1), ("train", "eval", "probe"), range(12), range(12), (0, 1)
        )
    ]
    assert len(set(seeds)) == len(seeds) == 2 * 3 * 12 * 12 * 2
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)  # torch's CPU generator takes 32 bits
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_in_every_process() -> None:
    assert completion_seed(0, "train", 17, 3, 0) == 6767809738332170622
