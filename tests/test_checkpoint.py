"""checkpoint.py: what is saved comes back, whatever the number of processes; what is damaged is found and named."""

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import mhc
import run_folder
from checkpoint import CheckpointError
from model import GPT, GPTConfig
from owned import NotOurs
from parallel import Ranks, by_mesh
from tests.ranks import run_ranks

TINY = dict(
    vocab_size=257,
    seq_len=16,
    n_layer=2,
    n_embd=32,
    n_head=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    intermediate_size=64,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    impl="ref",
)


CUT = {"pipeline": (1, 2), "both": (2, 2)}  # expert_size, pipeline_size


def cut(seed, kind):
    """What this process has of a tiny model whose experts, or depth, are cut; all with FSDP."""
    ranks = Ranks("fsdp", dist.get_rank(), dist.get_world_size(), torch.device("cpu"), 0, 60, *CUT[kind])
    with torch.device("meta"):
        model = GPT(GPTConfig(**TINY))
    ranks.build_pipeline(model, "1f1b", nullcontext)
    ranks.shard(model)
    ranks.initialise(model, seed)
    return model


def make(seed, kind="one", **changes):
    """A tiny model (bare, 'ddp', 'fsdp', 'hsdp', or of CUT), its optimizer after two steps, gradients differing
    everywhere."""
    model = GPT(GPTConfig(**TINY | changes)) if kind not in CUT else cut(seed, kind)
    if kind not in CUT:
        model.init_weights(seed)
    for i, gate in enumerate(model.gates()):
        gate.e_score_correction_bias += torch.arange(4) * 0.1 * (seed + i)
    net = model
    if kind == "ddp":
        net = DistributedDataParallel(model)
    elif kind == "fsdp":
        net = fully_shard(model)
    elif kind == "hsdp":  # two copies of two shards
        net = fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    optimizer = torch.optim.AdamW([{"params": ps} for ps in by_mesh(net.parameters())], lr=0.01 * seed)
    for _ in range(2):
        for p in net.parameters():
            p.grad = 0.3 * p.detach() + 0.01 * seed
        optimizer.step()
    optimizer.zero_grad()
    return net, optimizer


def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def everything(net, optimizer):
    """{key: whole tensor} of weights, buffers and moments, read without checkpoint.py's help."""
    model = getattr(net, "module", net)
    found = {name: whole(t) for name, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        found |= {f"{name}.{key}": whole(t) for key, t in optimizer.state[p].items()}
    if len(model.blocks()) < TINY["n_layer"]:  # the rest is on the other ranks of the pipeline
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, found)
        found = {name: t for part in everyones for name, t in part.items()}
    return found


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def save(run, step, seed=1, **options):
    net, optimizer = make(seed)
    checkpoint.save(str(run), step, net, optimizer, {"best_loss": 2.5, "tokens": [step]}, dict(TINY), **options)
    return os.path.join(run, f"step-{step:08d}")


def steps(run):
    return [checkpoint.step_of(f) for f in checkpoint.step_folders(str(run))]


# -- round trips ----------------------------------------------------------------------------------------------------


def test_one_process_comes_back_bit_for_bit(tmp_path):
    net, optimizer = make(1)
    torch.manual_seed(7)
    checkpoint.save(str(tmp_path), 12, net, optimizer, {"best_loss": 1 / 3, "list": [1, None]}, dict(TINY))
    wanted, drawn = everything(net, optimizer), torch.rand(3)
    other, other_optimizer = make(2)
    with pytest.raises(AssertionError):
        same(everything(other, other_optimizer), wanted)
    state = checkpoint.load(checkpoint.latest_complete(str(tmp_path)), other, other_optimizer)
    same(everything(other, other_optimizer), wanted)
    assert state == {"best_loss": 1 / 3, "list": [1, None]}
    assert torch.equal(torch.rand(3), drawn)  # the generator goes on where it was
    assert other_optimizer.param_groups[0]["lr"] == 0.02  # hyperparameters belong to the settings
    assert os.readlink(tmp_path / "latest") == "step-00000012"


