"""Loading a configuration: every shipped file is valid, every user mistake is named with key, value and remedy."""

import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from pipelinerl.config.files import conf_dir, group_options
from pipelinerl.config.hints import nearest
from pipelinerl.config.keys import known_keys
from pipelinerl.config.load import load_config, load_run_config
from pipelinerl.config.preflight import TINY_MODELS, preflight
from pipelinerl.config.schema import JsonlTask, ReinforceIS, RunConfig, SortTask
from pipelinerl.errors import ConfigError, EnvironmentProblem
from tests.unit.configs import problems_of

# A composition takes a tenth of a second, so each one below is of one option of every group.
OPTIONS = group_options()
WEIGHTS = {
    "decoupled_ppo": "tis_token",
    "a3po": "tis_sequence",
}  # objectives that need a weight, which no other may have
MASKS = [option for option in OPTIONS["algo/correction"] if option not in WEIGHTS.values()]
DEVICES = [("local_cpu", "cpu"), ("local_gpu", "gpu"), ("ray", "gpu"), ("ray_cpu", "cpu")]


def rows() -> list[list[str]]:
    """Overrides that together name every option of every group but the experiments, in pairs that make sense."""
    masks, found = iter(MASKS), []
    for number, algo in enumerate(OPTIONS["algo"]):
        cluster, engine = DEVICES[number % len(DEVICES)]
        chosen = {"algo": algo, "algo/correction": WEIGHTS.get(algo) or next(masks, "none")}
        chosen |= {"cluster": cluster, "engine": engine}
        for group in OPTIONS.keys() - {"experiment"}:
            chosen.setdefault(group, OPTIONS[group][number % len(OPTIONS[group])])
        found.append([f"{group}={option}" for group, option in chosen.items()])
        found[-1] += ["task.path=rows.jsonl"] if chosen["task"] == "jsonl" else []
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_file_in_conf_composes_and_validates(row: list[str]) -> None:
    config = load_config(row)
    assert isinstance(config, RunConfig)
    assert RunConfig.model_validate(config.dump()) == config
    # A correction preset sets what it is called after, and nothing else.
    correction = row[1].partition("=")[2]
    on = {name for name, value in config.algo.correction.model_dump().items() if value is not None}
    assert on == {"none": set(), "icepop_veto": {"icepop", "veto"}}.get(correction, {correction})


@pytest.mark.parametrize("experiment", OPTIONS["experiment"])
def test_every_experiment_validates_as_it_is(experiment: str) -> None:
    assert load_config([f"experiment={experiment}"]).name == experiment


def test_no_yaml_in_conf_is_out_of_the_reach_of_these_tests() -> None:
    files = {str(file.relative_to(conf_dir())) for file in conf_dir().rglob("*.y*ml")}
    named = {override.replace("=", "/") + ".yaml" for row in rows() for override in row if "task.path" not in override}
    assert files == {"config.yaml"} | named | {f"experiment/{option}.yaml" for option in OPTIONS["experiment"]}


def test_without_an_experiment_the_quickstart_is_meant() -> None:
    assert load_config([]) == load_config(["experiment=quickstart"])
    assert load_config([]).name == "quickstart"


def test_overrides_reach_every_kind_of_key() -> None:
    config = load_config(
        [
            "algo=reinforce_is",
            "algo.max_ratio=3",
            "trainer.lr=3e-6",
            "async.max_lag=4",
            "run_dir=out/a",
            "task.digits=5",
            "metrics.wandb.mode=disabled",
            "trainer.betas=[0.8,0.9]",
            "batch={group_size:4}",
        ]
    )
    assert isinstance(config.algo, ReinforceIS) and config.algo.max_ratio == 3.0
    assert isinstance(config.task, SortTask) and config.task.digits == 5
    assert config.trainer.lr == 3e-6
    assert config.trainer.betas == (0.8, 0.9)
    assert config.async_.lag_bound == 4
    assert config.metrics.wandb.mode == "disabled"
    assert config.run_dir == "out/a"
    assert (config.batch.group_size, config.batch.groups_per_step) == (4, load_config().batch.groups_per_step)


def test_sync_mode_needs_no_second_setting() -> None:
    assert load_config(["async.mode=sync"]).async_.lag_bound == 0
    assert load_config(["async.mode=one_step_off"]).async_.lag_bound == 1


def test_the_working_directory_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(["model.path=here/m"]).model.path == "here/m"


