"""Weights that come and go: Hugging Face's DeepseekV3ForCausalLM, DeepSeek-V4's hyper-connections, more streams.

    python convert.py out/run folder --to=hf                       # a baseline as a folder that from_pretrained opens
    python convert.py folder out/run --from=hf                     # the other way
    python convert.py out/baseline out/mhc --residual=mhc          # upcycling: more streams, the same function
    python convert.py out/baseline out/again --residual=baseline   # its weights alone, in a run of 0 steps
    python convert.py folder out/mhc --from=hf --residual=mhc --n_streams=4

out/run is a run folder (its newest whole checkpoint) or one step folder. What comes in becomes a run of 0 steps, with a
settings.py beside it: `python train.py out/mhc/settings.py` trains it further. Weights are fp32 there.

What the other side cannot say is refused by its name, before anything is written; what goes wrong or is interrupted
leaves nothing behind (a kill leaves .made_by_mhc.new.<name>, which the next conversion to that name clears away). A
folder that is there is replaced with --overwrite=True only, and only if it is one of ours.

Upcycling (`keep_function`): all n streams hold the baseline's x. H_pre sums to 1, H_post is 1 and H_res' rows sum to 1,
so every sublayer reads x, and every stream gets the same y. Sublayers read their home stream most, so the gradients of
H_post differ from stream to stream, and after one step the streams do. H_pre and H_res have no effect before that (phi
of pre and post is 0 for that one step), and AdamW moves them by rounding noise once: by the learning rate, no more.

DeepSeek-V4 and V4.1 call the mappings fn (n^2+2n, nC), base and scale, in the order pre | post | comb, and apply comb
transposed: `from_v4` and `to_v4`. Their eps of 1e-6, on H_pre and inside Sinkhorn, is not ours.
"""

import program

if __name__ == "__main__":
    program.begin()  # before torch, and before anything that takes long to import

import contextlib
import math
import os
import re
import sys
from dataclasses import fields, replace

import torch
from safetensors import SafetensorError, safe_open

import checkpoint
import owned
from configurator import at_least, configure, fail, one_of
from data import DataError
from manifolds import MANIFOLDS
from model import GPT, RESIDUALS, GPTConfig
from records import RecordError, anything, boolean, check, each, file_name, integer, null_or, number, read_json, string
from tokenizer import ENDOFTEXT, load_tokenizer

to = ""  # 'hf': write a Hugging Face folder
from_ = ""  # 'hf', given as --from=hf: read a Hugging Face folder
residual = ""  # of the model that is written: 'hc' | 'mhc', from a baseline; 'baseline', "": as it is
n_streams = 4  # with residual: n
manifold = "sinkhorn"  # with residual='mhc': see manifolds.py
sinkhorn_iters = 20  # with residual='mhc'
single_pass = False  # with residual='mhc'
alpha_init = 0.01  # with residual
collapse = "sum"  # with residual: 'sum' | 'head'
seed = 1337  # with residual: of what is drawn
seq_len = 0  # with --from=hf: of the model that is written; 0: max_position_embeddings
data_dir = ""  # a corpus made with the model's tokenizer; "": the one that the run was trained on
dtype = "float32"  # with --to=hf: of the matrices; or 'bfloat16'
overwrite = False  # replace the folder that is there, if it is one of ours

RULES = {
    "to": one_of("", "hf"),
    "from_": one_of("", "hf"),
    "residual": one_of("", *RESIDUALS),
    "manifold": one_of(*MANIFOLDS),
    "collapse": one_of("sum", "head"),
    "dtype": one_of("float32", "bfloat16"),
    "n_streams": at_least(2),
    "sinkhorn_iters": at_least(1),
    "alpha_init": at_least(0),
    "seed": at_least(0),
    "seq_len": at_least(0),
}


class CannotConvert(ValueError):
    """Something that one side cannot express; the message is one line that names it."""


# ----------------------------------------------------------------------------------------------------------------------
# The configuration of transformers' DeepseekV3