def test_a_fresh_optimizer_gets_its_moments(tmp_path):
    net, optimizer = make(1)
    checkpoint.save(str(tmp_path), 2, net, optimizer, {}, dict(TINY))
    other = make(2)[0]
    fresh = torch.optim.AdamW(other.parameters(), lr=0.5)
    checkpoint.load(str(tmp_path / "step-00000002"), other, fresh)
    same(everything(other, fresh), everything(net, optimizer))


def test_saved_before_the_first_step(tmp_path):
    net = make(1)[0]
    unused = torch.optim.AdamW(net.parameters())
    for p in net.parameters():
        p.grad = torch.full_like(p, torch.nan)  # a first step that was skipped: no state, but gradients
    checkpoint.save(str(tmp_path), 1, net, unused, {}, dict(TINY))
    other, fresh = make(2)[0], torch.optim.AdamW(net.parameters())
    checkpoint.load(str(tmp_path / "step-00000001"), other, fresh)
    assert not fresh.state
    same(other.state_dict(), net.state_dict())


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    folder = save(tmp_path, 3)
    assert {os.path.splitext(f)[1] for f in os.listdir(folder)} == {".safetensors", ".json"}
    checkpoint.load(run_folder.resume_point(str(tmp_path)), *make(2))
    checkpoint.load_model(str(tmp_path))


def check_resharding(folder, source, seed, targets):
    """On `len(ranks)` processes: save from the kind `source` if given, and load into each kind of `targets`."""
    if source:
        net, optimizer = make(seed, source)
        checkpoint.save(folder, 5, net, optimizer, {"n": 5}, dict(TINY))
        wanted = everything(net, optimizer)
        if dist.get_rank() == 0:
            save_file({k: t.contiguous() for k, t in wanted.items()}, os.path.join(folder, "wanted.safetensors"))
        dist.barrier()
    wanted = load_file(os.path.join(folder, "wanted.safetensors"))
    for kind in targets:
        net, optimizer = make(seed + 1, kind)
        assert checkpoint.load(run_folder.resume_point(folder), net, optimizer) == {"n": 5}
        same(everything(net, optimizer), wanted)


@pytest.mark.parametrize(
    "source, world, targets",
    [
        ("fsdp", 4, {4: ["fsdp"], 2: ["fsdp", "ddp"], 1: ["one", "fsdp"]}),
        ("ddp", 2, {4: ["fsdp"], 1: ["one"]}),
        ("hsdp", 4, {2: ["fsdp"], 4: ["hsdp"]}),
        ("both", 4, {2: ["pipeline"], 1: ["one"]}),
        ("one", 1, {4: ["both"]}),
        ("one", 1, {3: ["fsdp", "ddp"]}),  # 3 divides few of the shapes, and alpha (3,) by 4 leaves an empty shard
    ],
)
def test_resharding(tmp_path, source, world, targets):
    run_ranks(world, check_resharding, str(tmp_path), source, 1, [])
    for ranks, kinds in targets.items():
        run_ranks(ranks, check_resharding, str(tmp_path), None, 1, kinds)
    weights = checkpoint.load_weights(str(tmp_path / "step-00000005"))
    wanted = load_file(tmp_path / "wanted.safetensors")
    same(weights, {k: wanted[k] for k in weights})


def test_files_are_cut_at_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 40_000)
    folder = save(tmp_path, 1)
    sizes = [os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder) if f.endswith(".safetensors")]
    assert len(sizes) > 5 and max(sizes) < 40_000 + 257 * 32 * 4 + 20_000  # one tensor more, and a header
    other, optimizer = make(2)
    checkpoint.load(folder, other, optimizer)
    same(everything(other, optimizer), everything(*make(1)))


def test_load_model_and_export(tmp_path, capsys):
    folder = save(tmp_path, 4)
    net, _ = make(1)
    idx = torch.arange(16).view(1, 16)
    for path in (tmp_path, folder, tmp_path / "latest"):
        model, settings = checkpoint.load_model(str(path))
        assert not model.training and settings == TINY
        assert torch.equal(model(idx)[0], net.eval()(idx)[0])
    model, _ = checkpoint.load_model(folder, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.state_dict().items()}
    assert dtypes["lm_head.weight"] == torch.bfloat16 and dtypes["layers.1.attn_residual.phi"] == torch.float32
    assert model(idx)[0].isfinite().all()
    file = str(tmp_path / "all.safetensors")
    checkpoint.main([str(tmp_path), file])
    same(load_file(file), net.state_dict())
    with safe_open(file, "pt") as f:
        assert json.loads(f.metadata()["settings"]) == TINY and f.metadata()["step"] == "4"
    checkpoint.main([str(tmp_path)])
    assert "step-00000004: whole" in capsys.readouterr().out


