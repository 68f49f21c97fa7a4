"""The policy: tempered logprobs, entropy, the fp32 head, and gradients that do not depend on chunks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config
from transformers.cache_utils import DynamicCache

from pipelinerl.config.schema import ModelConfig
from pipelinerl.errors import ConfigError, EnvironmentProblem
from pipelinerl.trainer.attention import ATTENTION, runs_of_equal_length
from pipelinerl.trainer.model import PolicyModel, compile_layers, load_policy

VOCABULARY = 40
ROWS = [torch.arange(n) * 11 % VOCABULARY for n in (9, 9, 4, 1)]
STARTS = (0, 9, 18)  # of the rows that predict something


def build(
    *,
    attention: str = ATTENTION,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    window: int | None = None,
) -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=0,  # the first layer with the window
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.train()


def policy(hf: PreTrainedModel, temperature: float = 1.0, chunk: int = 100, head: str = "float32") -> PolicyModel:
    return PolicyModel(hf, temperature, getattr(torch, head), chunk)


def run(model: PolicyModel, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Logprob and entropy at every position of the packed rows that has a next token."""
    lengths = [len(row) for row in ROWS]
    ids = torch.cat(ROWS)
    positions = torch.cat([torch.arange(s, s + n - 1) for s, n in zip(STARTS, lengths[:-1], strict=True)])
    restarting = torch.cat([torch.arange(n) for n in lengths])
    logprobs, entropies = model(
        ids, restarting, runs_of_equal_length(lengths), positions, ids[positions + 1], entropy_grad
    )
    return logprobs, entropies


def packed(model: PolicyModel, lengths: list[int]) -> Tensor:
    """Logprob of the next token at every position of a row but the last."""
    ids = torch.arange(sum(lengths)) * 11 % VOCABULARY
    restarting = torch.cat([torch.arange(n) for n in lengths])
    at = torch.arange(len(ids) - 1)
    logprobs: Tensor = model(ids, restarting, runs_of_equal_length(lengths), at, ids[at + 1])[0]
    return logprobs


