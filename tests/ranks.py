"""Run a function on several processes over gloo. Forked, so that a test does not import torch again for each."""

import os
import signal
import socket
import sys
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


class Job:
    """train.main() with these flags on forked processes, as torchrun would start them; output goes to a file.

    hook(train): called in each process before main, to patch it. Use as a context: no process outlives it.
    """

    def __init__(self, flags, log, world=1, hook=None):
        self.log, port = log, free_port()
        fork = mp.get_context("fork")
        args = [(flags, log, r, world, port, hook) for r in range(world)]
        self.processes = [fork.Process(target=train_process, args=a) for a in args]
        for process in self.processes:
            process.start()

    def wait(self, timeout=300):
        """Exit codes by rank; negative: the signal."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                raise TimeoutError(f"process {process.pid} did not end:\n{self.output()}")
        return [process.exitcode for process in self.processes]

    def output(self):
        with open(self.log) as f:
            return f.read()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


def train_process(flags, log, rank, world, port, hook):
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(out, fd)
    sys.stdout, sys.stderr = (
        open(n, "w", closefd=False, errors="backslashreplace") for n in (1, 2)
    )  # pytest has put its own there
    torch.set_num_threads(1)
    if world > 1:
        names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update({k: str(v) for k, v in names.items()})
    sys.argv = ["train.py", *flags]
    import checkpoint
    import program
    import train
    from data import DataError
    from owned import NotOurs

    if hook:
        hook(train)
    program.run(train.main, checkpoint.CheckpointError, DataError, NotOurs)


def train_in_fork(flags, log, world=1, hook=None):
    """A whole run -> exit codes by rank, and what it printed."""
    with Job(flags, log, world, hook) as job:
        return job.wait(), job.output()
