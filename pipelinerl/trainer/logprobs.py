"""Logprob and entropy of selected tokens from hidden states and head weight, without the [tokens, vocabulary] logits.

The logits are made block by block, `chunk` tokens times `TILE` words, and a block is reduced at once to a few numbers
per token. The backward pass makes the blocks again from the same inputs: a fourth matrix product where autograd over
whole logits needs three, for a fraction of the memory. On a CPU, blocks that stay in the cache and are not allocated
anew make up for it (scripts/bench/logprobs.py measures both).

Words are the outer loop and tokens the inner one, so that a weight stored in bf16 is upcast one tile at a time, and its
gradient is summed over all tokens in fp32 before it is rounded.

M = tokens, V = vocabulary, H = hidden size. With z = (hidden W^T + bias) / temperature, p = softmax(z), t = the token:

    logprob = z_t - log sum exp z          d logprob / d z = onehot(t) - p
    entropy = -sum p log p                 d entropy / d z = -p (log p + entropy)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4096  # words whose logits exist at one time


@dataclass(frozen=True, slots=True)
class Projection:
    """How hidden states become logits."""

    temperature: float
    dtype: torch.dtype  # hidden states and weight are multiplied in it
    chunk: int  # tokens whose logits exist at one time

    @property
    def result(self) -> torch.dtype:
        """Of all that follows the product: float32, or float64 after a product in float64."""
        return torch.promote_types(self.dtype, torch.float32)


def token_logprobs(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [M] int64
    projection: Projection,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logprobs of `targets` [M] and entropies [M] of the distributions, in nats, at the temperature.

    Gradients reach hidden states, weight and bias in their own dtypes, where these require one; through the entropies
    only with `entropy_grad`. What is not finite in a row of `hidden` or in `weight` makes the results not finite.
    """
    assert hidden.ndim == 2 and targets.shape == hidden.shape[:1], (hidden.shape, targets.shape)
    logprobs, entropies = _TokenLogprobs.apply(hidden, weight, bias, targets, projection, entropy_grad)
    return logprobs, entropies


@torch.no_grad()
def most_likely_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None, projection: Projection) -> Tensor:
    """The token with the largest logit [M], the first of several."""
    blocks = _Blocks(hidden, weight, bias, projection)
    best = torch.full_like(hidden[:, 0], -torch.inf, dtype=projection.result)
    token = torch.zeros_like(best, dtype=torch.long)
    for tile in blocks.tiles():
        for rows in blocks.rows:
            value, index = blocks.logits(rows, tile).max(dim=1)
            better = value > best[rows]
            best[rows] = torch.where(better, value, best[rows])
            token[rows] = torch.where(better, index + tile.words.start, token[rows])
    return token


class _TokenLogprobs(torch.autograd.Function):
    """Keeps its inputs and two numbers per token from forward to backward.

    The weight is kept as the parameter itself, not as a copy: where its storage is swapped in between (ZeRO-3), the
    backward pass reads what is there then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        projection: Projection,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        chosen, log_z, entropies = _reduce(_Blocks(hidden, weight, bias, projection), targets)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropies if entropy_grad else None)
        ctx.projection = projection
        if not entropy_grad:
            ctx.mark_non_differentiable(entropies)
        return chosen - log_z, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_z, entropies = ctx.saved_tensors
        projection: Projection = ctx.projection
        result = projection.result
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        blocks = _Blocks(hidden, weight, bias, projection)
        # The gradient with respect to a token's logits is its row of the blocks times its factor. Factors go into the
        # vectors of size H on either side of the product: that saves a pass over every block.
        factor = (torch.ones_like(log_z) if entropies is not None else grad_logprobs) / -projection.temperature
        scaled = (hidden.to(result) * factor[:, None]).to(projection.dtype) if for_weight else hidden
        grad_hidden = torch.zeros_like(hidden, dtype=result) if for_hidden else None
        grad_weight = torch.empty_like(weight) if for_weight else None
        grad_bias = torch.empty_like(bias) if for_bias else None
        for tile in blocks.tiles():
            of_weight = None if grad_weight is None else grad_weight[tile.words].zero_().to(result)
            of_bias = None if grad_bias is None else grad_bias[tile.words].zero_().to(result)
            for rows in blocks.rows:
                block = blocks.logits(rows, tile).sub_(log_z[rows, None])
                if entropies is None:
                    block.exp_()
                    at_target = -torch.ones_like(log_z[rows])
                else:
                    p = torch.exp(block, out=blocks.second(block))
                    block.add_(entropies[rows, None]).mul_(grad_entropies[rows, None])
                    block.add_(grad_logprobs[rows, None]).mul_(p)
                    at_target = -grad_logprobs[rows]
                tile.add_at_targets(block, targets[rows], at_target)
                rounded = block.to(projection.dtype)
                if grad_hidden is not None:
                    _add_product(grad_hidden[rows], rounded, tile.weight)
                if of_weight is not None:
                    _add_product(of_weight, rounded.T, scaled[rows])
                if of_bias is not None:
                    of_bias.addmv_(block.T, factor[rows])
            if grad_weight is not None and of_weight is not None:
                grad_weight[tile.words] = of_weight
            if grad_bias is not None and of_bias is not None:
                grad_bias[tile.words] = of_bias
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(factor[:, None]).to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _reduce(blocks: "_Blocks", targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logit of each target, logarithm of the partition sum, and entropy, each [M]."""
    # Of every tile and token: the largest logit, and the sums of e^x and of x e^x, x being the distance from it.
    largest, total, moment = (blocks.new_empty(blocks.tile_count, len(targets)) for _ in range(3))
    chosen = torch.zeros_like(targets, dtype=largest.dtype)
    for index, tile in enumerate(blocks.tiles()):
        for rows in blocks.rows:
            logits = blocks.logits(rows, tile)
            chosen[rows] += tile.at_targets(logits, targets[rows])
            # Clamped: a tile in which all is -inf adds nothing to the sums, and no NaN.
            peak = logits.amax(dim=1).clamp_(min=torch.finfo(logits.dtype).min)
            exp = torch.exp(logits.sub_(peak[:, None]), out=blocks.second(logits))
            largest[index, rows] = peak
            total[index, rows] = exp.sum(dim=1)
            moment[index, rows] = exp.mul_(logits).sum(dim=1)
    peak = largest.amax(dim=0)
    distance = largest - peak
    scale = distance.exp()
    partition = (scale * total).sum(dim=0)
    mean = (scale * (moment + distance * total)).sum(dim=0) / partition  # of the distance of a logit from the peak
    return chosen, peak + partition.log(), partition.log() - mean