@pytest.mark.parametrize(("task", "model"), TINY_MODELS.items())
def test_a_missing_tiny_model_comes_with_the_command_that_makes_it(
    task: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EnvironmentProblem, match=f"run: pipelinerl make-tiny --task {task}$"):
        preflight(load_config([f"task={task}", f"model={model}"]))


# Mistakes in single keys. Those of different keys are made together, for all are reported at once.
MISTAKES = [
    # unknown keys, however they are written
    ("trainer.lrr=1", "trainer.lrr = 1: unknown key; did you mean trainer.lr?"),
    ("+trainer.lrs=1", "trainer.lrs = 1: unknown key; did you mean trainer.lr?"),
    ("++trainer.llr=1", "trainer.llr = 1: unknown key; did you mean trainer.lr?"),
    ("+new.key=1", "new.key = 1: unknown key"),
    ("asnyc.max_lag=3", "asnyc.max_lag = 3: unknown key; did you mean async.max_lag?"),
    ("async_.max_lag=3", "async_.max_lag = 3: unknown key; did you mean async.max_lag?"),
    ("sampling.group_size=4", "sampling.group_size = 4: unknown key; did you mean batch.group_size?"),
    ("lr=1e-5", "lr = 1e-05: unknown key; did you mean trainer.lr?"),
    ("metrics.wandb.modee=x", "metrics.wandb.modee = 'x': unknown key; did you mean metrics.wandb.mode?"),
    ("task.digit=4", "task.digit = 4: unknown key; did you mean task.digits?"),
    ("tasks=sort", "tasks = 'sort': unknown key; did you mean task?"),
    ("algo.clip_lo=0.1", "algo.clip_lo = 0.1: unknown key; did you mean algo.clip_low?"),
    ("algo.correction.vetoo=1", "algo.correction.vetoo = 1: unknown key; did you mean algo.correction.veto?"),
    ("algo.kl.coeff=1", "algo.kl.coeff = 1: unknown key; did you mean algo.kl.coef?"),
    (
        "algo.max_ratio=2",
        "algo.max_ratio = 2: no setting of algo.kind=ppo_clip, only of algo.kind=two_sided, reinforce_is, cispo, topr",
    ),
    ("algo.tau_positive=2", "algo.tau_positive = 2: no setting of algo.kind=ppo_clip, only of algo.kind=sapo"),
    ("task.path=x", "task.path = 'x': no setting of task.kind=sort, only of task.kind=jsonl"),
    # types and ranges
    ("trainer.lr=abc", "trainer.lr = 'abc': should be a number"),
    ("trainer.lr=true", "trainer.lr = true: should be a number"),
    ("trainer.lr=null", "trainer.lr = null: should be a number"),
    ("trainer.lr=-1", "trainer.lr = -1: should be greater than or equal to 0"),
    ("trainer.lr=nan", "trainer.lr = nan: should be a finite number"),
    ("steps=1.5", "steps = 1.5: should be a whole number"),
    ("steps=0", "steps = 0: should be greater than 0"),
    ("steps='\"5\"'", "steps = '\"5\"': should be a whole number"),
    ("metrics.plots=maybe", "metrics.plots = 'maybe': should be true or false"),
    ("model.path=null", "model.path = null: should be text"),
    ("name=2024", "name = 2024: should be text; quote it to make it text: '\"2024\"'"),
    ("run_dir=", "run_dir = '': should not be empty"),
    ("model.dtype=float16", "model.dtype = 'float16': should be bfloat16 or float32; did you mean bfloat16?"),
    ("trainer.zero_stage=4", "trainer.zero_stage = 4: should be 0, 1, 2 or 3"),
    ("engine.chunked_prefill=false", "engine.chunked_prefill = false: should be true"),
    ("trainer.betas=[0.9]", "trainer.betas = [0.9]: has too few values"),
    ("trainer.betas=[0.9,x]", "trainer.betas[1] = 'x': should be a number"),
    ("async=5", "async = 5: is a section; set async.mode, async.max_lag"),
    ("algo.advantage=loo", "algo.advantage = 'loo': should be rloo, grpo, dr_grpo, reinforce_pp, "),
    (
        "algo.aggregation=token",
        "algo.aggregation = 'token': should be token_mean, seq_mean_token_mean, seq_mean_token_sum, constant or "
        "prompt_mean; did you mean token_mean?",
    ),
    ("algo.correction.geometric=[0.9]", "algo.correction.geometric = [0.9]: has too few values"),
    ("algo.correction.icepop=2", "algo.correction.icepop = 2: should be a list"),
    ("algo.correction.veto=0", "algo.correction.veto = 0: should be greater than 0"),
    ("algo.kl.importance_cap=0.5", "algo.kl.importance_cap = 0.5: should be greater than or equal to 1"),
    ("journal.selection_window=0", "journal.selection_window = 0: should be greater than 0"),
    ("journal.selection=alarm", "journal.selection = 'alarm': should be stop, warn or off"),
    ("algo.entropy.anneal_steps=0", "algo.entropy.anneal_steps = 0: should be greater than 0"),
    ("batch.zero_variance=drop", "batch.zero_variance = 'drop': should be keep or refill"),
    ("reward.weights={match: x}", "reward.weights.match = 'x': should be a number"),
    ("model.path=???", "model.path: required; set model.path=..."),
]

