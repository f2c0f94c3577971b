"""What runs in each process of a distributed upstream test; a module of its own, because processes import it by name."""

import os

import torch
import torch.distributed
from upstream.source import import_upstream


def run_rank(rank: int, world_size: int, port: int, module: str, function: str, args: tuple) -> None:
    """Join the others over gloo and call `function(rank, *args)` of the upstream module."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ["WORLD_SIZE"] = str(world_size)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        getattr(import_upstream(module), function)(rank, *args)
    finally:
        torch.distributed.destroy_process_group()
