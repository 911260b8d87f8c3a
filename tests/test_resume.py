"""A run that is stopped, killed and started again is the run that was not: train.py and checkpoint.py together."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
from tests.ranks import Job, train_in_fork

TINY = (
    "--seq_len=16 --n_layer=2 --n_embd=32 --n_head=2 --kv_lora_rank=16 --qk_nope_head_dim=8 --qk_rope_head_dim=8 "
    "--v_head_dim=8 --intermediate_size=64 --n_routed_experts=4 --num_experts_per_tok=2 --moe_intermediate_size=16 "
    "--batch_size=4 --micro_batch_size=2 --lr=3e-3 --warmup_steps=2 --eval_sequences=4 --device=cpu --impl=ref "
    "--max_steps=20 --eval_interval=6 --checkpoint_interval=5 --maps_lr_scale=3"
).split()


SHARD = "shard-00001-model-00001-of-00001.safetensors"


def prepare(root, words="times", name="data"):
    """A corpus of a few thousand bytes."""
    text = root / f"text_{name}"
    text.mkdir()
    for part in ("a", "b"):
        lines = [f"{part}{i} {words} {j} is {i * j}." for i in range(30) for j in range(20)]
        (text / f"{part}.txt").write_text(" ".join(lines))
    flags = [f"--dataset={text}", "--tokenizer=bytes", f"--data_dir={root / name}", "--val_fraction=0.5"]
    root_dir = os.path.dirname(checkpoint.__file__)
    subprocess.run([sys.executable, "prepare_data.py", *flags], cwd=root_dir, check=True, capture_output=True)
    return root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A corpus, and in straight/ the run that nothing disturbs."""
    root = tmp_path_factory.mktemp("resume")
    prepare(root)
    codes, output = start(root, "straight")
    assert codes == [0], output
    return root


def flags(root, run, *more):
    return [*TINY, f"--data_dir={root / 'data'}", f"--out_dir={root / run}", *more]


def start(root, run, *more, hook=None):
    return train_in_fork(flags(root, run, *more), str(root / f"{run}.log"), hook=hook)