# What stops before anything is composed, and what Hydra itself stops at.
MALFORMED = [
    # unknown options
    ("task=sortt", "task = 'sortt': no such option of the group task; did you mean sort?"),
    ("experiment=quickstrat", "experiment = 'quickstrat': no such option of the group experiment; did you mean quick"),
    ("task=sort_defaults", "task = 'sort_defaults': no such option"),
    ("trainer=3", "trainer = '3': no such option of the group trainer (cpu, gpu)"),
    ("task.kind=jsonl", "task.kind = 'jsonl': a kind is chosen by its group; task=OPTION"),
    ("algo={kind: reinforce_is}", "algo = '{kind: reinforce_is}': a kind is chosen by its group"),
    (
        "algo/correction=icepopp",
        "algo/correction = 'icepopp': no such option of the group algo/correction; did you mean ic",
    ),
    ("algo/corection=icepop", "algo/corection = 'icepop': no such group; did you mean algo/correction?"),
    ("+algo/nope=1", "algo/nope = '1': no such group"),
    (
        "algo.correction=icepop",
        "algo.correction = 'icepop': is a section; its presets are the group algo/correction=icepop",
    ),
    # syntax
    ("trainer.lr", "'trainer.lr': not a setting; write key=value"),
    ("=3", "'=3': not a setting; write key=value"),
    ("-x=1", "'-x=1': '-x' is no key"),
    ("steps=[1", "steps = '[1':"),
    ("run_dir=a(1)b", "run_dir = 'a(1)b':"),
    ("trainer.lr=1,2", "trainer.lr = '1,2': sweeps are not supported"),
    ("~trainer.lr", "'~trainer.lr': a setting cannot be removed"),
    ("task@x=sort", "'task@x=sort': '@' packages are not supported"),
    ("hydra.run.dir=x", "hydra.run.dir = 'x': Hydra's own settings have no effect; use run_dir=DIR"),
    # interpolation
    ("run_dir=${nope}", "run_dir = '${nope}': Interpolation key 'nope' not found"),
    ("run_dir=${oc.env:NO_SUCH_VARIABLE}", "run_dir = '${oc.env:NO_SUCH_VARIABLE}': KeyError raised"),
    ("steps=${steps}", "steps = '${steps}': Recursive interpolation"),
    # what an option needs
    ("task=jsonl", "task.path: required; set task.path=..."),
]

