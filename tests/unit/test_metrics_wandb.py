"""What the W&B mirror decides without W&B: mode, credentials, redaction, and that it cannot hurt the run."""

import logging
import queue
import threading
from pathlib import Path
from typing import Any

import pytest

from pipelinerl.config.schema import WandbConfig
from pipelinerl.metrics.wandb_sink import WandbSink, has_api_key, redacted, resolve_mode


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pipelinerl.metrics.wandb_sink._import_failure", lambda: "")  # the real one takes a second
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    return netrc


def test_auto_is_offline_without_a_key_and_online_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled"
    assert resolve_mode("offline") == "offline"  # the configuration is more explicit than the environment


def test_netrc_counts_for_the_host_that_is_used(no_account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_account.write_text("machine api.wandb.ai login user password " + "k" * 40)
    assert has_api_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_api_key()
    no_account.write_text("this is not a netrc file")
    assert not has_api_key()


def test_online_without_a_key_goes_offline_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_mode("online") == "offline"
    assert "no API key" in caplog.text


def test_secrets_are_redacted_and_numbers_are_not() -> None:
    config = {
        "sampling": {"max_tokens": 64}, "hub": {"hf_token": "hf_abc", "API_KEY": "x", "nothing_secret": None},
        "secrets": ["a", {"inner": "b"}], "db_password": "pw", "tokenizer": "models/tiny", "name": "run",
    }  # fmt: skip
    assert redacted(config) == {
        "sampling": {"max_tokens": 64},
        "hub": {"hf_token": "[redacted]", "API_KEY": "[redacted]", "nothing_secret": None},
        "secrets": ["[redacted]", {"inner": "[redacted]"}], "db_password": "[redacted]",
        "tokenizer": "models/tiny", "name": "run",
    }  # fmt: skip
    assert config["db_password"] == "pw"


def test_disabled_does_nothing(tmp_path: Path) -> None:
    sink = WandbSink(WandbConfig(mode="disabled"), tmp_path, {}, "run")
    sink.write("train", 1, {"reward/mean": 1.0})
    sink.close()
    assert (sink.mode, sink.sync_hint) == ("disabled", "") and list(tmp_path.iterdir()) == []


class HangingSink(WandbSink):
    """wandb.init that blocks until the test ends it."""

    release = threading.Event()

    def _init(self, mode: str) -> Any:
        self.release.wait(20)
        raise ConnectionError("released")


def test_a_hanging_wandb_never_blocks_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelinerl.metrics.wandb_sink.QUEUE_SIZE", 3)
    monkeypatch.setattr("pipelinerl.metrics.wandb_sink._end_wandb_core", HangingSink.release.set)
    monkeypatch.setattr("pipelinerl.metrics.wandb_sink._stop_service", lambda: None)
    sink = HangingSink(WandbConfig(mode="offline"), tmp_path, {}, "run", close_timeout_s=0.1)
    for step in range(5):
        sink.write("train", step, {"reward/mean": 1.0})
    assert sink.dropped == 2
    with caplog.at_level(logging.WARNING):
        sink.close()
        sink.close()
    assert "did not finish within 0.1 s" in caplog.text and "lacks 2 records" in caplog.text
    assert sink.sync_hint == ""


def test_a_broken_installation_of_wandb_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelinerl.metrics.wandb_sink._import_failure", lambda: "ImportError: no wandb")
    sink = WandbSink(WandbConfig(mode="offline"), tmp_path, {}, "run")
    with pytest.raises(RuntimeError, match="ImportError: no wandb"):
        sink.write("train", 1, {"reward/mean": 1.0})
    sink.close()


class FailingRun:
    def define_metric(self, *args: Any, **kwargs: Any) -> None: ...

    def log(self, record: dict[str, float]) -> None:
        raise ConnectionResetError("Connection lost")


class FailingSink(WandbSink):
    ended: "queue.Queue[bool]"

    def _init(self, mode: str) -> Any:
        return FailingRun()


def test_a_dead_wandb_core_is_reported_by_the_next_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr("pipelinerl.metrics.wandb_sink._stop_service", ended.set)
    sink = FailingSink(WandbConfig(mode="offline"), tmp_path, {}, "run")
    sink.write("train", 1, {"reward/mean": 1.0})
    assert ended.wait(5)
    with pytest.raises(RuntimeError, match="ConnectionResetError: Connection lost"):
        sink.write("train", 2, {"reward/mean": 1.0})
    sink.close()