def reference(model: PreTrainedModel, temperature: float) -> tuple[Tensor, Tensor]:
    """The same of each row alone, by log_softmax of the logits that transformers computes."""
    logprobs, entropies = [], []
    for row in ROWS[:-1]:
        log_p = torch.log_softmax(model(row[None]).logits[0, :-1] / temperature, dim=-1)
        logprobs.append(log_p.gather(-1, row[1:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def gradients(model: PreTrainedModel, logprobs: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every token has another weight. The model's gradients are cleared."""
    (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    model.zero_grad()
    return found


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(actual[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logprobs_entropy_and_gradients_are_those_of_the_tempered_softmax(temperature: float, tied: bool) -> None:
    ours, plain = build(tied=tied), build(attention="sdpa", tied=tied)
    logprobs, entropies = run(policy(ours, temperature))
    expected_logprobs, expected_entropies = reference(plain, temperature)
    torch.testing.assert_close(logprobs, expected_logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, atol=1e-5, rtol=1e-5)
    assert not entropies.requires_grad
    assert_same_gradients(gradients(ours, logprobs), gradients(plain, expected_logprobs))


def test_a_tied_head_adds_to_the_gradient_of_the_embedding() -> None:
    """Token 39 never occurs as an input, so its row gets a gradient through the head alone."""
    assert all(39 not in row for row in ROWS)
    tied, untied = build(tied=True), build(tied=False)
    through_both = gradients(tied, run(policy(tied))[0])
    through_input = gradients(untied, run(policy(untied))[0])
    assert through_both["model.embed_tokens.weight"][39].abs().max() > 0
    assert through_input["model.embed_tokens.weight"][39].abs().max() == 0
    assert "lm_head.weight" not in through_both and "lm_head.weight" in through_input


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_change_neither_values_nor_gradients(chunk: int) -> None:
    model = build()
    whole, cut = run(policy(model, 0.8)), run(policy(model, 0.8, chunk))
    torch.testing.assert_close(cut[0], whole[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(cut[1], whole[1], atol=1e-6, rtol=1e-6)
    assert_same_gradients(gradients(model, cut[0]), gradients(model, whole[0]))


def test_gradient_checkpointing_changes_neither_values_nor_gradients() -> None:
    model = build()
    expected = run(policy(model))[0]
    expected_gradients = gradients(model, expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    actual = run(policy(model))[0]
    assert torch.equal(actual, expected)
    assert_same_gradients(gradients(model, actual), expected_gradients)


def test_entropies_have_a_gradient_when_asked() -> None:
    ours, plain = build(), build(attention="sdpa")
    entropies = run(policy(ours, 0.8), entropy_grad=True)[1]
    assert_same_gradients(gradients(ours, entropies), gradients(plain, reference(plain, 0.8)[1]))


def test_compiled_layers_give_the_eager_values_and_gradients_and_are_compiled_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For rows of different lengths and numbers of sequences. Cached keys are attended to by the eager layers."""
    from torch._dynamo import config as dynamo
    from torch._dynamo.utils import counters

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    eager, compiled = policy(build()), policy(build())
    rows = [[9, 4], [6, 6, 6, 2, 1], [11]]
    with dynamo.patch(disable=False):
        compile_layers(compiled)
        graphs = []
        for lengths in rows:
            expected, actual = (packed(model, lengths) for model in (eager, compiled))
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
            assert_same_gradients(gradients(compiled.hf, actual), gradients(eager.hf, expected))
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs[0] > 0 and set(graphs) == {graphs[0]}
        with torch.no_grad():
            caches = DynamicCache(), DynamicCache()
            for piece in torch.arange(8).split(5):
                assert torch.equal(compiled.extend(piece, caches[0]), eager.extend(piece, caches[1]))


@pytest.mark.parametrize("window", [None, 4], ids=["causal", "window"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sequence_in_pieces_has_the_hidden_states_of_the_whole(window: int | None, checkpointing: bool) -> None:
    """Each piece attends to the cached keys and values of those before it, also in train mode under checkpointing."""
    model = policy(build(window=window))
    if checkpointing:
        model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(20) * 7 % VOCABULARY
    with torch.no_grad():
        whole = model.hidden(ids, torch.arange(20), [(1, 20)])
        cache = DynamicCache()
        pieces = [model.extend(piece, cache) for piece in ids.split([9, 1, 7, 3])]
    assert model.hf.training and all(layer.training for layer in model.hf.base_model.layers)
    without_window = policy(build()).hidden(ids, torch.arange(20), [(1, 20)])
    torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(whole, without_window) == (window is None)


def test_scores_at_several_temperatures_are_those_of_one_at_a_time() -> None:
    model = policy(build(), chunk=3)
    hidden = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(8)
    logprobs, argmax = model.score_at(hidden, targets, (0.5, 1.7))
    for row, temperature in zip(logprobs, (0.5, 1.7), strict=True):
        model.temperature = temperature
        assert torch.equal(row, model.score(hidden, targets)[0].detach())
    assert torch.equal(argmax, (hidden @ model.hf.get_output_embeddings().weight.T).argmax(-1))
    assert not logprobs.requires_grad


def scored(head_weight: Tensor, hidden: Tensor, head: str) -> Tensor:
    """Logprob of token 0 from hidden states [M, 32] by a head of this weight and dtype."""
    hf = build(dtype=torch.bfloat16)
    with torch.no_grad():
        hf.get_output_embeddings().weight.copy_(head_weight)
    return policy(hf, head=head).score(hidden.bfloat16(), torch.zeros(len(hidden), dtype=torch.long))[0].detach()


def test_the_fp32_head_multiplies_the_rounded_weight_in_fp32() -> None:
    """Three candidates that differ by far more than the tolerance: rounded weight in fp32 (what the engine does),
    unrounded master weight in fp32, everything in bf16."""
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(VOCABULARY, 32, generator=generator)
    hidden = torch.randn(64, 32, generator=generator).bfloat16().float()

    def expected(weight: Tensor) -> Tensor:
        return torch.log_softmax(hidden @ weight.T, dim=-1)[:, 0]

    fp32_head = scored(master, hidden, "float32")
    torch.testing.assert_close(fp32_head, expected(master.bfloat16().float()), atol=2e-5, rtol=1e-5)
    assert (fp32_head - expected(master)).abs().mean() > 1e-3
    assert (fp32_head - scored(master, hidden, "bfloat16")).abs().mean() > 1e-3


def test_a_bf16_policy_returns_fp32_and_bf16_gradients() -> None:
    model = build(dtype=torch.bfloat16)
    logprobs, entropies = run(policy(model))
    assert logprobs.dtype == entropies.dtype == torch.float32
    assert {g.dtype for g in gradients(model, logprobs).values()} == {torch.bfloat16}
    expected, _ = reference(build(attention="sdpa", dtype=torch.bfloat16).float(), 1.0)
    assert (logprobs - expected).abs().mean() < 0.05


def test_a_loaded_policy_is_the_saved_model(tmp_path: Path) -> None:
    plain = build(attention="sdpa")
    plain.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), dtype="float32")
    loaded = load_policy(config, 0.9, 5, gradient_checkpointing=True)
    assert loaded.training and loaded.hf.is_gradient_checkpointing
    torch.testing.assert_close(run(loaded)[0], reference(plain, 0.9)[0], atol=1e-5, rtol=1e-5)


def test_a_path_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=f"model.path={tmp_path}"):
        load_policy(ModelConfig(path=str(tmp_path)), 1.0, 5, False)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "bfloat16"), ("cuda", "float32")])
def test_varlen_attention_is_refused_where_it_cannot_run(tmp_path: Path, device: str, dtype: str) -> None:
    config = ModelConfig(path=str(tmp_path), dtype=dtype)
    with pytest.raises(ConfigError, match=f"trainer.attention=varlen needs .* here are {device} and {dtype}"):
        load_policy(config, 1.0, 5, False, attention="varlen", device=torch.device(device))