# Settings that contradict each other.
CONTRADICTIONS = [
    (["sampling.top_p=0.9"], "sampling.top_p=0.9 changes the sampled distribution"),
    (["model.head_dtype=bfloat16"], "model.head_dtype=bfloat16 with dtype=float32"),
    (["eval.samples=4"], "eval.samples=4 at temperature=0"),
    (
        ["eval.engine=dedicated", "eval.at_start=false"],
        "eval.engine=dedicated with eval.at_start=false and eval.every=0",
    ),
    (
        ["eval.engine=dedicated", "checkpoint.keep_best=true", "checkpoint.best_metric=eval/sort/accuracy"],
        "checkpoint.best_metric=eval/sort/accuracy with eval.engine=dedicated",
    ),
    (["engine=gpu"], "engine.kv_cache_mb=null with cluster.device=cpu"),
    (["cluster.address=auto"], "cluster.object_store_mb=256 is for a local cluster"),
    (["weights.backend=nccl"], "weights.backend=nccl needs GPUs, cluster.device=cpu has none"),
    (["weights.backend=ipc"], "weights.backend=ipc needs GPUs, cluster.device=cpu has none"),
    (["engine.pipeline_parallel=2"], "engine.pipeline_parallel=2 with cluster.device=cpu"),
    (["weights.every=4"], "async.max_lag=2 with weights.every=4"),
    (["engine.kv_policy=recompute_at_lag"], "engine.kv_policy=recompute_at_lag needs kv_max_lag"),
    (["engine.kv_max_lag=1"], "engine.kv_max_lag=1 does nothing with kv_policy=keep"),
    (
        ["engine.kv_policy=recompute_at_lag", "engine.kv_max_lag=3"],
        "engine.kv_max_lag=3 is above async.max_lag=2: no KV in use gets that old",
    ),
    *(
        ([f"{key}=5000"], f"{key}=5000 is not below cluster.stall_timeout_s=3600")
        for key in ("grading.timeout_s", "engine.start_timeout_s", "trainer.start_timeout_s", "weights.timeout_s")
    ),
    # one importance ratio, counted once
    (
        ["algo.correction.tis_token=2"],
        "algo.correction.tis_token with proximal=rollout: the objective's ratio holds that",
    ),
    (["algo=gspo", "algo.correction.tis_sequence=2"], "algo.correction.tis_sequence with proximal=rollout"),
    (
        ["algo=cispo", "algo.correction.tis_token=2"],
        "algo.correction.tis_token with an objective that holds the ratio to",
    ),
    (["algo.proximal=recompute"], "algo.proximal=recompute without an importance weight leaves the gap"),
    (["algo.proximal=interpolate"], "algo.proximal=interpolate without an importance weight leaves the gap"),
    (
        ["algo=decoupled_ppo", "algo.correction.tis_sequence=2"],
        "algo.correction.tis_token and correction.tis_sequence would count x twice",
    ),
    (
        ["algo=a3po", "algo.correction.icepop=[0.5,2]"],
        "algo.correction.tis_token and correction.icepop would count x twice",
    ),
    (["algo.correction.icepop=[1.5,2]"], "algo.correction.icepop=[1.5, 2.0] is no band around a ratio of 1"),
    (["algo.correction.geometric=[0.5,0.9]"], "algo.correction.geometric=[0.5, 0.9] is no band around a ratio of 1"),
    (
        ["algo.correction.sequence_mis=[2,0.5]"],
        "algo.correction.sequence_mis=[2.0, 0.5] is no band around a ratio of 1",
    ),
    (["algo=two_sided", "algo.max_ratio=1.2"], "algo.max_ratio=1.2 is not above 1 + clip_high=1.28"),
    # KL, entropy
    (["algo.kl.estimator=k1"], "algo.kl.estimator=k1 with place=loss: the expected gradient of k1 is zero"),
    (["algo.kl.place=reward"], "algo.kl.estimator=k2 with place=reward is biased"),
    (["algo.kl.anneal_steps=5"], "algo.kl.anneal_steps=5 without a final_coef"),
    (["algo.entropy.anneal_steps=5"], "algo.entropy.anneal_steps=5 without a final_coef"),
    (["algo.kl.reference=a/b"], "algo.kl.reference does nothing with algo.kl.coef=0"),
    (["algo.kl.offload=true"], "algo.kl.offload does nothing with algo.kl.coef=0"),
    # rewards
    (["reward.overlong_buffer=12"], "reward.overlong_buffer=12 is not below sampling.max_tokens=12"),
    (["reward.overlong_penalty=0.5"], "reward.overlong_penalty=0.5 does nothing with reward.overlong_buffer=null"),
    (["algo.advantage=maxrl", "reward.overlong_buffer=4"], "reward.overlong_buffer=4 with algo.advantage=maxrl makes"),
    (
        ["algo.advantage=gdpo", "reward.length_penalty=0.1"],
        "reward.length_penalty=0.1 with algo.advantage=gdpo is no rew",
    ),
    (
        ["algo.advantage=maxrl", "algo.kl.coef=0.1", "algo.kl.place=reward", "algo.kl.estimator=k1"],
        "algo.kl.place=reward with algo.advantage=maxrl makes rewards negative",
    ),
    # what can be kept in host memory
    (["trainer.offload_parameters=true"], "trainer.offload_parameters=true with trainer.zero_stage=1"),
    (
        ["trainer.attention=varlen", "model.dtype=bfloat16"],
        "trainer.attention=varlen needs cluster.device=cuda, not cpu",
    ),
    (["trainer.compile=true", "trainer.zero_stage=3"], "trainer.compile=true with trainer.zero_stage=3"),
    (["trainer.offload_optimizer=true", "trainer.zero_stage=0"], "trainer.offload_optimizer=true with trainer.zero_s"),
    (
        ["trainer.offload_optimizer=true", "model.dtype=bfloat16"],
        "trainer.offload_optimizer=true with trainer.zero_stage=1 and model.dtype=bfloat16",
    ),
    # cores
    (["cluster.pin_cores=true", "cluster.device=cuda"], "cluster.pin_cores=true is for CPU runs, cluster.device=cuda"),
    (
        ["cluster.pin_cores=true", "cluster.address=auto", "cluster.object_store_mb=null"],
        "cluster.pin_cores=true shares out the cores of one machine, cluster.address=auto",
    ),
    # shares of the work
    (["batch.stream=true", "batch.updates=2"], "batch.stream=true with updates=2"),
    (["batch.stream=true", "algo.advantage=gdpo"], "batch.stream=true with algo.advantage=gdpo, which is made from"),
    (["async.mode=one_step_off", "async.max_lag=2"], "async.mode=one_step_off has a lag of 1, which contradicts max"),
    (
        ["async.mode=one_step_off", "weights.every=2"],
        "async.mode=one_step_off with weights.every=2: batches would be up to 2 steps old",
    ),
    (["batch.updates=3"], "batch.updates=3 does not divide groups_per_step=64"),
    (["trainer.ranks=3", "trainer.sequence_parallel=2"], "trainer.sequence_parallel=2 does not divide trainer.ranks=3"),
    (
        ["trainer.ranks=9", "batch.updates=64"],
        "batch.groups_per_step * batch.group_size / batch.updates=64 = 8 samples",
    ),
    (["trainer.ranks=513"], "batch.groups_per_step * batch.group_size = 512 samples cannot feed trainer.ranks=513"),
]


