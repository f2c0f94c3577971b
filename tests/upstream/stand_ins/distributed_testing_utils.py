"""Stand-in for a file that the source distribution lacks: runs a function in several processes joined by gloo."""

import socket

import torch.multiprocessing as multiprocessing
from upstream.ranks import run_rank


def run_distributed(world_size: int):
    """A decorator: calling the function runs `function(rank, *args)` in each of `world_size` processes."""

    def decorate(function):
        def run(*args):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            name = function.__module__.rsplit(".", 1)[-1]
            multiprocessing.spawn(run_rank, args=(world_size, port, name, function.__name__, args), nprocs=world_size)

        return run

    return decorate
