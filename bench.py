"""Timings and counts, each a subcommand:

    python bench.py                                  # lists the subcommands
    python bench.py cpu                              # what HC and mHC add to one real block on this CPU
    python bench.py cpu --widths=512 --rounds=15 --profile=True

Every figure printed is measured in the run that prints it. Rivals are timed in one process and in turn, so that a slow
minute of the machine hits all of them alike; the median is reported with its spread.
"""

import statistics
import sys
import time

from configurator import at_least, configure

# bench.py cpu
widths = "512,1280"  # widths C to time: 512 (small MoE) and 1280 (the 3B config's block)
tokens = 2048  # tokens in the batch
seq_len = 2048  # tokens in one sequence
rounds = 9  # timed rounds; each times every variant once
threads = 0  # CPU threads, 0: what torch chooses
profile = False  # print torch.profiler's table of each variant instead of times
seed = 0
# (further subcommands keep their settings here, under a comment of their own)


def time_in_turn(functions, rounds, warmup=1):
    """{name: function without arguments} -> {name: [seconds, one a round]}; every round calls every function once."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values):
    """Half the distance between the quartiles: a spread that one bad round cannot move. Needs two values or more."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def cpu():
    """What HC and mHC add to one transformer block, forward and backward, on this CPU."""
    raise SystemExit("bench.py cpu: the model to time is not written yet")


COMMANDS = {f.__name__: f for f in (cpu,)}


def main():
    names = ", ".join(COMMANDS)
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        for name, function in COMMANDS.items():
            print(f"  python bench.py {name:<10} {function.__doc__.splitlines()[0]}")
        if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
            raise SystemExit(0)
        print(f"error: {sys.argv[1]!r}: wanted one of {names} as the first argument", file=sys.stderr)
        raise SystemExit(2)
    command = COMMANDS[sys.argv.pop(1)]
    configure(globals(), {"tokens": at_least(1), "rounds": at_least(2), "threads": at_least(0)})
    command()


if __name__ == "__main__":
    main()
