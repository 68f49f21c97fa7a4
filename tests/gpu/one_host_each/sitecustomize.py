"""On PYTHONPATH: every Python process says to NCCL that it is a host of its own, so that several can share one GPU."""

import os

os.environ["NCCL_HOSTID"] = f"process {os.getpid()}"
