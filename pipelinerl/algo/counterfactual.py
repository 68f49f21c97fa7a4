"""What each correction masks or caps, and what each one that is off would, at its usual parameter.

From the logprobs that a step has anyway:

    correction/<name>_frac            fraction of the sampled tokens that a correction in force masks or caps
    counterfactual/<name>/frac        fraction of the sampled tokens that one which is off would mask or cap
    counterfactual/<name>/grad_share  the share of the gradient that these tokens carry: of the sum over tokens of
                                      |d loss / d logprob|, loss being the one that is trained on, all terms included

A rule that would mask 1% of the tokens and 40% of the gradient is another thing than one that masks 40% and 1%.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipelinerl.algo.corrections import CORRECTIONS, DEFAULTS, affected_by
from pipelinerl.algo.objective import Objective
from pipelinerl.config.schema import CorrectionConfig

RULES = tuple(CORRECTIONS)
KINDS = ("on", "off", "affected", "gradient")  # tokens under the rule, without it, touched by it, and their gradient
SUM_NAMES = ("gradient", *(f"{rule}_{kind}" for rule in RULES for kind in KINDS))


@torch.no_grad()
def rule_sums(found: Objective, config: CorrectionConfig, gradient: Tensor) -> Tensor:
    """[len(SUM_NAMES)] float64, additive. `gradient` [N] is d loss / d logprob of the sampled tokens."""
    size = gradient.double().abs()
    sums = [size.sum()]
    enabled = {rule: value for rule in RULES if (value := getattr(config, rule)) is not None}
    rest = {rule: enabled.get(rule, getattr(DEFAULTS, rule)) for rule in RULES if rule not in found.correction.masked}
    touched_by = {**found.correction.masked, **affected_by(rest, found.correction_inputs)}
    for rule in RULES:
        on, touched = rule in enabled, touched_by[rule]
        count = size.new_full((), len(size))
        none = torch.zeros_like(count)
        sums += [count, none] if on else [none, count]
        sums += [touched.double().sum(), torch.where(touched, size, 0.0).sum()]
    return torch.stack(sums)


def rule_metrics(sums: Sequence[float]) -> dict[str, float]:
    """The metrics of `rule_sums` added up. Shares of a gradient that is 0 are left out."""
    total: Mapping[str, float] = dict(zip(SUM_NAMES, sums, strict=True))
    metrics = {}
    for rule in RULES:
        on, off, touched, gradient = (total[f"{rule}_{kind}"] for kind in KINDS)
        if on > 0:
            metrics[f"correction/{rule}_frac"] = touched / on
        if off > 0:
            metrics[f"counterfactual/{rule}/frac"] = touched / off
            if total["gradient"] != 0:
                metrics[f"counterfactual/{rule}/grad_share"] = gradient / total["gradient"]
    return metrics