SAME = {  # ours: theirs
    "vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_embd": "hidden_size",
    "n_head": "num_attention_heads", "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim", "intermediate_size": "intermediate_size",
    "first_k_dense_replace": "first_k_dense_replace", "n_routed_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok", "n_shared_experts": "n_shared_experts",
    "moe_intermediate_size": "moe_intermediate_size", "route_scale": "routed_scaling_factor",
    "norm_eps": "rms_norm_eps", "init_std": "initializer_range", "seq_len": "max_position_embeddings",
}  # fmt: skip
LEFT_OUT = {  # what transformers takes where config.json says nothing
    "n_group": 8, "topk_group": 4, "num_key_value_heads": 128, "q_lora_rank": 1536, "rope_interleave": True,
    "norm_topk_prob": True, "initializer_range": 0.02, "rope_theta": 10000.0,
}  # fmt: skip
MUST_BE = {  # in config.json, if it is there: the one value that we can express
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "hidden_act": "silu", "attention_bias": False,
    "attention_dropout": 0, "tie_word_embeddings": False, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "moe_layer_freq": 1, "quantization_config": None,
}  # fmt: skip
NO_MATTER = {  # without effect on the logits, or said by others
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map",
    "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "head_dim", "qk_head_dim", "pretraining_tp",
    "num_nextn_predict_layers", "num_mtp_layers", "output_router_logits", "router_aux_loss_coef", "aux_loss_alpha",
    "seq_aux", "ep_size", "rope_theta", "rope_scaling", "rope_parameters", "rope_interleave", "q_lora_rank",
    "num_key_value_heads", "_attn_implementation", "unsloth_version",
}  # fmt: skip
LATENT_EPS = 1e-6  # of the two norms inside MLA: transformers takes this one whatever rms_norm_eps says
CONFIG = {
    **{theirs: integer(0) if isinstance(getattr(GPTConfig, ours), int) else number(0) for ours, theirs in SAME.items()},
    "q_lora_rank": null_or(integer(1)),
    "num_key_value_heads": null_or(integer(1)),
    "rope_interleave": null_or(boolean),
    "rope_theta": number(0),
    "rope_scaling?": null_or({}),
    "rope_parameters?": null_or({"rope_theta?": number(0), "rope_type?": string(), "type?": string()}),
    "architectures?": null_or([string()]),
    "model_type?": string(),
}


def config_to_hf(c, eot=None):
    """GPTConfig -> config.json as a dict. eot: the id of <|endoftext|>. Raises CannotConvert."""
    if c.residual != "baseline":
        raise CannotConvert(f"residual={c.residual!r}: DeepseekV3ForCausalLM has the plain residual connection alone")
    if c.has_moe and c.n_routed_experts < 2:
        raise CannotConvert("n_routed_experts=1: DeepseekV3ForCausalLM wants at least 2 experts in a group")
    if c.norm_eps <= 0:
        raise CannotConvert("norm_eps=0: the norms inside MLA have an eps of 1e-6 there, which no weights can undo")
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{theirs: getattr(c, ours) for ours, theirs in SAME.items()},
        **{k: v for k, v in MUST_BE.items() if k != "quantization_config"},
        "num_key_value_heads": c.n_head,
        "q_lora_rank": c.q_lora_rank or None,
        "rope_interleave": True,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "num_nextn_predict_layers": 0,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": "float32",
    }


def config_from_hf(config, where="config.json"):
    """config.json as a dict -> GPTConfig of a baseline, and whether RoPE turns neighbours, as ours does.

    Raises CannotConvert, naming the field, for what we cannot express; RecordError for what is not a config at all.
    """
    if config.get("model_type") != "deepseek_v3" and "DeepseekV3ForCausalLM" not in (config.get("architectures") or ()):
        raise CannotConvert(f"{where}: model_type={config.get('model_type')!r}: wanted 'deepseek_v3'")
    for name, wanted in MUST_BE.items():
        if (got := (LEFT_OUT | config).get(name, wanted)) != wanted:
            raise CannotConvert(f"{where}: {name}={got!r}: our model has {wanted!r} alone")
    unknown = sorted(config.keys() - set(SAME.values()) - MUST_BE.keys() - NO_MATTER)
    if unknown:
        raise CannotConvert(f"{where}: {unknown[0]}={config[unknown[0]]!r}: not known here, and may change the model")
    config = check(LEFT_OUT | config, CONFIG, where)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise CannotConvert(f"{where}: RoPE scaling of type {kind!r}: our model has none")
    if config["num_key_value_heads"] not in (None, config["num_attention_heads"]):
        raise CannotConvert(f"{where}: num_key_value_heads={config['num_key_value_heads']}: MLA has one for each head")
    settings = {ours: config[theirs] for ours, theirs in SAME.items()}
    settings |= {"q_lora_rank": config["q_lora_rank"] or 0, "rope_theta": rope.get("rope_theta", config["rope_theta"])}
    try:
        return GPTConfig(residual="baseline", **settings), bool(config["rope_interleave"])
    except ValueError as e:
        raise CannotConvert(f"{where}: {e}") from None


