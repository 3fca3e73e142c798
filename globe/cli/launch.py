"""A command on all GPUs of the machine: started again as torchrun would start it, in one process for each."""

from __future__ import annotations

import logging
import os
import signal
import sys

from globe.cli.ending import tell
from globe.machine.device import AUTO


def gpus_for(device: str) -> int:
    """How many GPUs are meant: all that are here where none is told by its number. 0 in a process of torchrun's."""
    import torch

    return torch.cuda.device_count() if device in (AUTO, "cuda") and "TORCHELASTIC_RUN_ID" not in os.environ else 0


def start_again(size: int, go_on: str) -> int:
    """Run this process's own command line in so many others, and pass signals on to them.

    They share this machine's threads, unless OMP_NUM_THREADS says how many each has. Returns the exit status of the one
    that failed first, told where a signal ended it.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // size)))
    logging.disable(logging.ERROR)  # torch's, of what the processes say themselves
    logs, run_id = DefaultLogsSpecs(os.devnull), f"{os.getpid()}"
    launch = LaunchConfig(1, 1, size, logs, run_id, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    try:
        elastic_launch(launch, sys.executable)(*sys.orig_argv[1:])
    except SignalException as stop:  # they have said how to go on
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        how = signal.Signals(-failure.exitcode).name
        tell("error", f"rank {rank} of {size} was ended by {how}, for want of memory most often: {go_on}")
        return 128 - failure.exitcode
    return 0
