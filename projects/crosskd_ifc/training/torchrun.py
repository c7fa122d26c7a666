"""Running as one of torchrun's processes."""

import datetime
import os
from typing import Any, Callable

import torch
from detectron2.utils import comm


def is_one_of_torchruns() -> bool:
    """Whether torchrun has started this process as one of several."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def run_in_torchrun(main: Callable, *args: Any, timeout: datetime.timedelta) -> Any:
    """Run a function as one of torchrun's processes, as ``detectron2.engine.launch`` does in a
    process that it starts itself.

    Reads torchrun's environment variables: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT.

    Args:
        timeout: how long processes wait for one another.

    Returns:
        What the function returns.
    """
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if has_gpu else "gloo", timeout=timeout)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()
    result = main(*args)
    torch.distributed.destroy_process_group()  # not after an error: it could wait for the others
    return result