# ----------------------------------------------------------------------------------------------------------------------
# The weights of transformers' DeepseekV3: names, experts one by one, the eps of MLA's norms, the layout of RoPE


def latent_scale(c):
    """What the rows that a norm inside MLA reads are multiplied with on the way out.

    Our norms have eps = norm_eps, those two there 1e-6. RMSNorm(s v) with eps s^2 equals RMSNorm(v) with eps 1, so
    s^2 = 1e-6 / norm_eps makes both the same function.
    """
    return math.sqrt(LATENT_EPS / c.norm_eps)


def scaled(name, w, c, scale):
    """A weight matrix with the rows that go into a norm inside MLA multiplied by scale."""
    if name.endswith("q_a_proj.weight"):
        return w * scale
    if name.endswith("kv_a_proj_with_mqa.weight"):
        return torch.cat((w[: c.kv_lora_rank] * scale, w[c.kv_lora_rank :]))  # the key of RoPE has no norm
    return w


def neighbours(name, w, c):
    """RoPE's rows from halves, which turn (i, i + R/2), to ours, which turn (2i, 2i + 1)."""
    R, D = c.qk_rope_head_dim, c.qk_nope_head_dim
    order = torch.arange(R).view(2, R // 2).T.flatten()
    if name.endswith("kv_a_proj_with_mqa.weight"):
        return torch.cat((w[: c.kv_lora_rank], w[c.kv_lora_rank :][order]))
    if name.endswith(("q_proj.weight", "q_b_proj.weight")):
        heads = w.unflatten(0, (c.n_head, D + R))
        return torch.cat((heads[:, :D], heads[:, D:][:, order]), 1).flatten(0, 1)
    return w


def their_names(name, c):
    """The names there of a parameter of ours: one, or for stacked experts one of each."""
    if m := re.fullmatch(r"(.*\.experts)\.(\w+)", name):
        return [f"model.{m[1]}.{e}.{m[2]}.weight" for e in range(c.n_routed_experts)]
    return [name if name == "lm_head.weight" else "model." + name]


def weights_to_hf(weights, c):
    """{our name: tensor} of a baseline -> {their name: tensor}, tensors that share no memory."""
    theirs = {}
    for name, w in weights.items():
        w, names = scaled(name, w, c, latent_scale(c)), their_names(name, c)
        parts = w.unbind() if ".experts." in name else [w]
        theirs |= {their: part.clone() for their, part in zip(names, parts, strict=True)}
    for i in range(c.first_k_dense_replace, c.n_layer if c.n_shared_experts == 0 else 0):  # there they are of width 0
        shared = f"model.layers.{i}.mlp.shared_experts"
        theirs |= {f"{shared}.{part}.weight": torch.empty(0, c.n_embd) for part in ("gate_proj", "up_proj")}
        theirs[f"{shared}.down_proj.weight"] = torch.empty(c.n_embd, 0)
    return theirs


def weights_from_hf(get, names, c, interleaved):
    """The state dict of ours from theirs, in fp32. get(name) -> tensor; names: all there are; interleaved: their RoPE
    turns neighbours. Raises CannotConvert for a tensor that is missing, of another shape, or has no place here."""
    with torch.device("meta"):
        wanted = {name: p.shape for name, p in GPT(c).state_dict().items()}
    weights, used = {}, set()
    for name, shape in wanted.items():
        theirs = their_names(name, c)
        if missing := [n for n in theirs if n not in names]:
            raise CannotConvert(f"{missing[0]}: wanted, and there is none of this name")
        used.update(theirs)
        parts = [get(n).float() for n in theirs]
        w = torch.stack(parts) if ".experts." in name else parts[0]
        if w.shape != shape:
            raise CannotConvert(f"{theirs[0]}: has the shape {tuple(w.shape)}, config.json says {tuple(shape)}")
        w = w if interleaved else neighbours(name, w, c)
        weights[name] = scaled(name, w, c, 1 / latent_scale(c)).contiguous()
    empty = ".shared_experts." if c.n_shared_experts == 0 else "rotary_emb.inv_freq"
    left = sorted(n for n in names if n not in used and empty not in n)
    extra = [n for n in left if (m := re.match(r"model\.layers\.(\d+)\.", n)) and int(m[1]) >= c.n_layer]
    if extra:
        print(f"left out: {len(extra)} tensors of multi-token prediction, which changes no logits: {extra[0]} ...")
    if others := [n for n in left if n not in extra]:
        raise CannotConvert(f"{others[0]}: our model has no place for it ({len(others)} such tensors)")
    return weights


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer, as Hugging Face's tokenizer.json


def printable_bytes():
    """GPT-2's alphabet, in which tokenizer.json spells tokens: printable bytes stand for themselves, others for
    characters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + k) for k, b in enumerate(others)}


def tokenizer_to_hf(enc, model_max_length):
    """A tiktoken.Encoding -> tokenizer.json and tokenizer_config.json as dicts. Raises CannotConvert.

    tiktoken merges the neighbours whose joint bytes have the lowest rank; tokenizer.json lists pairs in order, so it
    gets all pairs of tokens that make up a token, in the order of its rank. Special tokens spelt in a text are special
    there, as is usual; in our corpora they are ordinary text.
    """
    ranks, letters = enc._mergeable_ranks, printable_bytes()
    if any(bytes([b]) not in ranks for b in range(256)):
        raise CannotConvert(f"tokenizer {enc.name!r} has no token for some byte, which tokenizer.json cannot express")
    if re.search(r"\)\{\d*,?\d*\}\+", enc._pat_str):
        raise CannotConvert(f"tokenizer {enc.name!r}: tokenizer.json cannot express its pattern: {enc._pat_str}")
    # possessive {1,3}+ is (...{1,3})+ to the regular expressions there; an atomic group is the same to both
    pattern = re.sub(r"(\\p\{\w+\}|\[(?:\\.|[^\]])*\]|\\.|.)(\{\d*,?\d*\})\+", r"(?>\1\2)", enc._pat_str)
    spell = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        pairs = [(token[:k], token[k:]) for k in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [[spell[a], spell[b]] for a, b in sorted(pairs, key=lambda p: (ranks[p[0]], ranks[p[1]]))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    specials = sorted(enc._special_tokens.items(), key=lambda item: item[1])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in specials],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spell[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": ENDOFTEXT,
        "eos_token": ENDOFTEXT,
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    return tokenizer, config


# ----------------------------------------------------------------------------------------------------------------------
# The hyper-connections of DeepSeek-V4 and V4.1


def v4_order(n):
    """Where each of our n^2+2n columns stands there: H_res = comb^T, so logit (i, j) of one is (j, i) of the other."""
    return torch.cat((torch.arange(2 * n), 2 * n + torch.arange(n * n).view(n, n).T.flatten()))


def from_v4(fn, base, scale):
    """fn (n^2+2n, nC), base (n^2+2n,), scale (3,) -> our phi (nC, n^2+2n), alpha (3,), b (n^2+2n,)."""
    order = v4_order(math.isqrt(len(base) + 1) - 1)
    return fn[order].T.contiguous(), scale.clone(), base[order]


def to_v4(phi, alpha, b):
    """Our phi (nC, n^2+2n), alpha (3,), b (n^2+2n,) -> fn (n^2+2n, nC), base (n^2+2n,), scale (3,)."""
    order = v4_order(math.isqrt(len(b) + 1) - 1)
    return phi.T[order].contiguous(), b[order], alpha.clone()


def head_from_v4(hc_fn, hc_base, hc_scale):
    """hc_fn (n, nC), hc_base (n,), hc_scale (1,) of the last collapse -> our collapse_head's phi (nC, n), alpha, b."""
    return hc_fn.T.contiguous(), hc_scale.clone(), hc_base.clone()


def head_to_v4(phi, alpha, b):
    """Our collapse_head's phi (nC, n), alpha (1,), b (n,) -> hc_fn (n, nC), hc_base (n,), hc_scale (1,)."""
    return phi.T.contiguous(), b.clone(), alpha.clone()


# ----------------------------------------------------------------------------------------------------------------------
# Upcycling


@torch.no_grad()
def keep_function(model):
    """Give the maps of a model of n streams the values with which it computes what its baseline does.

    HC's own first values do so already. mHC: H_post = 1, and H_pre .05 (A.6's -3) or less in all streams but the home
    stream, which has the rest of 1. phi of H_res stays as it is drawn: while streams are equal it has no effect.
    """
    n = model.config.n_streams
    away = min(1 / (1 + math.exp(3)), 0.5 / n)
    for s, boundary in enumerate(model.residuals()):
        if model.config.residual == "mhc":
            H_pre = torch.full((n,), away)
            H_pre[(s + model.config.single_pass) % n] = 1 - (n - 1) * away  # the home of the sublayer that it reads for
            boundary.phi[:, : 2 * n] = 0
            boundary.b[:n], boundary.b[n : 2 * n] = H_pre.logit(), 0
        elif model.config.residual != "hc":
            raise CannotConvert(
                f"residual={model.config.residual!r}: how it computes what its baseline does is not known"
            )
    if model.collapse_head:
        model.collapse_head.phi.zero_()
        model.collapse_head.b.fill_(-math.log(n - 1))  # a sigmoid of 1/n


def upcycled(weights, config, seed):
    """A baseline's {name: tensor} and the GPTConfig of a model of more streams -> that model, the same function."""
    model = GPT(config)
    model.init_weights(seed)
    keep_function(model)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    own = ("_residual.", "collapse_head.")
    if unexpected or not all(any(part in name for part in own) for name in missing):
        raise CannotConvert(f"{[*unexpected, *missing][0]}: the baseline and residual={config.residual!r} differ by it")
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Folders


@contextlib.contextmanager
def whole_folder(path, what, replace_it):
    """A new folder of ours to write in, which gets the name `path` once it is complete; else nothing is left of it.

    What is there is replaced if replace_it, and if all of it is a `what` of ours. Raises NotOurs.
    """
    path = os.path.normpath(path)
    owned.check_place(path)
    new, old = (
        os.path.join(os.path.dirname(path), f"{owned.MARK}.{kind}.{os.path.basename(path)}") for kind in ("new", "old")
    )
    if owned.is_folder(old) and not os.path.lexists(path):  # killed between the two renames below
        os.rename(old, path)
    if os.path.lexists(path) and not replace_it:
        raise owned.NotOurs(f"{path}: is there; choose another name, or --overwrite=True if it is a {what} of ours")
    for folder in (path, new, old):  # the last two from a conversion that was killed
        owned.check_removable(folder, what)
    try:
        for left in (new, old):
            if owned.is_folder(left):
                owned.remove(left, what)
        owned.make(new, what)
        yield new
        owned.sync_folder(new)
        owned.check_removable(path, what)  # it took a while
        if os.path.lexists(path):
            os.rename(path, old)
        os.rename(new, path)
        owned.sync_folder(os.path.dirname(path) or ".")
    finally:
        if owned.is_folder(old) and not os.path.lexists(path):
            os.rename(old, path)
        for left in (new, old):
            if owned.is_folder(left):
                owned.remove(left, what)


def save_weights(folder, tensors):
    """model.safetensors, or if that would be large several, and the index that says what is in which."""
    files = checkpoint.file_of_each(tensors)
    of = max(files.values())
    name = {k: f"model-{k:05d}-of-{of:05d}.safetensors" if of > 1 else "model.safetensors" for k in range(1, of + 1)}
    for k in name:
        with owned.whole_file(os.path.join(folder, name[k]), binary=True) as f:
            checkpoint.write_safetensors(f, {n: t for n, t in tensors.items() if files[n] == k}, {"format": "pt"})
    if of > 1:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": {n: name[k] for n, k in files.items()}}
        owned.write_json(os.path.join(folder, "model.safetensors.index.json"), index)


def open_weights(folder):
    """-> get(name) -> tensor, and the names of all tensors, of a Hugging Face folder. Raises CannotConvert."""
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        files = sorted(set(read_json(index, {"weight_map": each(file_name)})["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    where = {}
    for name in files:
        path = os.path.join(folder, name)
        try:
            opened = safe_open(path, "pt")
        except (OSError, SafetensorError) as e:
            raise CannotConvert(f"{path}: cannot be read ({e}); weights are wanted as safetensors") from None
        where |= dict.fromkeys(opened.keys(), opened)
    return lambda name: where[name].get_tensor(name), where.keys()


# ----------------------------------------------------------------------------------------------------------------------
# The command


def write_hf(source, target):
    """A run's newest checkpoint -> a Hugging Face folder."""
    model, trained = checkpoint.load_model(source)
    c, enc = model.config, None
    config = config_to_hf(c)
    try:
        enc = load_tokenizer(data_dir or trained["data_dir"])
        tokenizer = dict(zip(("tokenizer.json", "tokenizer_config.json"), tokenizer_to_hf(enc, c.seq_len), strict=True))
        config |= {"bos_token_id": enc.eot_token, "eos_token_id": enc.eot_token}
    except (DataError, CannotConvert) as e:
        tokenizer = {}
        print(f"no tokenizer files: {e}")
    kept = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    weights = {
        n: w if checkpoint.stays_wide(n) else w.to(kept) for n, w in weights_to_hf(model.state_dict(), c).items()
    }
    with whole_folder(target, "huggingface", overwrite) as folder:
        save_weights(folder, weights)
        for name, record in ({"config.json": config | {"dtype": dtype}} | tokenizer).items():
            owned.write_json(os.path.join(folder, name), record, ensure_ascii=False)
    print(f"{target}: {model.num_params()['total']:,} parameters for DeepseekV3ForCausalLM.from_pretrained")


def read_hf(source):
    """A Hugging Face folder -> state dict and GPTConfig of a baseline."""
    path = os.path.join(source, "config.json")
    config, interleaved = config_from_hf(read_json(path, each(anything)), path)
    get, names = open_weights(source)
    weights = weights_from_hf(get, names, config, interleaved)
    return weights, replace(config, seq_len=seq_len or config.seq_len)


def read_run(source):
    """A run's newest checkpoint -> state dict, GPTConfig and the corpus it was trained on."""
    model, trained = checkpoint.load_model(source)
    if model.config.residual != "baseline":
        raise CannotConvert(f"{source}: residual={model.config.residual!r}: only a baseline can get more streams")
    return model.state_dict(), model.config, trained["data_dir"]


def write_run(weights, config, target, corpus):
    """A baseline -> a run of 0 steps, with the streams that the settings ask for."""
    model = GPT(config)
    model.load_state_dict(weights)
    if residual not in ("", "baseline"):
        changes = {"residual": residual, "n_streams": n_streams, "manifold": manifold, "sinkhorn_iters": sinkhorn_iters}
        changes |= {"alpha_init": alpha_init, "collapse": collapse, "single_pass": single_pass, "maps_init": "paper"}
        try:
            grown = upcycled(weights, replace(config, **changes), seed)
        except ValueError as e:
            raise CannotConvert(str(e)) from None
        print(f"logits of {residual!r} and its baseline differ by at most {difference(model, grown):.1e}")
        model = grown
    settings = {f.name: getattr(model.config, f.name) for f in fields(GPTConfig) if f.name != "impl"}
    settings |= {"data_dir": corpus}
    origin = {"command": [sys.executable, *sys.argv], "commit": None, "data": {}}  # any data may follow
    state = {"evaluated": None, "val_loss": None, "best_loss": None, "skips": 0, "skipped": 0, "origin": origin}
    with whole_folder(target, "run", overwrite) as folder:
        checkpoint.save(folder, 0, model, None, state, settings)
        with owned.whole_file(os.path.join(folder, "settings.py")) as f:
            f.write(f"# The model in this folder: python train.py {target}/settings.py trains it further\n")
            f.writelines(f"{name} = {value!r}\n" for name, value in (settings | {"out_dir": target}).items())
    print(f"{target}: {model.num_params()['total']:,} parameters; python train.py {target}/settings.py trains it")


@torch.no_grad()
def difference(a, b):
    """The largest difference between two models' logits, on 64 random tokens."""
    idx = torch.randint(a.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    logits_a, logits_b = (model.eval()(idx)[0] for model in (a, b))
    return (logits_a - logits_b).abs().max().item()


def main():
    paths = [a for a in sys.argv[1:] if not a.startswith("-")]
    flags = [re.sub("^--from=", "--from_=", a) for a in sys.argv[1:] if a not in paths]  # `from` is no name in Python
    configure(globals(), RULES, flags)
    if len(paths) != 2:
        fail(f"wanted two folders, like python convert.py out/run folder --to=hf; got {len(paths)}")
    if not (to or from_ or residual) or to and (from_ or residual):
        fail("wanted --to=hf, or --from=hf and --residual=..., one of them or both")
    source, target = paths
    try:
        if to:
            write_hf(source, target)
        elif from_:
            write_run(*read_hf(source), target, data_dir)
        else:
            weights, config, corpus = read_run(source)
            write_run(weights, config, target, data_dir or corpus)
    except (CannotConvert, RecordError, owned.NotOurs) as e:
        fail(str(e))


if __name__ == "__main__":
    program.run(main, checkpoint.CheckpointError)
