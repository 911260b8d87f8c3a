"""Run a function on several processes over gloo. Forked, so that a test does not import torch again for each."""

import os
import signal
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def one_rank(rank, world, port, work, args):
    torch.set_num_threads(1)  # a forked child must not use the parent's pool of threads
    store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        work(*args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(world, work, *args):
    """work(*args) on `world` processes; raises what the first failing one raised. None outlives the call."""
    context = mp.start_processes(one_rank, (world, free_port(), work, args), world, join=False, start_method="fork")
    try:
        end = time.monotonic() + 120
        while not context.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"{work.__name__} on {world} processes did not end")
    finally:
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
