"""What runs beside what in a pipeline (section 4.3.3): DualPipeV's pairs, and the boundaries after the FFNs.

    train.py --parallel=fsdp --expert_size=8 --pipeline_size=8 --pipeline_overlap=True ...

DualPipeV pairs the forward of one micro-batch with the backward of another, of this rank's other stage. torch runs the
two one after the other, unless it is given a function of one's own for them: Overlap. This one takes turns. One half
works until its tokens are on the wire to other ranks' experts (expert_parallel.exchange), and hands over; the other
works (attention, boundaries, experts) until its own tokens are, and hands back. Of the two threads that this takes
only one ever runs, and all ranks that exchange with each other change turns at the same places: so their collectives
come in one order.

On CUDA each stage computes on a stream of its own. So a half that waits for its tokens does not hold up the other on
the device either, and the boundary after an FFN (F_post,res of its output, fused with what the attention behind it
reads) has a third stream, of high priority: it goes before what the other half has queued. Without CUDA there are no
streams, and the turns are all there is.

The rest is in torch's order: what is sent and received between stages, FSDP, the optimizer.
"""

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import torch
from torch.distributed.pipelining.schedules import FORWARD, FULL_BACKWARD, OVERLAP_F_B, _wait_batch_p2p
from torch.utils._pytree import tree_leaves


class Turns:
    """Two functions of which one runs at a time, until it hands over. Call it to hand over; alone, that does nothing.

    Whose turn it is tells who calls, and not the thread: on CUDA a backward runs in a thread of autograd's own.
    """

    def __init__(self):
        self.changed, self.turn, self.alone, self.error = threading.Condition(), 0, True, None
        self.pool = ThreadPoolExecutor(1, "turns")

    def __call__(self):
        with self.changed:
            mine = self.turn
            if not self.alone:
                self.give(1 - mine)
            self.await_turn(mine)

    def both(self, first, second):
        """Run both to their ends; `first` begins, in this thread. Raises what the first to fail raised."""
        self.turn, self.alone, self.error = 0, False, None
        other = self.pool.submit(self.run, 1, second)
        self.run(0, first)
        wait([other])
        if self.error:
            raise self.error

    def run(self, mine, function):
        try:
            with self.changed:
                self.await_turn(mine)
            function()
        except BaseException as e:  # for both() to raise
            self.error = self.error or e
        with self.changed:
            self.alone = True
            self.give(1 - mine)

    def give(self, whose):
        self.turn = whose
        self.changed.notify_all()

    def await_turn(self, mine):
        self.changed.wait_for(lambda: self.turn == mine)
        if self.error:
            raise RuntimeError("the other half of this pair of micro-batches has failed")


def tensors(*trees):
    return [t for t in tree_leaves(trees) if isinstance(t, torch.Tensor)]


class Lane:
    """The CUDA streams of one stage: one for all that it computes, one of high priority for boundaries after FFNs."""

    def __init__(self):
        self.own, self.high = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)

    def run(self, function):
        """Called between fork and join: they wait for the current stream, and have it wait, where the two halves of a
        pair are not yet, or no longer, beside each other."""
        with torch.cuda.stream(self.own):
            function()

    def fork(self):
        self.own.wait_stream(torch.cuda.current_stream())

    def join(self):
        torch.cuda.current_stream().wait_stream(self.own)

    def beside(self, function, *args):
        """function(*args) on the high-priority stream, between what is before and behind it on the current one."""
        here = torch.cuda.current_stream()
        self.high.wait_event(here.record_event())
        with torch.cuda.stream(self.high):
            out = function(*args)
        here.wait_event(self.high.record_event())
        # memory goes back to the stream it came from when Python lets it go: not before the other has read it, either
        for t in tensors(args):
            t.record_stream(self.high)
        for t in tensors(out):
            t.record_stream(here)
        return out


class NoLane:
    """In a Lane's place on a CPU."""

    fork = join = staticmethod(lambda: None)
    run = staticmethod(lambda function: function())


