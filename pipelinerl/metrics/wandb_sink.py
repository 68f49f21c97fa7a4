"""W&B as a mirror that can neither block nor end a run. The only module that imports wandb.

All calls into wandb happen on one daemon thread, fed by a bounded queue: a dead or hanging wandb-core costs the
mirror, never a training step. Without an account the run is written offline; `sync_hint` tells how to upload it.
"""

import logging
import netrc
import os
import queue
import re
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pipelinerl.config.schema import WandbConfig
from pipelinerl.errors import first_line
from pipelinerl.metrics.log import ELAPSED, Kind

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]

STEP_AXIS = "train/step"
QUEUE_SIZE = 10_000  # records; at one a second that is hours of a hanging wandb-core
SECRET_KEY = re.compile(r"key|token(?!izer)|secret|password", re.IGNORECASE)


class WandbSink:
    """Mirrors metrics to one W&B run whose x axis is `train/step`, in optimizer steps.

    Args:
        config: mode "auto" is online when an API key is at hand, else offline; `WANDB_MODE` decides for "auto".
        run_dir: files land in `run_dir/wandb`.
        run_config: the resolved configuration; texts under keys that look like secrets are redacted.
        name: of the run in W&B.
        run_id: of the W&B run that a resumed run goes on with; "" begins a new one. `run_id` says which it is.
        init_timeout_s: an online start that takes longer falls back to offline, with a warning.
        close_timeout_s: how long `close` waits for wandb to finish before it ends wandb-core.
    """

    def __init__(
        self,
        config: WandbConfig,
        run_dir: Path,
        run_config: Mapping[str, Any],
        name: str,
        run_id: str = "",
        init_timeout_s: float = 20.0,
        close_timeout_s: float = 30.0,
    ) -> None:
        self._init_timeout_s = init_timeout_s
        self._close_timeout_s = close_timeout_s
        self.run_id = run_id or uuid.uuid4().hex[:8]
        self._arguments = {
            "id": self.run_id,
            "project": config.project,
            "entity": config.entity,
            "name": name,
            "dir": str(run_dir),
            "config": redacted(run_config),
        }
        self.mode = resolve_mode(config.mode)
        self.dropped = 0  # records that found the queue full
        self.sync_hint = ""  # the run's URL or the command that uploads it; known once wandb has started
        self._failure = ""
        self._told = False  # write() has raised the failure
        self._queue: queue.Queue[dict[str, float] | None] = queue.Queue(QUEUE_SIZE)
        self._thread: threading.Thread | None = None
        if self.mode != "disabled":
            run_dir.mkdir(parents=True, exist_ok=True)
            self._failure = _import_failure()
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()

    def write(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        """Queue one record; returns at once. Raises RuntimeError when W&B has failed before."""
        if self._thread is None:
            return
        if self._failure:
            self._told = True
            raise RuntimeError(self._failure)
        try:
            self._queue.put_nowait({**values, STEP_AXIS: step})
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Wait, at most `close_timeout_s`, until everything is written. Safe to call twice."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            self._queue.put(None, timeout=1.0)
            thread.join(self._close_timeout_s)
        except queue.Full:
            pass  # nothing was taken from a full queue: the thread hangs
        if thread.is_alive():
            logger.warning("W&B did not finish within %g s; its copy of the run is incomplete", self._close_timeout_s)
            _end_wandb_core()  # or wandb's own exit hook would wait for it without end
            thread.join(5.0)
        elif self._failure and not self._told:
            logger.warning("the W&B copy of the run is incomplete: %s", self._failure)
        if self.dropped:
            logger.warning("the W&B copy of the run lacks %d records: wandb was too slow", self.dropped)

    def _work(self) -> None:
        if self._failure:
            return
        try:
            run = self._start()
            run.define_metric(STEP_AXIS)
            run.define_metric(ELAPSED)
            run.define_metric("*", step_metric=STEP_AXIS)
            while (record := self._queue.get()) is not None:
                run.log(record)
            run.finish()
        except Exception as error:
            self._failure = _described(error)
        _stop_service()

    def _start(self) -> Any:
        if self.mode == "online":
            try:
                return self._init("online")
            except Exception as error:
                logger.warning("W&B cannot be reached (%s); logging offline instead", _described(error))
                self.mode = "offline"
        return self._init("offline")

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")  # settings.silent does not reach the login
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=self._init_timeout_s,
            finish_timeout=self._close_timeout_s,
            x_service_wait=self._init_timeout_s,
        )
        resume: Literal["allow"] | None = "allow" if mode == "online" else None  # offline there is nothing to ask
        run = wandb.init(mode=mode, settings=settings, resume=resume, **self._arguments)
        self.sync_hint = (run.url or "") if mode == "online" else f"wandb sync {Path(run.dir).parent}"
        return run


def resolve_mode(mode: Literal["auto", "online", "offline", "disabled"]) -> Mode:
    """What `mode` means here and now; asks neither the network nor the user."""
    if mode == "auto":
        wanted = os.environ.get("WANDB_MODE", "")
        if wanted in ("offline", "disabled"):
            return wanted  # type: ignore[return-value]  # mypy does not narrow `in`
        return "online" if has_api_key() else "offline"
    if mode == "online" and not has_api_key():
        logger.warning("metrics.wandb.mode=online, but there is no API key (`wandb login` stores one); logging offline")
        return "offline"
    return mode


def has_api_key() -> bool:
    """Whether `WANDB_API_KEY` or a netrc entry for the W&B host (`WANDB_BASE_URL`) gives wandb credentials."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    given = os.environ.get("NETRC")
    paths = [Path(given)] if given else [Path("~/.netrc"), Path("~/_netrc")]
    for path in (path.expanduser() for path in paths):
        try:
            entry = netrc.netrc(path).authenticators(host)
        except (OSError, netrc.NetrcParseError):  # absent or unreadable: not logged in
            continue
        if entry and entry[2]:
            return True
    return False


def redacted(value: Any, secret: bool = False) -> Any:
    """A copy of a configuration in which texts below a key like "api_key" read "[redacted]".

    Numbers stay: `max_tokens` is no secret.
    """
    if isinstance(value, Mapping):
        return {key: redacted(item, secret or bool(SECRET_KEY.search(str(key)))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, secret) for item in value]
    return "[redacted]" if secret and isinstance(value, str | bytes) and value else value


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _import_failure() -> str:
    """Import wandb, in the caller's thread: beside other imports of the main thread it could break those.

    Returns what is wrong with it, "" if nothing.
    """
    try:
        import wandb  # noqa: F401
    except Exception as error:
        return _described(error)
    return ""


def _stop_service() -> None:
    """End wandb-core now, with its exit hook, which would print a traceback if wandb-core had died."""
    try:
        import wandb

        wandb.teardown()
    except Exception as error:
        logger.debug("wandb.teardown: %s", _described(error))
        _end_wandb_core()


def _end_wandb_core() -> None:
    """Kill the wandb-core that this process started, which hangs or is dead, and reap it."""
    import psutil

    for child in psutil.Process().children():
        try:
            if child.name().startswith("wandb-core"):
                child.kill()
                child.wait(timeout=5.0)
        except (psutil.NoSuchProcess, psutil.TimeoutExpired):
            continue