def test_a_model_trained_with_an_impl_that_cannot_run_here_is_loaded_all_the_same(tmp_path, monkeypatch, capsys):
    """A checkpoint from a GPU on a CPU: the weights are the same, and a line says what takes the kernels' place."""
    net, optimizer = make(1, impl="auto")
    checkpoint.save(str(tmp_path), 4, net, optimizer, {}, TINY | {"impl": "triton"})
    monkeypatch.setattr(mhc, "INTERPRETED", False)
    model, settings = checkpoint.load_model(str(tmp_path))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "trained with impl='triton', here 'auto' takes its place" in said
    idx = torch.arange(16).view(1, 16)
    assert torch.equal(model(idx)[0], net.eval()(idx)[0]) and settings["impl"] == "triton"


def test_an_export_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    folder = save(tmp_path, 4)

    def interrupted(f, *more):
        f.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_safetensors", interrupted)
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.export(folder, str(tmp_path / "out/all.safetensors"))
    assert os.listdir(tmp_path / "out") == []


def test_another_model_is_refused(tmp_path):
    folder = save(tmp_path, 4)
    for changes in ({"n_layer": 3}, {"n_layer": 1}, {"n_embd": 48}, {"residual": "hc"}):
        with pytest.raises(CheckpointError, match="does not fit this model: .* there and .* here"):
            checkpoint.load(folder, *make(1, **changes))


# -- what is kept ---------------------------------------------------------------------------------------------------


def test_the_last_and_the_best_are_kept(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=3, best=step in (1, 2))
    assert steps(tmp_path) == [2, 5, 6, 7]
    with pytest.raises(ValueError, match="at least 2"):
        save(tmp_path, 8, keep=1)


def test_the_same_step_again(tmp_path):
    save(tmp_path, 3, seed=1)
    folder = save(tmp_path, 3, seed=2)
    assert checkpoint.problem_with(folder) is None and steps(tmp_path) == [3]
    same(checkpoint.load_weights(folder), make(2)[0].state_dict())


# -- damage ---------------------------------------------------------------------------------------------------------


def flip(path, at):
    with open(path, "r+b") as f:
        f.seek(at % os.path.getsize(path))
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 4]))


def truncate(path, at):
    os.truncate(path, at % os.path.getsize(path))


def remove(path, at):
    os.remove(path)


def replace_by_fifo(path, at):
    os.remove(path)
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [flip, truncate, remove, replace_by_fifo])
@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "state.json", "manifest.json"])
def test_damage_is_found_and_named(tmp_path, capsys, damage, name):
    save(tmp_path, 1, seed=1)
    folder = save(tmp_path, 2, seed=2)
    damage(os.path.join(folder, name), 54321)
    with pytest.raises(CheckpointError, match="broken"):
        checkpoint.find(folder)
    found = checkpoint.latest_complete(str(tmp_path))
    assert found == str(tmp_path / "step-00000001")
    line = capsys.readouterr().err
    assert folder in line and name.split(".")[0] in line, line
    same(checkpoint.load_model(str(tmp_path))[0].state_dict(), make(1)[0].state_dict())


def put_strangers(folder):
    """What a file manager, a person and another checkpoint may leave in a step folder; DCP would read the last."""
    (folder / ".DS_Store").write_bytes(b"\0\1")
    (folder / "notes").mkdir()
    (folder / "notes" / "today.txt").write_text("loss looks good")
    os.symlink("/nowhere", folder / "link")
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "shard-00009-model-00001-of-00001.safetensors")


def test_strangers_files_are_ignored_and_survive_the_checkpoint(tmp_path):
    folder = tmp_path / "step-00000001"
    save(tmp_path, 1)
    put_strangers(folder)
    assert run_folder.resume_point(str(tmp_path)) == str(folder)
    same(checkpoint.load_model(str(tmp_path))[0].state_dict(), make(1)[0].state_dict())
    checkpoint.load(str(folder), *make(2))
    for step in (2, 3, 4):
        save(tmp_path, step)  # the first is pruned, but for what is not ours
    left = {".DS_Store", "notes", "link", "shard-00009-model-00001-of-00001.safetensors"}
    assert steps(tmp_path) == [1, 3, 4] and set(os.listdir(folder)) == left  # a shard's name: so it is looked at
    assert (folder / "notes" / "today.txt").read_text() == "loss looks good"
    assert checkpoint.find(str(tmp_path)) == str(tmp_path / "step-00000004")


