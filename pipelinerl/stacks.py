"""The stacks of a process on demand, also when it hangs.

A process that called `answer_stack_requests` appends the stacks of all its threads to a file of its own

    when it is asked at its mailbox   by a thread, with the interpreter's lock: no frame moves meanwhile
    when it gets SIGNAL               by faulthandler's handler in C, which needs no lock: a process that is stuck in
                                      foreign code which holds it answers too

One that is stopped or gone does not. The handler may crash a process that runs, so SIGNAL is for those that did not
answer there.
"""

import faulthandler
import json
import os
import signal
import socket
from pathlib import Path
from typing import TextIO

import psutil

from pipelinerl.mailbox import Mailbox

SIGNAL = signal.SIGUSR2
FOLDER = "stacks"  # of the files, among the logs of a run
FOLDER_VARIABLE = "PIPELINERL_STACKS"  # tells processes that others start for us where their file belongs

_file: TextIO | None = None  # must stay open; its number is what the handler writes to
_answering: int | None = None  # pid: a fork has to begin anew


def answer_stack_requests(folder: Path, name: str) -> None:
    """Begin to answer, in `folder/<host>-<pid>.txt`, whose first line says who that is."""
    global _answering, _file
    folder.mkdir(parents=True, exist_ok=True)
    host, pid = socket.gethostname(), os.getpid()
    file = _file = (folder / f"{host}-{pid}.txt").open("w")
    asked = Mailbox()
    who = {"name": name, "host": host, "pid": pid, "created": psutil.Process().create_time()}  # a pid is used again
    who["mailbox"] = asked.address
    _file.write(json.dumps(who) + "\n")
    _file.flush()
    os.environ[FOLDER_VARIABLE] = str(folder)
    _answering = pid
    faulthandler.register(SIGNAL, file=_file, all_threads=True)
    asked.listen(lambda _: faulthandler.dump_traceback(file, all_threads=True), "stacks")


def answer_as_told(name: str) -> None:
    """The same in a process that vLLM started for a worker of ours; nothing where no run is, or where it is begun."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and _answering != os.getpid():
        answer_stack_requests(Path(folder), name)