def records(run):
    """metrics.jsonl without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("step_ms", "peak_MB")} for r in lines]


def check_same_run(root, run):
    """The same records in the same order, each once, and the same weights and moments, all bit for bit."""
    assert records(root / run) == records(root / "straight")
    steps = [r["step"] for r in records(root / run) if "loss" in r]
    assert steps == list(range(1, 21))
    ours, theirs = (load_file(root / r / "step-00000020" / SHARD) for r in (run, "straight"))
    assert ours.keys() == theirs.keys() and any(k.startswith("optim.") for k in ours)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def at_step(wanted, action):
    """A hook that calls action() in the middle of step `wanted`, after its backward."""

    def hook(train):
        inner = train.forward_backward

        def forward_backward(model, corpus, step, *rest):
            loss = inner(model, corpus, step, *rest)
            if step + 1 == wanted:
                action()
            return loss

        train.forward_backward = forward_backward

    return hook


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("step, interval", [(2, 5), (11, 5), (14, 5), (14, 6)])
def test_kill_and_resume_is_the_straight_run(root, step, interval):
    """11: 10 steps, kill -9, resume, 10 more. 2: before the first checkpoint. 14: steps and an evaluation again, or
    from a checkpoint that was evaluated before it was saved: not again."""
    run, more = f"killed{step}_{interval}", f"--checkpoint_interval={interval}"
    codes, _ = start(root, run, more, hook=at_step(step, kill_me))
    assert codes == [-signal.SIGKILL]
    codes, output = start(root, run, more)
    assert codes == [0], output
    assert (f"going on from {root / run}/step-{step // interval * interval:08d}" in output) == (step > interval)
    check_same_run(root, run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [6, 13])
def test_a_signal_finishes_the_step_saves_and_exits_0(root, number, step):
    run = f"signal{number}at{step}"  # 6 is a step with an evaluation: the resumed run makes it
    codes, output = start(root, run, hook=at_step(step, lambda: os.kill(os.getpid(), number)))
    assert codes == [0] and f"stopped by a signal after step {step}" in output, output
    assert checkpoint.step_of(checkpoint.latest_complete(str(root / run))) == step
    assert records(root / run)[-1]["step"] == step
    codes, output = start(root, run)
    assert codes == [0], output
    check_same_run(root, run)


def test_the_best_is_kept(root):
    best = [f for f in checkpoint.step_folders(str(root / "straight")) if checkpoint.is_best(f)]
    losses = {r["step"]: r["val_loss"] for r in records(root / "straight") if "val_loss" in r}
    assert losses[20] == min(losses.values())  # only 20 is both evaluated and saved
    assert best == [str(root / "straight" / "step-00000020")]


STAGES = {  # where in a save the kill falls: (function of checkpoint.py, which call, before or after it)
    "no shard yet": ("dcp_call", "before"),
    "shards, no manifest": ("dcp_call", "after"),
    "before the rename": ("publish", "before"),
    "state.json, no manifest": ("write_json", "after"),
    "renamed, not pruned": ("publish", "after"),
    "while pruning": ("remove_folder", "after"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_kill_inside_a_save(root, stage):
    name, when = STAGES[stage]
    saves = []

    def hook(train):
        inner, save = getattr(checkpoint, name), checkpoint.save

        def killer(*args, **kwargs):
            if when == "before" and len(saves) == 3:
                kill_me()
            inner(*args, **kwargs)
            if len(saves) == 3:
                kill_me()

        def counted(*args, **kwargs):
            saves.append(1)
            setattr(checkpoint, name, killer)
            save(*args, **kwargs)
            setattr(checkpoint, name, inner)

        checkpoint.save = counted

    run = "save " + stage
    codes, output = start(root, run, hook=hook)
    assert codes == [-signal.SIGKILL], output
    saved = checkpoint.step_of(checkpoint.latest_complete(str(root / run)))
    assert saved == (15 if stage in ("renamed, not pruned", "while pruning") else 10)
    codes, output = start(root, run)
    assert codes == [0], output
    check_same_run(root, run)
    assert not any(n.startswith((".tmp", "broken")) for n in os.listdir(root / run))


def test_kills_at_random_moments(root):
    """Until the run is through: each loses the steps since the last save at the most."""
    rng, run, kills = random.Random(0), root / "random", 0
    more = ("--checkpoint_interval=2", "--max_steps=20")
    for _ in range(60):
        before = checkpoint.latest_complete(str(run))
        with Job(flags(root, "random", *more), str(root / "random.log")) as job:
            process = job.processes[0]
            target = (checkpoint.step_of(before) if before else 0) + rng.randrange(1, 5)
            end = time.monotonic() + 60
            while process.is_alive() and last_step(run) < target and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(rng.random() * 0.05)
            done = last_step(run)
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
        after = checkpoint.latest_complete(str(run))
        assert after is None or checkpoint.problem_with(after) is None
        assert (checkpoint.step_of(after) if after else 0) >= (done - 1) // 2 * 2  # saved before `done` was begun
    assert process.exitcode == 0 and kills >= 3
    assert records(run) == records(root / "straight")


def last_step(run):
    """The last step in metrics.jsonl, 0 if there is none."""
    try:
        found = re.findall(r'^\{"step": (\d+), "loss"', (run / "metrics.jsonl").read_text(), re.M)
    except FileNotFoundError:
        return 0
    return int(found[-1]) if found else 0


# -- what is refused, and starting anew -----------------------------------------------------------------------------


def test_another_model_or_other_data_is_refused(root):
    before = sorted(os.listdir(root / "straight"))
    prepare(root, "plus", "data2")
    for more, said in (
        (["--n_layer=3"], "n_layer=2, not with n_layer=3"),
        (["--residual=hc"], "residual='mhc', not with residual='hc'"),
        (["--seed=1"], "seed=1337, not with seed=1"),
        (["--batch_size=8"], "batch_size=4, not with batch_size=8"),
        ([f"--data_dir={root / 'data2'}"], "other data"),
    ):
        codes, output = start(root, "straight", *more)
        assert codes == [1] and said in output and "--init_from=scratch" in output, output
        assert "Traceback" not in output
    assert sorted(os.listdir(root / "straight")) == before
    check_same_run(root, "straight")


def test_another_model_is_refused_before_the_first_checkpoint_too(root):
    start(root, "early", hook=at_step(3, kill_me))
    codes, output = start(root, "early", "--n_embd=48")
    assert codes == [1] and "n_embd=32, not with n_embd=48" in output
    assert last_step(root / "early") == 2


def test_a_finished_run_is_left_alone_and_can_be_made_longer(root):
    codes, _ = start(root, "longer", "--max_steps=10", "--lr_schedule=constant")
    before = (root / "longer" / "metrics.jsonl").read_bytes()
    codes, output = start(root, "longer", "--max_steps=10", "--lr_schedule=constant")
    assert codes == [0] and "nothing to do" in output
    assert (root / "longer" / "metrics.jsonl").read_bytes() == before
    codes, output = start(root, "longer", "--max_steps=12", "--lr_schedule=constant", "--lr=1e-4")
    assert codes == [0] and "lr: 0.003 -> 0.0001" in output and "max_steps: 10 -> 12" in output
    found = [r for r in records(root / "longer") if "loss" in r]
    assert [r["step"] for r in found] == list(range(1, 13)) and [r["lr"] for r in found[9:]] == [3e-3, 1e-4, 1e-4]


def test_scratch_moves_the_old_run_aside(root):
    start(root, "twice", "--max_steps=3")
    old = (root / "twice" / "metrics.jsonl").read_bytes()
    codes, output = start(root, "twice", "--max_steps=2", "--residual=hc", "--init_from=scratch")
    assert codes == [0] and f"is now in {root / 'twice'}.old" in output
    assert (root / "twice.old" / "metrics.jsonl").read_bytes() == old
    assert checkpoint.step_of(checkpoint.latest_complete(str(root / "twice"))) == 2


def test_a_checkpoint_says_where_it_comes_from(root):
    record = json.load(open(root / "straight" / "step-00000020" / "state.json"))
    beside = json.load(open(root / "straight" / "config.json"))
    assert record["settings"] == beside["settings"] and record["settings"]["vocab_size"] == 257
    origin = record["state"]["origin"]
    assert origin == {k: v for k, v in beside.items() if k != "settings"}
    assert origin["data"]["train"] != origin["data"]["val"] and "--max_steps=20" in " ".join(origin["command"])
    model, settings = checkpoint.load_model(str(root / "straight"))
    assert torch.isfinite(model(torch.arange(16).view(1, 16))[0]).all() and settings["n_layer"] == 2


def test_another_commit_is_told_at_a_resume(root):
    shutil.copytree(root / "straight", root / "later")

    def later(train):
        inner = train.provenance
        train.provenance = lambda *args: inner(*args) | {"commit": "a-later-one"}

    codes, output = start(root, "later", hook=later)
    assert codes == [0] and "nothing to do" in output
    told = [line for line in output.splitlines() if line.startswith("  commit: ")]
    assert len(told) == 1 and told[0].endswith(" -> 'a-later-one'")
    codes, output = start(root, "straight")
    assert codes == [0] and "  commit: " not in output