def dangling_link(path):
    os.remove(path)
    os.symlink("/not/mounted", path)


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "state.json", "manifest.json", ""])
def test_unreadable_is_not_broken(tmp_path, name):
    """A link to a disk that is not mounted: the run stops, nothing is renamed, and an older one is not used instead."""
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    if not name:
        os.rename(folder, tmp_path / "elsewhere")
        os.symlink("/not/mounted", folder)
    else:
        dangling_link(os.path.join(folder, name))
    before = sorted(os.listdir(tmp_path))
    for use in (run_folder.resume_point, checkpoint.find, checkpoint.load_model):
        with pytest.raises(CheckpointError, match="is a link to /not/mounted, which is not there.*nothing was") as e:
            use(str(tmp_path))
        assert e.value.code == 2 and "\n" not in str(e.value)
    assert sorted(set(os.listdir(tmp_path)) - {".lock"}) == before


def test_an_io_error_is_not_damage(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    killed = tmp_path / ".tmp-step-00000003"
    killed.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", fail)
        with pytest.raises(CheckpointError, match="Input/output error.*is not known, and nothing was changed") as e:
            run_folder.resume_point(str(tmp_path))
    assert e.value.code == 2 and steps(tmp_path) == [1, 2]
    assert killed.exists()  # what a killed save has left is changed no more than the rest
    assert run_folder.resume_point(str(tmp_path)) and not killed.exists()


def test_no_checkpoint_of_several_can_be_used(tmp_path):
    """The run stops, twice too, and nothing is renamed; nor does it start anew when only broken-step-... are there."""
    for step in (1, 2):
        truncate(os.path.join(save(tmp_path, step), "state.json"), 99)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none of its 2 checkpoints can be used.*--init_from=scratch") as e:
            run_folder.resume_point(str(tmp_path))
        assert e.value.code == 2 and steps(tmp_path) == [1, 2]
    for step in (1, 2):
        os.rename(tmp_path / f"step-0000000{step}", tmp_path / f"broken-step-0000000{step}")
    with pytest.raises(CheckpointError, match="no checkpoint but broken ones"):
        run_folder.resume_point(str(tmp_path))


def test_a_copy_under_another_steps_name_is_refused(tmp_path):
    shutil.copytree(save(tmp_path, 4), tmp_path / "step-00000007")
    for use in (checkpoint.find, run_folder.resume_point):
        with pytest.raises(CheckpointError, match="step-00000007: holds step 4: a copy of step-00000004") as e:
            use(str(tmp_path))
        assert e.value.code == 2
    assert steps(tmp_path) == [4, 7]


def test_the_command_says_last_what_is_broken_and_exits_1(tmp_path, capsys):
    save(tmp_path, 1)
    flip(os.path.join(save(tmp_path, 2), "state.json"), 99)
    with pytest.raises(SystemExit) as e:
        checkpoint.main([str(tmp_path)])
    assert e.value.code == f"error: 1 of 2 checkpoints in {tmp_path} cannot be used"  # sys.exit(text): exit code 1
    out = capsys.readouterr().out
    assert "step-00000001: whole" in out and "step-00000002: BROKEN: state.json was altered" in out


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    net, optimizer = make(1)
    with torch.no_grad():
        net.norm.weight[3] = torch.nan
    checkpoint.save(str(tmp_path), 1, net, optimizer, {}, dict(TINY))
    with pytest.raises(CheckpointError, match="norm.weight holds what is no number.*before the run diverged"):
        checkpoint.load_model(str(tmp_path))
    checkpoint.load(str(tmp_path / "step-00000001"), *make(2))  # the run itself may go on


def test_settings_in_a_checkpoint_that_cannot_be(tmp_path):
    """Signed properly, as by a stranger's program: refused in one line, before memory is asked for."""
    folder = save(tmp_path, 1)
    record = json.load(open(os.path.join(folder, "state.json")))
    for changes, named in (
        ({"n_layer": "2"}, "state.json: settings.n_layer: wanted a whole number"), ({"n_head": None}, "n_head"),
        ({"n_layer": 900}, "n_layer=900, but its shards have 2"), ({"n_embd": 2**20}, "does not fit"),
        ({"residual": "resnet"}, "residual='resnet'"), ({"norm_eps": -1.0}, "norm_eps"),
        ({"n_embd": 2**40}, "state.json: settings: n_embd"),
    ):  # fmt: skip
        os.remove(os.path.join(folder, "state.json"))
        os.remove(os.path.join(folder, "manifest.json"))
        files = checkpoint.describe(folder, os.listdir(folder))
        checkpoint.write_json(os.path.join(folder, "state.json"), record | {"settings": TINY | changes})
        files |= checkpoint.describe(folder, ["state.json"])
        checkpoint.write_json(os.path.join(folder, "manifest.json"), {"format": 1, "files": files})
        with pytest.raises(CheckpointError) as e:
            checkpoint.load_model(str(tmp_path))
        assert named in str(e.value) and "\n" not in str(e.value)


def test_every_byte_of_the_manifest_matters(tmp_path):
    """A flip anywhere in it is either found or harmless: what loads is what was saved."""
    folder = save(tmp_path, 1)
    path = os.path.join(folder, "manifest.json")
    before = json.load(open(path))
    harmless = 0
    for at in range(os.path.getsize(path)):
        flip(path, at)
        if checkpoint.problem_with(folder) is None:
            harmless += 1
            assert json.load(open(path)) == before, at
        flip(path, at)
    assert harmless < 40  # white space between the entries


def test_broken_ones_are_set_aside_at_a_resume(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    flip(tmp_path / "step-00000003" / "state.json", 99)
    os.makedirs(tmp_path / ".tmp-step-00000004")
    assert run_folder.resume_point(str(tmp_path)) == str(tmp_path / "step-00000002")
    assert steps(tmp_path) == [1, 2] and os.path.isdir(tmp_path / "broken-step-00000003")
    assert not any(name.startswith(".tmp-step") for name in os.listdir(tmp_path))
    save(tmp_path, 3)
    flip(tmp_path / "step-00000003" / "state.json", 99)
    assert run_folder.resume_point(str(tmp_path)) == str(tmp_path / "step-00000002")
    assert os.path.isdir(tmp_path / "broken-step-00000003-2")  # beside the first
    save(tmp_path, 4)
    assert steps(tmp_path) == [2, 4]  # the broken one was not counted among the two


def test_no_checkpoint(tmp_path):
    assert run_folder.resume_point(str(tmp_path / "new")) is None
    with pytest.raises(CheckpointError, match="wanted a run folder"):
        checkpoint.load_model(str(tmp_path / "nowhere"))


# -- full disk ------------------------------------------------------------------------------------------------------


def check_full_disk(folder):
    net, optimizer = make(1, "fsdp")
    checkpoint.save(folder, 1, net, optimizer, {}, dict(TINY))
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as e:
        checkpoint.save(folder, 2, net, optimizer, {}, dict(TINY))
    assert "step 2 could not be saved" in str(e.value) and "\n" not in str(e.value)
    assert "File too large" in str(e.value) and "(process 1)" in str(e.value) and "step-00000001" in str(e.value)
    dist.barrier()
    assert sorted(os.listdir(folder)) == [".made_by_mhc", "latest", "step-00000001"]
    assert checkpoint.latest_complete(folder) is not None


def test_full_disk_on_one_of_two_processes(tmp_path):
    run_ranks(2, check_full_disk, str(tmp_path))


def test_full_disk_while_exporting(tmp_path, monkeypatch):
    folder = save(tmp_path, 1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            checkpoint.export(folder, str(tmp_path / "x.safetensors"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert sorted(os.listdir(tmp_path)) == [".made_by_mhc", "latest", "step-00000001"]


# -- kills ----------------------------------------------------------------------------------------------------------


def save_for_ever(run, first, done):
    torch.set_num_threads(1)
    net, optimizer = make(1)
    for step in range(first, 10**6):
        checkpoint.save(run, step, net, optimizer, {"step": step}, dict(TINY))
        done.value = step


def test_kills_in_back_to_back_saves(tmp_path):
    """30 kills -9 at random moments, nearly all inside a save: the last finished save is always there, whole."""
    rng, context, run = random.Random(1), mp.get_context("fork"), str(tmp_path)
    first, cut = 1, 0
    for _ in range(30):
        done = context.Value("q", first - 1)
        process = context.Process(target=save_for_ever, args=(run, first, done))
        process.start()
        end = time.monotonic() + 30
        while done.value < first + rng.randrange(2) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        cut += any(name.startswith(".tmp") for name in os.listdir(run))
        folder = run_folder.resume_point(run)
        assert folder is not None and checkpoint.step_of(folder) >= done.value
        assert not any(name.startswith((".tmp", "broken")) for name in os.listdir(run))
        assert checkpoint.load(folder, *make(2))["step"] == checkpoint.step_of(folder)
        first = checkpoint.step_of(folder) + 1
    assert cut >= 10, f"only {cut} of 30 kills fell into a save"


def test_a_folder_in_use_is_refused(tmp_path):
    code = f"import run_folder, time; run_folder.resume_point({str(tmp_path)!r}); print('has it', flush=True)"
    code += "; time.sleep(60)"
    root = os.path.dirname(checkpoint.__file__)
    other = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "has it\n"
        with pytest.raises(CheckpointError, match="another run is going on"):
            run_folder.resume_point(str(tmp_path))
    finally:
        other.kill()
        other.wait()
    assert run_folder.resume_point(str(tmp_path)) is None  # a killed run holds nothing


# -- one run or another ---------------------------------------------------------------------------------------------


def test_move_aside(tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert run_folder.move_aside(str(run)) is None
    for k, name in ((1, f"{run}.old"), (2, f"{run}.old-2")):
        save(run, k)
        assert run_folder.move_aside(str(run) + "/") == name
        assert not run.exists() and steps(name) == [k]
    save(run, 3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_folder.move_aside(str(run)) is None and steps(run) == [3]


def test_trim_records(tmp_path):
    """What is taken out is kept beside, torn lines and lines that are no records too."""
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics-dropped.jsonl"
    lines = ['{"step": 1, "loss": 2.5}', '{"step": 2, "loss": null}', '{"step": 2, "val_loss": 1}', '{"step": 3}']
    path.write_text("\n".join(lines) + '\n7\n{"step": "x"}\n{"step": 4, "lo')
    assert run_folder.trim_records(str(path), 2) == 4
    assert path.read_text().splitlines() == lines[:3] and path.read_text().endswith("\n")
    assert aside.read_text() == '{"step": 3}\n7\n{"step": "x"}\n{"step": 4, "lo\n'
    assert run_folder.trim_records(str(path), 2) == 0 and run_folder.trim_records(str(path), -1) == 3
    assert path.read_text() == "" and aside.read_text().splitlines()[4:] == lines[:3]
    assert run_folder.trim_records(str(tmp_path / "none.jsonl"), 2) == 0
    assert sorted(os.listdir(tmp_path)) == ["metrics-dropped.jsonl", "metrics.jsonl"]
    os.remove(aside)
    os.symlink(tmp_path / "thesis", aside)
    with pytest.raises(NotOurs, match="metrics-dropped.jsonl: is a link"):
        run_folder.trim_records(str(path), -1)


# -- other people's files -------------------------------------------------------------------------------------------


def test_a_folder_of_others_is_not_taken_for_a_run(tmp_path):
    """Another tool's records, a config.json that is not ours, a link for the lock: one line, and all stays as it is."""
    for name, content in (
        ("metrics.jsonl", '{"a": 1}\n'),
        ("config.json", '{"model": "x"}'),
        ("latest", "x"),
        (".lock", "x"),
    ):
        folder = tmp_path / name.strip(".")
        folder.mkdir()
        (folder / name).write_text(content)
        for use in (lambda f: save(f, 1), run_folder.resume_point):
            with pytest.raises(CheckpointError, match=f"holds {name}, which is not known to be ours") as e:
                use(str(folder))
            assert e.value.code == 2
        assert os.listdir(folder) == [name] and (folder / name).read_text() == content
        with pytest.raises(NotOurs, match="not known to be a run of ours"):
            run_folder.move_aside(str(folder))


def test_a_folder_with_other_names_in_it_is_used_and_they_stay(tmp_path):
    (tmp_path / "slurm-17.out").write_text("x")
    save(tmp_path, 1)
    assert run_folder.resume_point(str(tmp_path)) and (tmp_path / "slurm-17.out").read_text() == "x"


def test_a_run_of_before_there_were_marks_is_gone_on_with(tmp_path):
    save(tmp_path, 1)
    os.remove(tmp_path / ".made_by_mhc")
    assert checkpoint.load_model(str(tmp_path)) and run_folder.resume_point(str(tmp_path))
    assert os.path.exists(tmp_path / ".made_by_mhc")


def test_links_are_not_followed(tmp_path):
    run, thesis = tmp_path / "run", tmp_path / "thesis"
    save(run, 1)
    thesis.write_text("x" * 100)
    os.symlink(thesis, run / ".lock")
    with pytest.raises(CheckpointError, match=r"\.lock: is a link") as e:
        run_folder.resume_point(str(run))
    assert e.value.code == 2 and thesis.read_text() == "x" * 100
    os.remove(run / ".lock")
    os.symlink(run, tmp_path / "link")
    with pytest.raises(NotOurs, match="is a link"):
        run_folder.move_aside(str(tmp_path / "link"))
    os.rename(run / "step-00000001", tmp_path / "other disk")
    os.symlink(tmp_path / "other disk", run / "step-00000001")  # somebody's arrangement: used, and not pruned
    assert checkpoint.find(str(run)) == str(run / "step-00000001")
    for step in (2, 3, 4):
        save(run, step)
    assert steps(run) == [1, 3, 4] and len(os.listdir(tmp_path / "other disk")) == 3
    os.remove(run / "latest")
    (run / "latest").write_text("mine")
    save(run, 5)
    assert (run / "latest").read_text() == "mine"


@pytest.mark.parametrize(
    "target, named",
    [
        ("{run}/step-00000001/model.safetensors", "lies inside the checkpoint"),
        ("{run}/step-00000001/shard-00001-model-00001-of-00001.safetensors", "lies inside the checkpoint"),
        ("{run}/latest/x", "lies inside the checkpoint"), ("{root}/thesis", "was not made by this program"),
        ("{root}/link", "is a link"), ("{root}/fifo", "is a FIFO"), ("{root}/folder", "is a folder"),
        ("/dev/null", "is a device"), ("{root}/nowhere/x", "No such file"),
    ],
)  # fmt: skip
def test_an_export_overwrites_nothing_but_an_export(tmp_path, target, named):
    run = tmp_path / "run"
    save(run, 1)
    (tmp_path / "thesis").write_text("x")
    (tmp_path / "folder").mkdir()
    os.symlink("thesis", tmp_path / "link")
    os.mkfifo(tmp_path / "fifo")
    before = {p: os.lstat(p).st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises((NotOurs, CheckpointError), match=named):
        checkpoint.main([str(run), target.format(run=run, root=tmp_path)])
    assert before == {p: os.lstat(p).st_mtime_ns for p in tmp_path.rglob("*")}
    for _ in range(2):
        checkpoint.main([str(run), str(tmp_path / "model.safetensors")])  # its own, it does


def test_kills_in_an_export_leave_nothing_half_written(tmp_path):
    """Kills -9 at random moments while a file is replaced over and over: it is whole, and nothing is beside it."""
    folder, file = save(tmp_path / "run", 1), str(tmp_path / "model.safetensors")
    checkpoint.export(folder, file)
    wanted, rng, context = load_file(file), random.Random(0), mp.get_context("fork")

    def work(done):
        torch.set_num_threads(1)
        for _ in range(10**6):
            checkpoint.export(folder, file)
            done.value += 1

    for _ in range(10):
        done = context.Value("q", 0)
        process = context.Process(target=work, args=(done,))
        process.start()
        end = time.monotonic() + 30
        while done.value < 1 and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        same(load_file(file), wanted)
        left = set(os.listdir(tmp_path)) - {"run", "model.safetensors"}
        assert not left or left == {".made_by_mhc.model.safetensors"}  # between two system calls: cleared by the next
    checkpoint.export(folder, file)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "run"]
