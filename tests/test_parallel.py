"""Several processes train what one trains: DDP, FSDP2, hybrid sharding, recomputation and accumulation together."""

import json
import os
import re
import signal
import time
from collections import Counter
from datetime import timedelta
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

import fp8
import parallel
import recompute
from model import GPT, GPTConfig
from parallel import check_batch, check_layout
from tests.ranks import Job, run_ranks, train_in_fork
from tests.test_resume import prepare

# a micro-batch of 8 tokens for 16 experts, 2 each: some get none
TINY = (
    "--seq_len=8 --n_layer=2 --n_embd=32 --n_head=2 --kv_lora_rank=16 --qk_nope_head_dim=8 --qk_rope_head_dim=8 "
    "--v_head_dim=8 --intermediate_size=64 --n_routed_experts=16 --num_experts_per_tok=2 --moe_intermediate_size=16 "
    "--batch_size=8 --micro_batch_size=1 --lr=3e-3 --lr_schedule=constant --warmup_steps=2 --eval_sequences=5 "
    "--device=cpu --max_steps=20 --eval_interval=10 --checkpoint_interval=10 --rank_timeout=60"
).split()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A corpus, and in one/ the run of one process."""
    root = tmp_path_factory.mktemp("parallel")
    prepare(root)
    codes, output = train(root, "one", 1)
    assert codes == [0], output
    return root


def flags(root, run, *more):
    return [*TINY, f"--data_dir={root / 'data'}", f"--out_dir={root / run}", *more]


def train(root, run, world, *more, hook=None):
    return train_in_fork(flags(root, run, *more), str(root / f"{run}.log"), world, hook)


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_same(root, run):
    """Every loss, of training and validation, every norm and load, as with one process."""
    ours, wanted = records(root / run), records(root / "one")
    assert [r["step"] for r in ours] == [r["step"] for r in wanted] and sum("loss" in r for r in ours) == 20
    for a, b in zip(ours, wanted, strict=True):
        for key in ("loss", "val_loss"):
            assert (a.get(key) or 0) == pytest.approx(b.get(key) or 0, abs=1e-5), (key, b["step"])
        for key in ("grad_norm", "expert_load"):
            assert (a.get(key) or 0) == pytest.approx(b.get(key) or 0, rel=1e-3), (key, b["step"])


@pytest.mark.parametrize(
    "world,layout",
    [
        (1, "--parallel=fsdp"),
        (2, "--parallel=ddp --reduce_always=True"),
        (4, "--parallel=ddp --recompute=mhc"),
        (2, "--parallel=fsdp --recompute=mhc --recompute_block=3"),
        (4, "--parallel=fsdp --recompute=full --micro_batch_size=2"),
        (4, "--parallel=fsdp --shard_size=2 --reduce_always=True --recompute=mhc"),
        (2, "--parallel=fsdp --expert_size=2 --recompute=mhc"),
        (4, "--parallel=fsdp --expert_size=2 --recompute=full --micro_batch_size=2"),
        (4, "--parallel=fsdp --expert_size=4 --reduce_always=True"),
        (2, "--parallel=fsdp --pipeline_size=2 --pipeline_schedule=1f1b --recompute=mhc"),
        (4, "--parallel=fsdp --pipeline_size=2 --pipeline_schedule=zbv --recompute=full"),
        (4, "--parallel=fsdp --pipeline_size=2 --pipeline_overlap=True --expert_size=2 --recompute=mhc"),
    ],
)
def test_losses_equal_one_process(root, world, layout):
    run = re.sub(r"\W+", "_", f"{world}{layout}")
    codes, output = train(root, run, world, *layout.split())
    assert codes == [0] * world, output
    assert output.count("step 20/20") == 1, "only one process prints"
    check_same(root, run)


def test_fsdp_recomputation_accumulation_and_resume_together(root):
    """Four shards with accumulation and replay, killed at once after step 13; two go on from the checkpoint of 10."""

    def die(train):
        inner = train.optimizer_step

        def optimizer_step(model, optimizer, step, *rest):
            if step == 13:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(model, optimizer, step, *rest)

        train.optimizer_step = optimizer_step

    layout = ["--parallel=fsdp", "--recompute=mhc"]
    codes, output = train(root, "killed", 4, *layout, hook=die)
    assert codes == [-signal.SIGKILL] * 4, output
    codes, output = train(root, "killed", 2, *layout)
    assert codes == [0, 0], output
    assert "step-00000010" in output and "step 11/20" in output and "step 10/20" not in output.split("going on")[1]
    check_same(root, "killed")


@pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")
def test_a_checkpoint_of_fp8_under_fsdp_is_one_of_any_run(root):
    steps = ["--max_steps=2", "--eval_interval=2"]
    codes, output = train(root, "eight", 2, "--parallel=fsdp", "--fp8=True", "--dtype=bfloat16", *steps)
    assert codes == [0, 0] and "bfloat16, products in FP8, emulated, sublayers not compiled" in output, output
    codes, output = train(root, "eight", 1, "--max_steps=3", "--eval_interval=1")
    assert codes == [0] and "step-00000002" in output and "fp8: True -> False" in output, output
    steps = [r for r in records(root / "eight") if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3] and steps[2]["loss"] < steps[0]["loss"] + 0.05


def test_a_rank_that_hangs_ends_the_run(root):
    """The others say which setting it was, and no process waits for ever."""

    def hang(train):
        if os.environ["RANK"] == "1":
            inner = train.optimizer_step
            train.optimizer_step = lambda m, o, step, *r: time.sleep(600) if step == 3 else inner(m, o, step, *r)

    start = time.monotonic()
    with Job(flags(root, "hung", "--parallel=ddp", "--rank_timeout=3"), str(root / "hung.log"), 2, hang) as job:
        job.processes[0].join(60)
        assert job.processes[0].exitcode not in (None, 0)
        assert job.processes[1].is_alive()
        assert "error: rank 0: another process is gone, or did not answer within rank_timeout=3.0 s" in job.output()
        assert "Traceback" not in job.output()  # one line is the last word
    assert time.monotonic() - start < 60 and not job.processes[1].is_alive()


def test_on_gpus_each_process_is_bound_to_its_own(monkeypatch):
    """As start() would call torch there: no GPU is touched."""
    seen = {}
    for name, value in dict(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.update(set=device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: seen.update(more, backend=backend))
    parallel.start("ddp", "cuda", rank_timeout=5)
    assert seen["device_id"] == torch.device("cuda:1") and seen["set"] == "cuda:1" and "nccl" in seen["backend"]
    seen.clear()
    parallel.start("ddp", "cpu", rank_timeout=5)
    assert "device_id" not in seen and seen["timeout"] == timedelta(seconds=5)


# -- inside FSDP ----------------------------------------------------------------------------------------------------

SMALL = dict(
    vocab_size=61, seq_len=8, n_layer=2, n_embd=32, n_head=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
    v_head_dim=8, intermediate_size=48, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    collapse="head",
)  # fmt: skip


def sharded(dtype="float32", reduce_dtype="float32", expert_size=1, eight_bits=False):
    """A GPT over all processes: its values, its shards, its small object."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**SMALL))
    if eight_bits:
        fp8.apply(model, "cpu", gather=True)
    ranks = parallel.Ranks("fsdp", dist.get_rank(), dist.get_world_size(), torch.device("cpu"), 0, 60, expert_size)
    ranks.shard(model, dtype, reduce_dtype)
    ranks.initialise(model, 7)
    return model, ranks


