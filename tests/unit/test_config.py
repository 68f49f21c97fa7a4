"""Loading a configuration: every shipped file is valid, every user mistake is named with key, value and remedy."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from pipelinerl.config.files import conf_dir, group_options
from pipelinerl.config.hints import nearest
from pipelinerl.config.keys import known_keys
from pipelinerl.config.load import load_config
from pipelinerl.config.preflight import TINY_MODELS, preflight
from pipelinerl.config.schema import ReinforceIS, RunConfig, SortTask
from pipelinerl.errors import ConfigError, EnvironmentProblem

# What an option needs from its neighbours to make sense on top of the quickstart.
COMPANIONS = {
    "task=jsonl": ["task.path=rows.jsonl"],
    "engine=gpu": ["cluster=local_gpu"],
}
OPTIONS = [f"{group}={option}" for group, options in group_options().items() for option in options]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_file_in_conf_composes_and_validates(option: str) -> None:
    config = load_config([option, *COMPANIONS.get(option, [])])
    assert isinstance(config, RunConfig)


def test_no_yaml_in_conf_is_out_of_the_reach_of_that_test() -> None:
    files = {str(file.relative_to(conf_dir())) for file in conf_dir().rglob("*.y*ml")}
    assert files == {"config.yaml"} | {option.replace("=", "/") + ".yaml" for option in OPTIONS}


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


def test_a_dumped_configuration_validates_to_itself() -> None:
    config = load_config(["experiment=longform"])
    assert RunConfig.model_validate(config.dump()) == config


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


MISTAKES = [
    # unknown keys, however they are written
    ("trainer.lrr=1", "trainer.lrr = 1: unknown key; did you mean trainer.lr?"),
    ("+trainer.lrr=1", "trainer.lrr = 1: unknown key; did you mean trainer.lr?"),
    ("++trainer.lrr=1", "trainer.lrr = 1: unknown key; did you mean trainer.lr?"),
    ("+new.key=1", "new.key = 1: unknown key"),
    ("asnyc.max_lag=3", "asnyc.max_lag = 3: unknown key; did you mean async.max_lag?"),
    ("async_.max_lag=3", "async_.max_lag = 3: unknown key; did you mean async.max_lag?"),
    ("sampling.group_size=4", "sampling.group_size = 4: unknown key; did you mean batch.group_size?"),
    ("lr=1e-5", "lr = 1e-05: unknown key; did you mean trainer.lr?"),
    ("metrics.wandb.modee=x", "metrics.wandb.modee = 'x': unknown key; did you mean metrics.wandb.mode?"),
    ("task.digit=4", "task.digit = 4: unknown key; did you mean task.digits?"),
    ("tasks=sort", "tasks = 'sort': unknown key; did you mean task?"),
    ("algo.max_ratio=2", "algo.max_ratio = 2: no setting of algo.kind=ppo_clip, only of algo.kind=reinforce_is"),
    ("task.path=x", "task.path = 'x': no setting of task.kind=sort, only of task.kind=jsonl"),
    # unknown options
    ("task=sortt", "task = 'sortt': no such option of the group task; did you mean sort?"),
    ("experiment=quickstrat", "experiment = 'quickstrat': no such option of the group experiment; did you mean quick"),
    ("task=sort_defaults", "task = 'sort_defaults': no such option"),
    ("trainer=3", "trainer = '3': no such option of the group trainer (cpu, gpu)"),
    ("task.kind=jsonl", "task.kind = 'jsonl': a kind is chosen by its group; task=OPTION"),
    ("algo={kind: reinforce_is}", "algo = '{kind: reinforce_is}': a kind is chosen by its group"),
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
    ("trainer.zero_stage=3", "trainer.zero_stage = 3: should be 1 or 2"),
    ("engine.chunked_prefill=false", "engine.chunked_prefill = false: should be true"),
    ("trainer.betas=[0.9]", "trainer.betas = [0.9]: has too few values"),
    ("trainer.betas=[0.9,x]", "trainer.betas[1] = 'x': should be a number"),
    ("async=5", "async = 5: is a section; set async.mode, async.max_lag"),
    ("task=jsonl", "task.path: required; set task.path=..."),
    ("model.path=???", "model.path: required; set model.path=..."),
    # settings that contradict each other
    ("sampling.top_p=0.9", "sampling.top_p=0.9 changes the sampled distribution"),
    ("model.head_dtype=bfloat16", "model.head_dtype=bfloat16 with dtype=float32"),
    ("eval.samples=4", "eval.samples=4 at temperature=0"),
    ("engine=gpu", "engine.kv_cache_mb=null with cluster.device=cpu"),
    ("cluster.address=auto", "cluster.object_store_mb=256 is for a local cluster"),
    ("weights.backend=nccl", "weights.backend=nccl needs GPUs, cluster.device=cpu has none"),
    ("weights.every=4", "async.max_lag=2 with weights.every=4"),
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
]


@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_a_mistake_is_one_line_with_key_value_and_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


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
