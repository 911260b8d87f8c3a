"""convert.py: to and from transformers' DeepseekV3, its tokenizers, DeepSeek-V4's hyper-connections, upcycling."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead

import checkpoint
import convert
import owned
from data import sha256_file
from manifolds import MANIFOLDS
from mhc_ref import mhc_coeffs_ref, mhc_post_res_ref, mhc_pre_ref
from model import GPT, CollapseHead, GPTConfig
from tokenizer import make_tokenizer, save_tokenizer

ROOT = Path(__file__).parent.parent
TINY = dict(
    vocab_size=263, seq_len=32, n_layer=3, n_embd=24, n_head=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=6,
    v_head_dim=10, intermediate_size=40, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
    residual="baseline", init_std=0.3, rope_theta=50.0,
)  # fmt: skip
TEXT = "\n".join(f"{i} times {j} is {i * j}; isn't it?\r\n\t  Größe № {j}" for i in range(40) for j in range(30))


def baseline(**changes):
    """A model in which everything matters: large weights, no norm of 1, experts that only the bias selects."""
    model = GPT(GPTConfig(**TINY | changes))
    model.init_weights(1)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p += 0.3 * torch.randn(p.shape, generator=g)
        for gate in model.gates():
            gate.e_score_correction_bias.copy_(torch.randn(gate.e_score_correction_bias.shape, generator=g))
    return model.eval()


def tokens(batch=2, length=32):
    return torch.randint(TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model, idx):
    return model(idx)[0] if isinstance(model, GPT) else model.eval()(idx).logits


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with nothing of a corpus but its tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    path = folder / "tokenizer.json"
    save_tokenizer(make_tokenizer("bpe262", [TEXT]), path)
    meta = {"vocab_size": 262, "eot": 261, "splits": {}}
    meta |= {"tokenizer_file": path.name, "tokenizer_sha256": sha256_file(path)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


@pytest.fixture
def run(tmp_path, corpus):
    """run(model) -> the folder of a run that ended with it."""

    def save(model, name="run"):
        settings = vars(model.config) | {"data_dir": corpus}
        checkpoint.save(str(tmp_path / name), 5, model, None, {}, settings)
        return str(tmp_path / name)

    return save


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*args) -> what `python convert.py *args` prints; SystemExit if it is refused."""
    settings = {k: v for k, v in vars(convert).items() if k.islower() and isinstance(v, (str, int, float))}

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, args)])
        try:
            convert.main()
        finally:
            vars(convert).update(settings)
        return capsys.readouterr().out

    return call


# -- to Hugging Face --------------------------------------------------------------------------------------------------

MODELS = [
    {},
    {"q_lora_rank": 7, "norm_eps": 1e-3},  # an eps that shows if the norms inside MLA have another one
    {"first_k_dense_replace": 3, "n_routed_experts": 0},
    {"first_k_dense_replace": 0, "n_shared_experts": 0, "route_scale": 0.7},
    {"n_shared_experts": 3, "v_head_dim": 6},
]


@pytest.mark.parametrize("changes", MODELS)
def test_transformers_opens_a_baseline_and_computes_its_logits(run, command, tmp_path, changes):
    model = baseline(**changes)
    command(run(model), tmp_path / "hf", "--to=hf")
    there, info = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    got, want = logits(there, tokens()), logits(model, tokens())
    assert want.std() > 1 and (got - want).abs().max() < 1e-4
    assert there.config.eos_token_id == 261


@pytest.mark.parametrize("changes", MODELS)
def test_there_and_back_is_the_same_model(run, command, tmp_path, changes):
    model = baseline(**changes)
    command(run(model), tmp_path / "hf", "--to=hf")
    command(tmp_path / "hf", tmp_path / "back", "--from=hf")
    back, settings = checkpoint.load_model(str(tmp_path / "back"))
    assert vars(back.config) | {"impl": ""} == vars(model.config) | {"impl": ""}
    for name, w in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], w, rtol=1e-6, atol=0)