def of_different_keys(mistakes: list[tuple[str, str]]) -> list[dict[str, str]]:
    """The mistakes, message by override, in as few parts as have no key in two ways (nor a section and its key)."""
    parts: list[dict[str, str]] = []
    for override, message in mistakes:
        key = override.lstrip("+").partition("=")[0]
        taken = ([o.lstrip("+").partition("=")[0] for o in part] for part in parts)
        part = next((part for part, keys in zip(parts, taken, strict=True) if key not in keys), None)
        if part is None:
            parts.append(part := {})
        part[override] = message
    return parts


@pytest.mark.parametrize("mistakes", of_different_keys(MISTAKES), ids=len)
def test_each_mistake_is_one_line_with_key_value_and_remedy(mistakes: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(list(mistakes))
    lines = str(caught.value).splitlines()
    for override, message in mistakes.items():
        assert [line for line in lines if line.startswith(message)], (override, lines)
    assert len(lines) == len(mistakes)


@pytest.mark.parametrize(("override", "message"), MALFORMED)
def test_what_cannot_be_composed_is_one_line_with_key_value_and_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS)
def test_a_contradiction_is_one_line_that_names_both_settings(overrides: list[str], message: str) -> None:
    group_overrides = [override for override in overrides if override.partition("=")[0] in OPTIONS]
    if group_overrides == ["engine=gpu"]:  # contradicts what it is composed with
        with pytest.raises(ConfigError) as caught:
            load_config(overrides)
        (line,) = str(caught.value).splitlines()
    else:
        (line,) = problems_of(*overrides)
    assert line.startswith(message)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo=decoupled_ppo", "algo.correction.veto=0.0001"],  # a mask on top of a weight
        ["algo=cispo", "algo.correction.icepop=[0.5,5]"],  # of which only the mask acts
        ["algo.kl.place=reward", "algo.kl.estimator=k1", "algo.kl.coef=0.1", "algo.advantage=reinforce_pp"],
        ["algo.kl.final_coef=0.1", "algo.kl.reference=a/b"],
        ["reward.overlong_buffer=4", "reward.overlong_penalty=0.5", "algo.mask_truncated=true"],
        ["batch.updates=4", "trainer.ranks=4", "trainer.sequence_parallel=2"],
        ["eval.engine=dedicated", "eval.every=10", "eval.samples=8", "eval.temperature=1", "eval.pass_reward=0.5"],
        ["engine.kv_policy=recompute_at_lag", "engine.kv_max_lag=2"],
    ],
)
def test_what_goes_together_is_taken(overrides: list[str]) -> None:
    assert problems_of(*overrides) == []


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["trainer.lrr=1", "steps=abc", "algo.clip_low=7", "+new.key=1", "batch.group_size=1"])
    lines = str(caught.value).splitlines()
    assert {line.split(" = ")[0] for line in lines} == {
        "trainer.lrr", "steps", "algo.clip_low", "new.key", "batch.group_size"
    }  # fmt: skip


