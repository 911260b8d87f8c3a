"""What runs beside what in a pipeline: turns, streams, and that neither changes a number."""

import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist

import mhc_cpu
import overlap
import recompute
from model import GPT, GPTConfig
from parallel import Ranks
from tests.ranks import run_ranks
from tests.test_pipeline import SMALL


def step(overlaps, mode):
    """One step of a pipeline of 2 ranks with experts over 2 -> loss, {name: gradient}."""
    ranks = Ranks("fsdp", dist.get_rank(), 4, torch.device("cpu"), 0, 60, 2, 2)
    with torch.device("meta"):
        gpt = GPT(GPTConfig(**SMALL))
    recompute.apply(gpt, mode)
    ranks.build_pipeline(gpt, "dualpipev", nullcontext, overlaps)
    ranks.shard(gpt)
    ranks.initialise(gpt, seed=1)
    tokens = torch.randint(64, (16, 9), generator=torch.Generator().manual_seed(0))[ranks.part :: 2]
    loss = ranks.pipeline.step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 8)
    return loss, {name: p.grad.to_local() for name, p in gpt.named_parameters()}


def watch():
    """-> a list that gets, for each boundary forward and backward, whether another thread's tokens are on the wire."""
    on_the_wire, hidden = set(), []
    hand_over = overlap.Turns.__call__

    def sent(turns):
        on_the_wire.add(threading.get_ident())
        hand_over(turns)
        on_the_wire.remove(threading.get_ident())

    def boundary(function):
        def watched(*args):
            hidden.append(bool(on_the_wire - {threading.get_ident()}))
            return function(*args)

        return staticmethod(watched)

    overlap.Turns.__call__ = sent
    mhc_cpu.Step.forward, mhc_cpu.Step.backward = boundary(mhc_cpu.Step.forward), boundary(mhc_cpu.Step.backward)
    return hidden


def check_pairs():
    """On a CPU a half of a pair runs in a thread of its own, so that the threads tell the halves apart."""
    hidden = watch()
    loss, gradients = step(False, "none")
    assert hidden and not any(hidden), "one after the other"
    for mode in ("mhc", "full"):
        del hidden[:]
        ours, others = step(True, mode)
        assert sum(hidden) >= 4, (mode, sum(hidden), len(hidden))
        assert torch.equal(ours, loss) and gradients.keys() == others.keys()
        assert all(torch.equal(others[name], g) for name, g in gradients.items()), mode


def test_boundaries_run_while_the_others_tokens_are_on_the_wire_and_no_bit_changes():
    run_ranks(4, check_pairs)


# -- turns ----------------------------------------------------------------------------------------------------------


def test_two_functions_take_turns_and_the_longer_ends_alone():
    turns, said = overlap.Turns(), []

    def say(words):
        for word in words:
            said.append(word)
            turns()

    say("x")  # alone
    turns.both(lambda: say("abc"), lambda: say("123456"))
    assert said == list("xa1b2c3456")
    turns.both(lambda: say("abc"), lambda: say(""))
    assert said[-3:] == list("abc")


@pytest.mark.parametrize("bad", [0, 1])
def test_a_half_that_fails_ends_the_other_and_says_why(bad):
    turns, ended = overlap.Turns(), []

    def half(mine):
        turns()
        if mine == bad:
            raise ValueError("the cause")
        turns()
        ended.append(mine)

    with pytest.raises(ValueError, match="the cause"):
        turns.both(lambda: half(0), lambda: half(1))
    assert not ended


# -- streams --------------------------------------------------------------------------------------------------------


@pytest.fixture
def streams(monkeypatch):
    """CUDA streams that write down who waits for whom, what runs where, and which memory was told of whom."""
    log, current = [], threading.local()

    class Stream:
        made = 0

        def __init__(self, priority=0):
            self.name = ("high" if priority < 0 else "own") + str(Stream.made // 2)
            Stream.made += 1

        def record_event(self):
            return self

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event.name}")

        wait_stream = wait_event

    main = Stream()
    main.name, Stream.made = "main", 0

    @contextmanager
    def stream(s):
        before, current.now = getattr(current, "now", main), s
        yield
        current.now = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: getattr(current, "now", main))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: log.append(f"{s.name} reads {tuple(t.shape)}"))
    return log


class Residual:
    """Of sublayer s; x (2, 3), y (4,), carry (5,) come in, x (6,) and carry (7,) go out."""

    def __init__(self, s, log):
        self.s, self.log = s, log

    def __call__(self, x, y, carry):
        self.log.append(f"{self.s} on {torch.cuda.current_stream().name}")
        return torch.empty(6), (torch.empty(7),)

    close = __call__


def test_the_boundary_after_an_ffn_has_a_stream_of_high_priority(streams):
    """What it reads was made on the stage's stream, and what it makes is read there: both wait, and the allocator knows
    of both."""
    lane = overlap.Lane()
    args = torch.empty(2, 3), torch.empty(4), (torch.empty(5),)
    after_ffn = [
        "high0 waits for own0", "{} on high0", "own0 waits for high0",
        "high0 reads (2, 3)", "high0 reads (4,)", "high0 reads (5,)", "own0 reads (6,)", "own0 reads (7,)",
    ]  # fmt: skip
    (attention, _, _), (ffn, _, _) = overlap.boundaries_beside(
        [(Residual(4, streams), "norm", "F"), (Residual(5, streams), "norm", "F")], lane
    )
    for call, s, beside in ((attention, 4, True), (ffn, 5, False), (attention.close, 4, False), (ffn.close, 5, True)):
        del streams[:]
        lane.run(lambda call=call: call(*args))
        assert streams == ([line.format(s) for line in after_ffn] if beside else [f"{s} on own0"])
    del streams[:]
    lane.run(lambda: attention(args[0], None, args[2]))  # a segment begins: no F_post,res
    assert streams == ["4 on own0"]


def test_a_pair_forks_and_joins_the_streams_of_its_stages(streams):
    """Both are behind all that was before, and all that comes is behind both."""
    from torch.distributed.pipelining.schedules import FORWARD, FULL_BACKWARD, OVERLAP_F_B, _Action

    class Schedule:
        def register_custom_function(self, kind, function):
            streams.append(str(kind))

    ours = overlap.Overlap(Schedule(), {}, {0: overlap.Lane(), 3: overlap.Lane()}, overlap.Turns())
    assert streams == [str(kind) for kind in (FORWARD, FULL_BACKWARD, OVERLAP_F_B)]
    ours.run = lambda action, context: streams.append(f"{action} on {torch.cuda.current_stream().name}")
    forward, backward = _Action(0, FORWARD, 5), _Action(3, FULL_BACKWARD, 2)
    del streams[:]
    ours(_Action(-1, OVERLAP_F_B, None, (forward, backward)), None)
    assert streams == [
        "own0 waits for main", "own1 waits for main", "0F5 on own0", "3B2 on own1", "main waits for own0",
        "main waits for own1",
    ]  # fmt: skip
    del streams[:]
    ours(backward, None)
    assert streams == ["own1 waits for main", "3B2 on own1", "main waits for own1"]
    del streams[:]
    ours.handed((torch.empty(2), torch.empty(3)), 3)
    assert streams == ["own1 reads (2,)", "own1 reads (3,)"]


def test_on_a_cpu_there_are_no_streams():
    lane, sublayers = overlap.lane(torch.device("cpu")), [object()]
    assert overlap.boundaries_beside(sublayers, lane) is sublayers
    assert lane.fork() is lane.join() is None and lane.run(lambda: None) is None