def test_large_models_are_written_and_read_in_several_files(run, command, tmp_path, monkeypatch):
    model = baseline()
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 20_000)
    command(run(model), tmp_path / "hf", "--to=hf")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3
    there = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "hf")
    assert (logits(there, tokens()) - logits(model, tokens())).abs().max() < 1e-4
    command(tmp_path / "hf", tmp_path / "back", "--from=hf")
    back, _ = checkpoint.load_model(str(tmp_path / "back"))
    assert (logits(back, tokens()) - logits(model, tokens())).abs().max() < 1e-4


def test_bf16_is_for_matrices_and_not_for_what_selects_experts(run, command, tmp_path):
    command(run(baseline()), tmp_path / "hf", "--to=hf", "--dtype=bfloat16")
    kinds = {name: w.dtype for name, w in load_file(tmp_path / "hf" / "model.safetensors").items()}
    wide = {name for name, kind in kinds.items() if kind == torch.float32}
    assert wide == {
        f"model.layers.{i}.mlp.gate.{what}" for i in (1, 2) for what in ("weight", "e_score_correction_bias")
    }
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


# -- from Hugging Face ------------------------------------------------------------------------------------------------


def their_config(**changes):
    return DeepseekV3Config(**dict(
        vocab_size=263, hidden_size=24, intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=4, kv_lora_rank=16,
        q_lora_rank=7, qk_rope_head_dim=6, v_head_dim=10, qk_nope_head_dim=8, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=32, initializer_range=0.3,
    ) | changes)  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """theirs(**changes) -> a model of transformers' with everything random, saved, and its folder."""

    def make(**changes):
        torch.manual_seed(4)
        model = DeepseekV3ForCausalLM(their_config(**changes))
        with torch.no_grad():
            for name, p in model.state_dict().items():
                p.add_(torch.randn_like(p) * (0.3 if "norm" in name or "bias" in name else 0))
        folder = tmp_path_factory.mktemp("hf")
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_interleave": False, "rms_norm_eps": 1e-2},
        {"q_lora_rank": None, "rope_interleave": False, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
    ],
)
def test_a_model_of_transformers_computes_the_same_here(theirs, command, tmp_path, changes):
    model, folder = theirs(**changes)
    command(folder, tmp_path / "run", "--from=hf", "--seq_len=20")
    here, settings = checkpoint.load_model(str(tmp_path / "run"))
    got, want = logits(here, tokens()), logits(model, tokens())
    assert want.std() > 1 and (got - want).abs().max() < 1e-4
    assert here.config.seq_len == 20 and here.config.residual == "baseline"


@pytest.fixture(scope="module")
def their_folder(theirs):
    return theirs()[1]