def whole():
    model = GPT(GPTConfig(**SMALL))
    model.init_weights(7)
    return model


def check_shards():
    """Values of one process exactly, cut; and never whole before they are gathered."""
    model, ranks = sharded()
    wanted = dict(whole().named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), wanted[name]), name
        assert p.to_local().numel() <= -(-p.shape[0] // ranks.world) * (p.numel() // p.shape[0]), name
    assert not any(b.is_meta for b in model.buffers())


def check_dtypes():
    """Inside forward and replay: F in bf16; mappings, gates and norms in fp32, unrounded; the streams in bf16."""
    model, _ = sharded("bfloat16")
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().mul_(1 + 2**-12)  # what bf16 cannot hold
    wanted = {name: p.full_tensor() for name, p in model.named_parameters()}
    recompute.apply(model, "mhc")
    seen = Counter()

    def wide(name):  # seen from a hook of its own, which runs when the parameters have been gathered
        def hook(module, args):
            seen[name] += 1
            for key, p in module.named_parameters():
                assert p.dtype == torch.float32 and torch.equal(p, wanted[f"{name}.{key}"]), (name, key)
            assert args[0].dtype == torch.bfloat16, name

        return hook

    def narrow(name):
        def hook(module, args):
            seen[name] += 1
            assert all(p.dtype == torch.bfloat16 for p in module.parameters()), name

        return hook

    for name, module in model.named_modules():
        if re.fullmatch(r"layers\.\d\.(\w+_residual|\w+_layernorm|input_layernorm|mlp.gate)|collapse_head|norm", name):
            module.register_forward_pre_hook(wide(name))
        if name.endswith(("o_proj", "experts", "down_proj")):
            module.register_forward_pre_hook(narrow(name))
    idx = torch.randint(61, (2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx)[1]
    loss.backward()
    for i in range(2):
        for name, times in (("attn_residual", 2), ("mlp_residual", 2), ("input_layernorm", 2), ("self_attn.o_proj", 1)):
            assert seen[f"layers.{i}.{name}"] == times, (i, name)  # 2: forward and replay
    assert all(seen[f"layers.1.mlp.{name}"] == 1 for name in ("gate", "experts", "shared_experts"))
    assert seen["collapse_head"] == seen["norm"] == 1
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def check_looks():
    """A forward without a backward, and a look at the maps, leave the shards that the optimizer has in sight.
    Both ranks draw the same tokens here, so their mean gradient is one process's."""
    model, ranks = sharded()
    names = {n: id(p) for n, p in model.named_parameters()}
    idx = torch.randint(61, (2, 8))
    model(idx, idx)[1].backward()
    with torch.no_grad():
        model.eval()
        model(idx, idx)
        model.train()
        maps = model.residual_maps(idx)
    assert {n: id(p) for n, p in model.named_parameters()} == names
    assert all(p.grad is not None for p in model.parameters())
    wanted = whole().residual_maps(idx)
    assert all(torch.equal(a, b) for x, y in zip(maps, wanted, strict=True) for a, b in zip(x, y, strict=True))
    wanted = whole()
    wanted(idx, idx)[1].backward()
    norm = torch.nn.utils.clip_grad_norm_(wanted.parameters(), 0.5).item()
    dist.barrier()
    assert ranks.clip_grad_norm(model, 0.5) == pytest.approx(norm, rel=1e-5)


def check_synchronisation():
    """No gradient is exchanged before the last micro-batch: until then the shards have none."""
    model, ranks = sharded()
    for last in (False, True):
        ranks.synchronise(model, last)
        idx = torch.randint(61, (1, 8))
        model(idx, idx)[1].backward()
        assert all((p.grad is not None) == last for p in model.parameters())
    ranks.synchronise(model, False, every=True)
    model.zero_grad()
    model(idx, idx)[1].backward()
    assert all(p.grad is not None for p in model.parameters())


def check_compiled():
    """Compiled sublayers with recomputation: the gradients of one process that does neither. aot_eager compiles graph
    and backward as torch.compile does, but needs no C++ compiler, which takes a minute."""
    model, _ = sharded()
    recompute.apply(model, "mhc")
    model.compile_sublayers(backend="aot_eager")
    wanted, idx = whole(), torch.randint(61, (2, 8))
    for net in (model, wanted):
        net(idx, idx)[1].backward()
    for (name, p), q in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=name)


def check_reduction():
    """reduce_dtype='bfloat16' rounds the gradients of the sublayers on their way, and no others."""
    idx, grads = torch.randint(61, (2, 8)), []
    for reduce_dtype in ("float32", "bfloat16"):
        model, _ = sharded(reduce_dtype=reduce_dtype)
        model(idx, idx)[1].backward()
        grads.append({name: p.grad.full_tensor() for name, p in model.named_parameters()})
    for name, exact in grads[0].items():
        rounded = grads[1][name]
        error = ((rounded - exact).norm() / exact.norm().clamp(min=1e-30)).item()
        fp32 = r"mlp\.gate\.|_residual\.|layers\.\d\.(input|post_attention)_layernorm|^norm|^lm_head|^collapse_head"
        if re.search(fp32, name):
            assert torch.equal(rounded, exact), name
        else:
            assert 1e-4 < error < 1e-2 and rounded.dtype == torch.float32, (name, error)


def check_prefetch():
    """Forward, each sublayer sends for the next one's weights; backward for those before it, nearest first."""
    wanted, inner = {}, {}

    def watch(way):
        inner[way] = getattr(FSDPModule, f"set_modules_to_{way}_prefetch")

        def watched(module, modules):
            wanted[way, module] = modules
            inner[way](module, modules)

        setattr(FSDPModule, f"set_modules_to_{way}_prefetch", watched)

    watch("forward")
    watch("backward")

    def lists(expert_size):
        wanted.clear()
        model, _ = sharded(expert_size=expert_size)
        names = {module: name.removeprefix("layers.") for name, module in model.named_modules()}
        found = {"forward": {}, "backward": {}}
        for (way, module), modules in wanted.items():
            found[way][names[module]] = [names[m] for m in modules]
        return found

    one, other = lists(1), lists(2)
    assert one["forward"] == {
        "embed_tokens": ["0.self_attn"], "0.self_attn": ["0.mlp"], "0.mlp": ["1.self_attn"], "1.self_attn": ["1.mlp"],
    }  # fmt: skip
    assert one["backward"] == {"0.mlp": ["0.self_attn"], "1.self_attn": ["0.mlp"], "1.mlp": ["1.self_attn"]}
    assert other["forward"] == one["forward"] | {"1.self_attn": ["1.mlp", "1.mlp.experts"]}
    assert other["backward"] == one["backward"] | {"1.mlp": ["1.mlp.experts", "1.self_attn"]}


def check_gathers():
    """In a forward a sublayer's weights are sent for before the one ahead of it runs, and the gate's with the root's:
    one gather for each group."""
    model, _ = sharded()
    log = []
    for name, module in model.named_modules():
        if name.endswith(("self_attn", "mlp")):
            module.register_forward_pre_hook(lambda *_, name=name: log.append(name))
    gather = FSDPParamGroup.unshard

    def unshard(group, *args):
        if not group.is_unsharded and group._all_gather_result is None:
            log.append([p._param_fqn for p in group.fsdp_params])
        return gather(group, *args)

    FSDPParamGroup.unshard = unshard
    with torch.no_grad():
        model(torch.randint(61, (1, 8)))
    root, *log = log
    assert "norm.weight" in root and "layers.1.mlp.gate.weight" in root
    log = [entry if isinstance(entry, str) else ".".join(entry[0].split(".")[:3]) for entry in log]  # of its first one
    first, dense, second, mixture = "layers.0.self_attn", "layers.0.mlp", "layers.1.self_attn", "layers.1.mlp"
    # each once when sent for, and once when it runs
    assert log == ["embed_tokens.weight", first, dense, first, second, dense, mixture, second, mixture]


def check_fp8():
    """The linears' weights come together in FP8, scaled as one process scales them; what is saved is fp32. gloo has no
    FP8, so it is shown bytes."""
    gather = dist.all_gather_single
    dist.all_gather_single = lambda *tensors, **how: gather(
        *(t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in tensors), **how
    )
    model, _ = sharded("bfloat16", eight_bits=True)
    wanted, seen, idx = whole(), [], torch.randint(61, (2, 8))
    fp8.apply(wanted, "cpu")
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_pre_hook(lambda m, args: seen.append(type(m.weight).__name__))
    recompute.apply(model, "mhc")
    losses = []
    for net in (model, wanted):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(net(idx, idx)[1])
        losses[-1].backward()
    assert seen == ["Float8TrainingTensor"] * 4  # two attentions, the dense FFN, the shared experts
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)
    for (name, p), q in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        assert name == q[0] and p.dtype == torch.float32
        error = (p.grad.full_tensor() - q[1].grad).norm() / q[1].grad.norm().clamp(min=1e-6)
        assert error < 0.02, (name, error)