@dataclass(frozen=True, slots=True, eq=False)
class _Tile:
    """Some neighbouring words of the vocabulary."""

    words: slice
    weight: Tensor  # [words, H] in the dtype of the product
    bias: Tensor | None  # [words] likewise

    def at_targets(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logit of each token's target [rows]; 0 where the target is in another tile."""
        index, inside = self._find(targets)
        return torch.where(inside, logits.gather(1, index[:, None])[:, 0], 0.0)

    def add_at_targets(self, block: Tensor, targets: Tensor, values: Tensor) -> None:
        """Add each token's value [rows] at its target, if that is in this tile."""
        index, inside = self._find(targets)
        block.scatter_add_(1, index[:, None], torch.where(inside, values, 0.0)[:, None])

    def _find(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        index = targets - self.words.start
        last = len(self.weight) - 1
        return index.clamp(0, last), (index >= 0) & (index <= last)


class _Blocks:
    """The logits of `chunk` tokens times `TILE` words at a time, always in the same memory."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, projection: Projection):
        self._projection = projection
        self._hidden, self._weight, self._bias = hidden.to(projection.dtype), weight, bias
        self.rows = _cut(len(hidden), projection.chunk)
        self._words = _cut(len(weight), TILE)
        size = min(projection.chunk, len(hidden)) * min(TILE, len(weight))
        self._logits, self._second = self.new_empty(size), self.new_empty(0)

    @property
    def tile_count(self) -> int:
        return len(self._words)

    def new_empty(self, *shape: int) -> Tensor:
        return self._hidden.new_empty(shape, dtype=self._projection.result)

    def tiles(self) -> Iterator[_Tile]:
        dtype = self._projection.dtype
        for words in self._words:
            bias = None if self._bias is None else self._bias[words].to(dtype)
            yield _Tile(words, self._weight[words].to(dtype), bias)

    def logits(self, rows: slice, tile: _Tile) -> Tensor:
        """[rows, words] at the temperature. The next call overwrites it."""
        hidden = self._hidden[rows]
        out = self._logits[: len(hidden) * len(tile.weight)].view(len(hidden), len(tile.weight))
        product = out if out.dtype == hidden.dtype else None
        if tile.bias is None:
            product = torch.mm(hidden, tile.weight.T, out=product)
        else:
            product = torch.addmm(tile.bias, hidden, tile.weight.T, out=product)
        if product is not out:
            out.copy_(product)
        return out if self._projection.temperature == 1.0 else out.div_(self._projection.temperature)

    def second(self, like: Tensor) -> Tensor:
        """Memory for another block of this shape, always the same."""
        if not len(self._second):
            self._second = torch.empty_like(self._logits)
        return self._second[: like.numel()].view(like.shape)


def _cut(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where `total` may have a wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