def edited(folder, to, **changes):
    """A copy of a folder whose config.json has these changes; a field that becomes ... is left out."""
    to.mkdir()
    for name in ("model.safetensors", "config.json"):
        (to / name).write_bytes((folder / name).read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return to


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"n_group": 2}, "n_group=2: our model has 1 alone"),
        ({"n_group": ...}, "n_group=8: our model has 1 alone"),  # what transformers takes then
        ({"topk_group": 2}, "topk_group=2"),
        ({"topk_method": "group_limited_greedy"}, "topk_method='group_limited_greedy'"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "yarn", "factor": 40}}, "RoPE scaling of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "RoPE scaling of type 'linear'"),
        ({"index_topk": 64}, "index_topk=64: not known here"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "model_type='llama'"),
        ({"hidden_size": "24"}, "hidden_size: wanted a whole number"),
        ({"hidden_size": ...}, "no 'hidden_size'"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5"),
        ({"kv_lora_rank": 15}, r"kv_a_proj_with_mqa.weight: has the shape"),
        ({"num_hidden_layers": 4}, r"model.layers.3.input_layernorm.weight: wanted, and there is none"),
    ],
)
def test_what_we_cannot_express_is_refused_by_its_name(their_folder, command, tmp_path, capsys, changes, words):
    folder = edited(their_folder, tmp_path / "hf", **changes)
    with pytest.raises(SystemExit) as stop:
        command(folder, tmp_path / "run", "--from=hf")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and words in message and message.count("\n") == 1, message
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_tensors_without_a_place_are_refused_and_multi_token_prediction_is_left_out(theirs, command, tmp_path, capsys):
    model, folder = theirs()
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.layers.3.eh_proj.weight": torch.ones(2)}, folder / "model.safetensors")
    assert "left out: 1 tensors" in command(folder, tmp_path / "run", "--from=hf")
    save_file(weights | {"model.layers.1.mlp.experts.4.up_proj.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(SystemExit):
        command(folder, tmp_path / "other", "--from=hf")
    assert "model.layers.1.mlp.experts.4.up_proj.weight: our model has no place" in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(SystemExit):
        command(folder, tmp_path / "other", "--from=hf")
    assert "model.safetensors: cannot be read" in capsys.readouterr().err and not (tmp_path / "other").exists()


# -- tokenizers -------------------------------------------------------------------------------------------------------

CL100K = (  # tiktoken's, with possessive counts such as {1,3}+, which mean another thing in Oniguruma
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"""
    r"""|\s+(?!\S)|\s"""
)


def strange_texts():
    kinds = [(32, 127), (9, 14), (0x80, 0x800), (0x1000, 0xD7FF), (0xE000, 0x10FFFF), (48, 58), (32, 33), (39, 40)]
    rng = random.Random(5)
    yield from ("", "  \n\n foo  \n", "a\r\n\r\n  b   ", "12345678 ९९९९ x'LL don't 'S", "aaaaaaaabababab\u0085\u2028 .")
    for _ in range(400):
        yield "".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(50))


@pytest.mark.parametrize("name,pattern", [("bytes", None), ("bpe700", None), ("bpe700", CL100K)])
def test_tokenizers_give_the_same_tokens_there(tmp_path, name, pattern):
    enc = make_tokenizer(name, [TEXT + (ROOT / "model.py").read_text()])
    if pattern:
        enc = tiktoken.Encoding(
            "like_cl100k", pat_str=pattern, mergeable_ranks=enc._mergeable_ranks, special_tokens=enc._special_tokens
        )
    spec, _ = convert.tokenizer_to_hf(enc, 32)
    there = Tokenizer.from_str(json.dumps(spec))
    for text in (*strange_texts(), (ROOT / "train.py").read_text()):
        assert there.encode(text, add_special_tokens=False).ids == enc.encode(text, disallowed_special=()), repr(text)
        assert there.decode(enc.encode(text, disallowed_special=())) == text


def test_the_folder_opens_with_its_tokenizer(run, command, tmp_path, corpus):
    out = command(run(baseline()), tmp_path / "hf", "--to=hf")
    there = AutoTokenizer.from_pretrained(tmp_path / "hf")
    enc = make_tokenizer("bpe262", [TEXT])
    assert there(TEXT).input_ids == enc.encode(TEXT) and there.eos_token_id == enc.eot_token == 261
    assert there.decode(there("times<|endoftext|>").input_ids) == "times<|endoftext|>"
    assert "no tokenizer" not in out


def test_what_tokenizer_json_cannot_express_is_said_in_one_line(run, command, tmp_path):
    odd = tiktoken.Encoding(
        "odd", pat_str=r"(ab|c){2,}+|[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    with pytest.raises(convert.CannotConvert, match="its pattern"):
        convert.tokenizer_to_hf(odd, 32)
    no_bytes = tiktoken.Encoding("few", pat_str=r"[\s\S]", mergeable_ranks={b"a": 0}, special_tokens={})
    with pytest.raises(convert.CannotConvert, match="no token for some byte"):
        convert.tokenizer_to_hf(no_bytes, 32)
    out = command(run(baseline()), tmp_path / "hf", "--to=hf", f"--data_dir={tmp_path}/nowhere")
    assert re.search("^no tokenizer files: .*nowhere", out, re.M)
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [owned.MARK, "config.json", "model.safetensors"]


# -- DeepSeek-V4's hyper-connections ----------------------------------------------------------------------------------


def v4_config():
    config = DeepseekV4Config(hidden_size=5, hc_eps=0.0, rms_norm_eps=1e-20, num_hidden_layers=1)
    return config


def randomise(module):
    g = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return module


def test_deepseek_v4s_maps_are_ours(n=4, C=5):
    """Against transformers' module at eps = 0, with a comb that is far from symmetric."""
    there = randomise(DeepseekV4HyperConnection(v4_config()))
    phi, alpha, b = convert.from_v4(there.fn.data, there.base.data, there.scale.data)
    g = torch.Generator().manual_seed(7)
    x, y = torch.randn(2, 3, n, C, generator=g), torch.randn(2, 3, C, generator=g)
    with torch.no_grad():
        post, comb, collapsed = there(x)
    H_pre, H_post, H_res = mhc_coeffs_ref(x, phi, alpha, b)
    assert (comb - comb.mT).abs().max() > 0.3
    torch.testing.assert_close(H_res, comb.mT, atol=2e-6, rtol=0)
    torch.testing.assert_close(H_post, post)
    torch.testing.assert_close(mhc_pre_ref(x, H_pre), collapsed)
    theirs = post.unsqueeze(-1) * y.unsqueeze(-2) + comb.mT @ x  # as its decoder layer applies them
    torch.testing.assert_close(mhc_post_res_ref(x, y, H_post, H_res), theirs, atol=1e-5, rtol=1e-5)
    for back, w in zip(convert.to_v4(phi, alpha, b), (there.fn, there.base, there.scale), strict=True):
        assert torch.equal(back, w)


def test_deepseek_v4s_head_is_our_collapse(n=4, C=5):
    there = randomise(DeepseekV4HyperHead(v4_config()))
    head = CollapseHead(GPTConfig(**TINY | dict(residual="mhc", n_embd=C, n_streams=n)))
    head.phi.data, head.alpha.data, head.b.data = convert.head_from_v4(there.hc_fn, there.hc_base, there.hc_scale)
    x = torch.randn(2, 3, n, C, generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(head(x), there(x))
    for back, w in zip(convert.head_to_v4(head.phi, head.alpha, head.b), there.parameters(), strict=True):
        assert torch.equal(back, w)


# -- upcycling --------------------------------------------------------------------------------------------------------

GROWN = [
    {"residual": "mhc"},
    {"residual": "mhc", "collapse": "head", "n_streams": 2},
    {"residual": "mhc", "n_streams": 3, "manifold": "budget"},
    {"residual": "hc"},
    {"residual": "mhc", "single_pass": True},
    {"residual": "mhc", "single_pass": True, "manifold": "orthostochastic", "n_streams": 2},
    *({"residual": "mhc", "manifold": name} for name in MANIFOLDS if name not in ("sinkhorn", "budget")),
]


def grow(changes):
    model = baseline()
    config = replace(model.config, maps_init="paper", **{"n_streams": 4} | changes)
    return model, convert.upcycled(model.state_dict(), config, seed=9)


@pytest.mark.parametrize("changes", GROWN)
def test_a_grown_model_computes_what_its_baseline_does(changes):
    model, grown = grow(changes)
    assert (logits(grown, tokens()) - logits(model, tokens())).abs().max() < 1e-4
    for H_pre, H_post, _ in grown.residual_maps(tokens()):  # the norms would hide another sum
        torch.testing.assert_close(H_pre.sum(-1), torch.ones(2, 32))
        torch.testing.assert_close(H_post, torch.ones_like(H_post))


@pytest.mark.parametrize("changes", GROWN[:5])
def test_after_one_step_its_streams_differ_and_after_20_every_live_map_has_moved(changes):
    _, grown = grow(changes)
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-4, eps=1e-20, weight_decay=0)
    start = {name: p.detach().clone() for name, p in grown.named_parameters()}
    spreads, losses = [], []
    for _ in range(20):
        optimizer.zero_grad()
        grown(tokens(), tokens().roll(-1, 1))[1].backward()
        optimizer.step()
        spreads.append(grown.look(tokens(), lambda residual, x: (x - x.mean(-2, keepdim=True)).abs().max().item())[1:])
        losses.append(grown(tokens(), tokens().roll(-1, 1))[1].item())
    assert min(spreads[0]) > 1e-5 and min(spreads[-1]) > 5 * min(spreads[0]), spreads  # the streams part, and go on
    assert losses[-1] < losses[0]
    for s, boundary in enumerate(grown.residuals()):
        path = f"layers.{s // 2}.{'mlp' if s % 2 else 'attn'}_residual."
        moved = (boundary.b - start[path + "b"]).abs().split(boundary.sizes)
        for live, by in zip(boundary.live, moved, strict=True):
            assert by.max() > 1e-4 if live and by.numel() else (by == 0).all(), (s, moved)


def test_readmes_commands(run, command, corpus, tmp_path, monkeypatch):
    """In order, as they stand there, on a small baseline; and train.py goes on with what came of it."""
    (tmp_path / "text.txt").write_text(TEXT)
    flags = [f"--dataset={tmp_path}", "--tokenizer=bpe262", f"--data_dir={tmp_path}/data", "--val_fraction=0.5"]
    subprocess.run([sys.executable, "prepare_data.py", *flags], cwd=ROOT, check=True, capture_output=True)
    (tmp_path / "out" / "demo").mkdir(parents=True)
    os.rename(run(baseline()), tmp_path / "out" / "demo" / "baseline")
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "README.md").read_text().split("## Weights that come and go")[1].split("\n## ")[0]
    lines = [line.split("#")[0].split() for line in section.splitlines() if line.startswith(".venv/bin/python")]
    assert [line[1] for line in lines] == ["convert.py"] * 3 + ["train.py"]
    to_hf, from_hf, grow = (command(*line[2:]) for line in lines[:3])
    assert "DeepseekV3ForCausalLM" in to_hf and "no tokenizer" not in to_hf and "out/back/settings.py" in from_hf
    assert float(re.search("differ by at most (.*)", grow)[1]) < 1e-4
    for path in ("hf/config.json", "back/step-00000000/manifest.json", "grown/step-00000000/manifest.json"):
        assert (tmp_path / "out" / path).exists()
    more = [
        f"--data_dir={tmp_path}/data",
        "--batch_size=2",
        "--micro_batch_size=2",
        "--eval_sequences=2",
        "--max_steps=2",
    ]
    call = [sys.executable, ROOT / "train.py", *lines[3][2:], *more]
    done = subprocess.run(call, capture_output=True, text=True)
    assert "going on from out/grown/step-00000000" in done.stdout and "step 2/2" in done.stdout, done


def test_only_a_baseline_can_grow(run, command, tmp_path, capsys):
    grown = convert.upcycled(baseline().state_dict(), replace(baseline().config, residual="mhc", n_streams=4), 1)
    for flags, words in (
        (["--residual=mhc"], "residual='mhc': only a baseline can get more streams"),
        (["--to=hf"], "residual='mhc': DeepseekV3ForCausalLM has the plain residual connection alone"),
        (["--residual=mhc", "--n_streams=1"], "n_streams=1: wanted a number of at least 2"),
        (["--residual=baseline"], "residual='mhc': only a baseline can get more streams"),
        (["--residual=gpt"], "residual='gpt': wanted one of '', 'baseline', 'hc', 'mhc'"),
        (["--to=hf", "--residual=mhc"], "wanted --to=hf, or --from=hf"),
        ([], "wanted --to=hf, or --from=hf"),
        (["--residual=mhc", "--manifold=sinkhron"], "manifold='sinkhron': wanted one of 'sinkhorn'"),
    ):
        with pytest.raises(SystemExit):
            command(run(grown), tmp_path / "out", *flags)
        assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_is_refused_before_anything_is_written(run, command, tmp_path, capsys):
    source = run(baseline())
    for flags, words in (
        (["--residual=hc", "--single_pass=True"], "single_pass=True: wanted residual='mhc'"),
        (["--residual=mhc", "--manifold=permutations", "--n_streams=8"], "n_streams=8: wanted at most 4"),
    ):
        with pytest.raises(SystemExit):
            command(source, tmp_path / "out", *flags)
        assert words in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == ["run"]


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_there_is_replaced_only_if_told_and_only_if_ours(run, command, tmp_path, capsys):
    source, target = run(baseline()), tmp_path / "hf"

    def refused(words, *flags):
        before = sorted(str(p) for p in tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            command(source, target, "--to=hf", *flags)
        assert stop.value.code == 2 and words in capsys.readouterr().err
        assert sorted(str(p) for p in tmp_path.rglob("*")) == before

    target.mkdir()
    refused("is there; choose another name")
    (target / "config.json").write_text("{}")
    refused("not known to be a huggingface of ours", "--overwrite=True")
    (target / "config.json").unlink()
    target.rmdir()
    command(source, target, "--to=hf")
    refused("is there; choose another name")
    (target / "README.md").write_text("a stranger's")
    refused("holds README.md, which is not ours", "--overwrite=True")
    (target / "README.md").unlink()
    (target / "tokenizer.json").unlink()
    command(source, target, "--to=hf", "--overwrite=True")
    assert (target / "tokenizer.json").exists() and sorted(os.listdir(tmp_path)) == ["hf", "run"]
    (tmp_path / "link").symlink_to(target)
    target = tmp_path / "link"
    refused("is a link", "--overwrite=True")


@pytest.mark.parametrize("at", ["write_safetensors", "fsync", "rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interruption_leaves_nothing_and_what_was_there(run, command, tmp_path, monkeypatch, at, error):
    source, target = run(baseline()), tmp_path / "hf"
    command(source, target, "--to=hf")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fails(*args, **more):
        raise error

    def second(a, b, rename=os.rename, calls=[]):  # noqa: B006
        calls.append(a)
        if len(calls) == 2:  # the old folder has been moved away, the new one has not its name yet
            raise error
        rename(a, b)

    home = checkpoint if at == "write_safetensors" else os
    with monkeypatch.context() as m, pytest.raises(type(error)):
        m.setattr(home, at, second if at == "rename" else fails)
        command(source, target, "--to=hf", "--overwrite=True")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_a_stranger_put_there_meanwhile_stays(run, command, tmp_path):
    source, target = run(baseline()), tmp_path / "hf"
    command(source, target, "--to=hf")
    before = (target / "config.json").read_text()
    with pytest.raises(owned.NotOurs, match="holds notes.txt"):
        with convert.whole_folder(str(target), "huggingface", True):
            (target / "notes.txt").write_text("mine")
    assert sorted(os.listdir(tmp_path)) == ["hf", "run"] and (target / "notes.txt").read_text() == "mine"
    assert (target / "config.json").read_text() == before


def test_a_killed_conversion_is_cleared_away_by_the_next(run, command, tmp_path):
    source = run(baseline())
    command(source, tmp_path / "hf", "--to=hf")
    for left in ("new", "old"):
        owned.make(str(tmp_path / f"{owned.MARK}.{left}.other"), "huggingface")
    (tmp_path / f"{owned.MARK}.old.other" / "config.json").write_text("the one before")
    with pytest.raises(SystemExit):  # killed between the two renames: what was there comes back
        command(source, tmp_path / "other", "--to=hf")
    assert (tmp_path / "other" / "config.json").read_text() == "the one before"
    command(source, tmp_path / "other", "--to=hf", "--overwrite=True")
    assert sorted(os.listdir(tmp_path)) == ["hf", "other", "run"]
    assert (tmp_path / "other" / "config.json").read_text() == (tmp_path / "hf" / "config.json").read_text()