def check_timeouts():
    """The groups inside a mesh wait as long as rank_timeout says, and not torch's half hour."""
    for shard_size, expert_size, pipeline_size in ((1, 1, 1), (0, 2, 1), (0, 1, 1), (0, 1, 2)):
        cuts = shard_size, 7, expert_size, pipeline_size
        ranks = parallel.Ranks("fsdp", dist.get_rank(), 2, torch.device("cpu"), *cuts)
        meshes = [mesh for mesh in (ranks.mesh, ranks.experts, ranks.pipe) if mesh is not None]
        for group in [group for mesh in meshes for group in mesh.get_all_groups()]:
            assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=7)


CHECKS = [
    check_shards,
    check_dtypes,
    check_looks,
    check_synchronisation,
    check_compiled,
    check_reduction,
    check_prefetch,
    check_gathers,
    pytest.param(check_fp8, marks=pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")),
    check_timeouts,
]


@pytest.mark.parametrize("check", CHECKS)
def test_fsdp(check):
    torch.manual_seed(0)
    run_ranks(2, check)


# -- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout,words",
    [
        (("tensor", 2, 0), "parallel='tensor': wanted one of 'none', 'ddp', 'fsdp'"),
        (("none", 2, 0), "parallel='none' in 2 processes"),
        (("ddp", 4, 2), "only 'fsdp' shards"),
        (("fsdp", 8, 3), "shard_size=3 does not divide the 8 processes; the nearest that does is 2"),
    ],
)
def test_impossible_layouts(layout, words):
    with pytest.raises(ValueError, match=words):
        check_layout(*layout)
    check_layout("fsdp", 8, 4)


@pytest.mark.parametrize(
    "batch,words",
    [
        ((10, 4, 1), "batch_size=8 or 12, or micro_batch_size=5"),
        ((8, 4, 4), "batch_size=16, or micro_batch_size=2, or 2 processes"),
        ((12, 2, 4), "batch_size=8 or 16, or micro_batch_size=1, or 3 processes"),
        ((12, 5, 5), "the nearest that fit: batch_size=25$"),
    ],
)
def test_impossible_batches_name_what_is_possible(batch, words):
    with pytest.raises(ValueError, match=words):
        check_batch(*batch)
    for size, micro, world in ((8, 2, 4), (12, 3, 4), (16, 4, 4), (6, 2, 3)):
        check_batch(size, micro, world)


def test_an_impossible_batch_ends_in_one_line(root):
    codes, output = train(root, "uneven", 2, "--parallel=ddp", "--micro_batch_size=8")
    assert codes == [2, 2] and "nearest that fit: batch_size=16, or micro_batch_size=4, or 1 process" in output
    assert "Traceback" not in output