def test_all_contradictions_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["sampling.max_tokens=300", "weights.every=9", "engine.max_num_batched_tokens=7"])
    assert len(str(caught.value).splitlines()) == 3


def test_all_malformed_overrides_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["steps", "task=sortt", "seed=1", "trainer.lr=1,2"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.fixture
def left_by_run(tmp_path: Path) -> Path:
    """A run directory with the configuration of a run on data of its own."""
    config = load_config(["task=jsonl", "task.path=rows.jsonl", "steps=7", f"run_dir={tmp_path}", "resume=never"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.dump()))
    return tmp_path


def test_a_runs_own_configuration_with_other_values(left_by_run: Path) -> None:
    overrides = ["eval.samples=4", "eval.temperature=0.5", "run_dir=out", "task.path='a b'", "batch={group_size:4}"]
    config = load_run_config(left_by_run, overrides)
    assert (config.eval.samples, config.eval.temperature, config.run_dir, config.steps) == (4, 0.5, "out", 7)
    assert isinstance(config.task, JsonlTask) and config.task.path == "a b"
    assert (config.batch.group_size, config.batch.groups_per_step) == (4, load_config().batch.groups_per_step)
    untouched = load_run_config(left_by_run)
    assert (untouched.run_dir, untouched.resume) == (None, "auto")  # a run directory of its own


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.sample=4", "eval.sample = 4: unknown key; did you mean eval.samples?"),
        ("eval.samples=0", "eval.samples = 0: should be greater than 0"),
        ("task=sort", "task=sort: a group, and "),
        ("steps.x=1", "steps.x = 1: steps is no section"),
        ("eval.samples=4", "eval.samples=4 at temperature=0"),
    ],
)
def test_a_mistake_on_top_of_a_runs_own_configuration_is_one_line(
    left_by_run: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(left_by_run, [override])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n", ""])
def test_a_damaged_configuration_of_a_run_is_named(left_by_run: Path, text: str) -> None:
    (left_by_run / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml: not the configuration of a run"):
        load_run_config(left_by_run)


@pytest.fixture
def own_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `conf/` that a test may change."""
    copy = tmp_path / "conf"
    shutil.copytree(conf_dir(), copy)
    monkeypatch.setattr("pipelinerl.config.load.conf_dir", lambda: copy)
    monkeypatch.setattr("pipelinerl.config.files.conf_dir", lambda: copy)
    return copy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# @package _global_\nsteps: [1\n", r"not readable as YAML: .*mine\.yaml\", line 3"),
        ("# @package _global_\ntrainer:\n  lrr: 1\n", r"^trainer\.lrr = 1: unknown key; did you mean trainer\.lr\?$"),
        ("# @package _global_\ndefaults:\n  - override /task: nope\n", r"'task/nope'"),
    ],
)
def test_a_mistake_in_a_file_of_ones_own_is_explained_too(own_conf: Path, text: str, message: str) -> None:
    (own_conf / "experiment" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(["experiment=mine"])
    assert "\n" not in str(caught.value)


@st.composite
def one_slip(draw: DrawFn) -> tuple[str, str]:
    """A known key and the same key with one letter left out, doubled, replaced or swapped with its neighbour."""
    key = draw(st.sampled_from([key for key in sorted(known_keys()) if len(key.rpartition(".")[2]) > 3]))
    at = draw(st.integers(0, len(key) - 2).filter(lambda i: key[i] != "." and key[i + 1] != "."))
    slips = [
        key[:at] + key[at + 1 :],
        key[: at + 1] + key[at:],
        key[:at] + draw(st.sampled_from("aeioxz_")) + key[at + 1 :],
        key[:at] + key[at + 1] + key[at] + key[at + 2 :],
    ]
    return key, draw(st.sampled_from(slips))


@given(one_slip())
def test_one_slip_of_the_fingers_finds_the_key_that_was_meant(slip: tuple[str, str]) -> None:
    key, typed = slip
    found = nearest(typed, sorted(known_keys()))
    assert found == key or typed in known_keys()


def test_nothing_is_suggested_when_nothing_is_near() -> None:
    assert nearest("qqqqqq.zzzzz", sorted(known_keys())) is None
    assert nearest("x", []) is None