def lane(device):
    return Lane() if device.type == "cuda" else NoLane()


class AfterFFN:
    """A residual connection of which the boundary after an FFN runs beside the rest. F of sublayer s = 1, 3, ... is an
    FFN: it is closed by the residual connection of the next attention, or by its own, where a segment ends."""

    def __init__(self, residual, lane):
        self.residual, self.lane, self.reads_attention = residual, lane, residual.s % 2 == 0

    def __call__(self, x, y, carry):
        if self.reads_attention and y is not None:
            return self.lane.beside(self.residual, x, y, carry)
        return self.residual(x, y, carry)

    def close(self, x, y, carry):
        if self.reads_attention:
            return self.residual.close(x, y, carry)
        return self.lane.beside(self.residual.close, x, y, carry)


def boundaries_beside(sublayers, lane):
    """The triples of GPT.sublayers, with the boundaries after FFNs on the lane's high-priority stream."""
    if isinstance(lane, NoLane):
        return sublayers
    return ((AfterFFN(residual, lane), norm, f) for residual, norm, f in sublayers)


class Overlap:
    """What a schedule of torch's runs in place of its own forward, backward, and pair of them.

    stages: {number: PipelineStage} of this rank; lanes: {number: lane}. It receives, runs and hands on as the loop in
    torch's _PipelineScheduleRuntime does; sends are actions of their own, and stay torch's.
    """

    def __init__(self, schedule, stages, lanes, turns):
        self.schedule, self.stages, self.lanes, self.turns = schedule, stages, lanes, turns
        for kind in (FORWARD, FULL_BACKWARD, OVERLAP_F_B):
            schedule.register_custom_function(kind, self)

    def __call__(self, action, context):
        """The function that torch calls: one action, or the two of a pair in turns."""
        parts = action.sub_actions or (action,)
        lanes = [self.lanes[part.stage_index] for part in parts]
        runs = [partial(lane.run, partial(self.run, part, context)) for lane, part in zip(lanes, parts, strict=True)]
        for one in lanes:
            one.fork()
        self.turns.both(*runs) if len(runs) == 2 else runs[0]()
        for one in lanes:
            one.join()

    def run(self, action, context):
        run = {FORWARD: self.forward, FULL_BACKWARD: self.backward}[action.computation_type]
        stage = self.stages[action.stage_index]
        self.schedule._assert_unsharded(stage)
        run(stage, action.stage_index, action.microbatch_index, context)

    def forward(self, stage, s, m, context):
        """Micro-batch m through stage s. What comes from a stage on this rank was put there, the rest was sent."""
        if not stage.is_first and s - 1 not in self.stages:
            _wait_batch_p2p(self.schedule.fwd_recv_ops.pop((s, m)))
        out = stage.forward_one_chunk(m, context.arg_mbs[m], context.kwarg_mbs[m], save_forward_output=False)
        self.schedule._maybe_compute_loss(stage, out, context.target_mbs, m)
        if s + 1 in self.stages:
            self.stages[s + 1].set_local_fwd_input(self.handed(out, s + 1), m)

    def backward(self, stage, s, m, context):
        """The gradients of stage s for micro-batch m, all of them: see pipeline.whole_backwards."""
        schedule = self.schedule
        if not stage.is_last and s + 1 not in self.stages:
            _wait_batch_p2p(schedule.bwd_recv_ops.pop((s, m)))
        loss = schedule._maybe_get_loss(stage, m)
        schedule.backward_counter[s] += 1
        last = schedule.backward_counter[s] == schedule._n_microbatches
        stage.backward_one_chunk(m, loss=loss, full_backward=True, last_backward=last)
        if s - 1 in self.stages:
            self.stages[s - 1].set_local_bwd_input(self.handed(stage.get_local_bwd_output(m), s - 1), m)

    def handed(self, out, s):
        """What one stage here hands to stage s, whose stream reads it too."""
        if isinstance(self.lanes[s], Lane):
            for t in tensors(out):
                t.record_stream(self.lanes[s].own)
        return out
