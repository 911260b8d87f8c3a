"""A pipeline step on paper: the schedule that pipeline.py runs, played through with assumed times.

    python tools/bench.py pipeline --config=config/mhc_27b.py --pipeline_size=8 --micro_batches=160

Nothing here is measured. Times of a forward follow from the FLOPs of the fullest stage at a share of the card's peak,
of the boundaries from the bytes that the kernels ask for (tools/bench.py traffic) at a share of its bandwidth, of the
wire from the bytes of a closed boundary; a backward takes twice a forward. All that is assumed is printed.

    exposed   the streams' share of the wire is waited for: a stage computes nothing while it sends
    hidden    it goes on beside the next action, and half of the boundaries (those of FFN sublayers) run beside the
              other micro-batch's all-to-all, as the paper has it. torch's schedules do not do that by themselves;
              overlap.py is for it, and what it hides on a GPU was never measured
"""

from dataclasses import dataclass

import pipeline

# elements of width C that a boundary moves for a token, forward and backward, at n = 4: tools/bench.py traffic
UNITS = {"baseline": (3, 3), "n = 4": (14, 24), "single-pass": (10, 19)}


@dataclass
class Times:
    """Seconds of one stage and micro-batch."""

    forward: float
    backward: float
    wire: float  # of one boundary between stages
    exposed: bool  # whether the sender waits for the wire


def simulate(schedule, size, micro_batches, times):
    """Play a step through -> (seconds, the share of rank time without work, seconds of the wire waited for by the worst
    rank, the most stage activations on a rank at once).

    An action starts when its rank is free and what it needs has arrived: a forward needs the one of the stage before, a
    backward that of the stage behind it (in the last stage its own forward).
    """
    order = pipeline.order(schedule, size, micro_batches)
    owner = {stage: rank for rank in range(size) for stage in pipeline.stages_of(rank, size, schedule)}
    last = len(owner) - 1
    arrived, free, busy, waited = {}, [0.0] * size, [0.0] * size, [0.0] * size
    queues = [list(actions) for actions in order]
    while any(queues):
        moved = False
        for rank, queue in enumerate(queues):
            while queue and (start := ready(queue[0], arrived, last)) is not None:
                kind, stage, m = queue.pop(0)
                takes = times.forward if kind == "F" else times.backward
                end = max(free[rank], start) + takes
                there = stage + 1 if kind == "F" else stage - 1
                crosses = there in owner and owner[there] != rank
                wire = times.wire if crosses else 0.0
                arrived[kind, stage, m] = end + wire
                free[rank] = end + (wire if times.exposed else 0.0)
                busy[rank] += takes
                waited[rank] += wire if times.exposed else 0.0
                moved = True
        if not moved:
            raise ValueError(f"{schedule}: an order that waits for itself")
    step = max(free)
    return step, 1 - sum(busy) / (size * step), max(waited), max(map(pipeline.in_flight, order))


def ready(action, arrived, last):
    """When what an action needs is there, or None if nobody has made it yet."""
    kind, stage, m = action
    if kind == "F":
        return 0.0 if stage == 0 else arrived.get(("F", stage - 1, m))
    return arrived.get(("F", last, m) if stage == last else ("B", stage + 1, m))


def stage_times(config, size, schedule, variant, hidden, a):
    """Times of the fullest stage. a: the assumptions, a dict: tokens, peak, mfu, bandwidth, share, link, bytes."""
    costs, head = pipeline.block_flops(config)
    ranges = pipeline.cut(config, size, schedule)
    fullest = max(ranges, key=lambda r: sum(costs[i] for i in r))
    compute = 2 * sum(costs[i] for i in fullest) * a["tokens"] / (a["peak"] * a["mfu"])
    unit = config.n_embd * a["bytes"] * a["tokens"] / (a["bandwidth"] * a["share"])  # seconds of one C a token
    forward, backward = (2 * len(fullest) * units * unit for units in UNITS[variant])
    if hidden:
        forward, backward = forward / 2, backward / 2
    streams = 1 if variant == "baseline" else config.n_streams
    wire = streams * config.n_embd * a["bytes"] * a["tokens"] / a["link"]
    return Times(compute + forward, 2 * compute + backward, wire, not hidden)


def report(config, size, schedule, micro_batches, a):
    """Print the four variants side by side."""
    print(
        f"assumed, not measured: {a['tokens']} tokens a micro-batch, {a['peak'] / 1e12:.0f} TFLOP/s at {a['mfu']:.0%}, "
        f"memory {a['bandwidth'] / 1e12:.2f} TB/s at {a['share']:.0%}, wire {a['link'] / 1e9:.0f} GB/s, bf16 streams"
    )
    print(f"{schedule}, {size} ranks, {micro_batches} micro-batches of a step on each")
    print(f"{'':28} {'step, s':>9} {'to hidden baseline':>19} {'bubble':>8} {'wire waited, s':>15} {'stages held':>12}")
    rows = [("baseline", False), ("baseline", True), ("n = 4", False), ("n = 4", True), ("single-pass", True)]
    base = simulate(schedule, size, micro_batches, stage_times(config, size, schedule, *rows[1], a))[0]
    for variant, hidden in rows:
        times = stage_times(config, size, schedule, variant, hidden, a)
        step, bubble, waited, held = simulate(schedule, size, micro_batches, times)
        name = f"{variant}, {'hidden' if hidden else 'exposed'}"
        print(f"{name:28} {step:9.3f} {100 * (step / base - 1):+18.1f}% {bubble:8.1%} {waited:15.3f} {held:12}")
