"""Generation through the latent cache against the uncached forward; what is drawn, and from which tokens."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mhc_cpu
from evals import generate as loop
from evals.score import Runner
from layers import LatentCache
from model import GPT, GPTConfig
from sample import draw, generate, keep_likeliest

PROMPTS = [[5, 3, 8], [1], [7, 7, 2, 9, 4, 11, 6], [5, 3, 8, 10]]  # ragged


def make_model(dtype=torch.float32, **changes):
    """Two blocks, dense and MoE, with weights far from zero, so that attention and the mappings do something."""
    config = dict(
        vocab_size=23, seq_len=32, n_layer=2, n_embd=24, n_head=3, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=6, intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, init_std=0.3, alpha_init=0.5,
    ) | changes  # fmt: skip
    model = GPT(GPTConfig(**config))
    model.init_weights(1)
    return model.to(dtype).eval().requires_grad_(False)


def logits_through_cache(model, sequences, starts, chunks):
    """Logits behind the last token of every chunk: the first starts[r] tokens of row r at once, padded on the right,
    then chunks of these lengths. -> (R, 1 + len(chunks), V)"""
    cache = LatentCache(model.config, len(starts), sequences.shape[1], dtype=model.lm_head.weight.dtype)
    starts, rows = torch.tensor(starts), torch.arange(len(starts))
    logits = [model(sequences[:, : starts.max()], cache=cache)[0][rows, starts - 1]]
    cache.length = starts.clone()
    for T in chunks:
        columns = cache.length.unsqueeze(1) + torch.arange(T)
        logits.append(model(sequences.gather(1, columns), cache=cache)[0][:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize("q_lora_rank", [0, 10])
@pytest.mark.parametrize(
    "residual, changes",
    [("baseline", {}), ("hc", {}), ("hc", {"collapse": "head"}), ("mhc", {}), ("mhc", {"collapse": "head"}),
     ("mhc", {"single_pass": True})],
)  # fmt: skip
def test_the_cache_gives_the_logits_of_a_whole_forward(residual, q_lora_rank, changes, dtype, tolerance):
    model = make_model(dtype, residual=residual, q_lora_rank=q_lora_rank, **changes)
    starts, chunks = [4, 1, 9, 6], [1, 1, 3, 1, 1]
    sequences = torch.randint(0, 23, (4, max(starts) + sum(chunks)), generator=torch.Generator().manual_seed(2))
    got = logits_through_cache(model, sequences, starts, chunks)
    for r, start in enumerate(starts):  # each row alone: no padding, no cache
        ends = [start + sum(chunks[:i]) for i in range(len(chunks) + 1)]
        whole = model(sequences[r : r + 1, : ends[-1]])[0][0]
        wanted = whole[[end - 1 for end in ends]]
        assert wanted.std() > 0.1  # or agreement would say nothing
        assert (got[r] - wanted).abs().max() < tolerance


def greedy(model, prompt, count):
    """The reference: a whole forward for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("residual", ["baseline", "hc", "mhc"])
def test_ragged_greedy_generation_is_that_of_whole_forwards(residual):
    model = make_model(residual=residual)
    prompts = PROMPTS + [PROMPTS[0]]  # and one that comes twice
    assert generate(model, prompts, 12, temperature=0) == [greedy(model, p, 12) for p in prompts]


def test_generation_past_seq_len():
    model = make_model(seq_len=4)
    assert generate(model, [[5, 3, 8]], 30, temperature=0) == [greedy(model, [5, 3, 8], 30)]


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours():
    model = make_model()
    together = generate(model, [[5, 3]] * 5, 20, 0.9, seeds=range(10, 15))
    alone = [generate(model, [[5, 3]], 20, 0.9, seeds=[seed])[0] for seed in range(10, 15)]
    assert together == alone
    assert len(set(map(tuple, together))) == 5
    mixed = generate(model, [[9, 9, 9, 9], [5, 3], [2]], 20, 0.9, seeds=[3, 12, 5])  # other prompts beside it
    assert mixed[1] == together[2]


def test_stop_ends_one_sample_and_leaves_the_others():
    """Rows end at different times, so that the batch shrinks on the way."""
    model = make_model()
    free = generate(model, PROMPTS * 2, 25, 1.0, seeds=range(8))
    stop = free[0][4]
    wanted = [s[: s.index(stop)] if stop in s else s for s in free]
    assert len({len(s) for s in wanted}) > 2
    heard = [[] for _ in free]
    got = generate(model, PROMPTS * 2, 25, 1.0, seeds=range(8), stop=stop, on_token=lambda i, t: heard[i].append(t))
    assert got == wanted
    assert heard == [s + [None] for s in wanted]


def test_forbidden_tokens_are_never_drawn():
    model = make_model()
    forbidden = torch.arange(23) % 2 == 0
    for temperature in (0, 50.0):
        samples = generate(model, [[1]] * 4, 30, temperature, forbidden=forbidden)
        assert {t % 2 for s in samples for t in s} == {1}


def test_mistakes():
    model = make_model()
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(model, [[1], []], 3)
    with pytest.raises(ValueError):
        generate(model, [[1], [2]], 3, seeds=[1])
    model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not a number"):
        generate(model, [[1]], 3)


def play_back(step, undo):
    """In the place of a CUDA graph: each replay runs the step on the same tensors, and shapes may not change."""
    first = step()
    undo()

    def replay():
        with Shapes() as shapes:
            first.copy_(step())
        play_back.seen.append(shapes.of)

    play_back.made += 1
    return replay, first


class Shapes(TorchDispatchMode):
    """The operations run, with the shapes of what they give; and none that waits for the device."""

    def __init__(self):
        super().__init__()
        self.of = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert "_local_scalar_dense" not in str(func)
        self.of.append((str(func), [t.shape for t in tree_leaves(out) if isinstance(t, torch.Tensor)]))
        return out


@pytest.mark.parametrize("residual", ["baseline", "mhc"])
def test_a_graph_of_a_token_has_fixed_shapes_and_gives_the_same_text(residual, monkeypatch):
    """As on a GPU, with the step run anew where a graph would be replayed: prompts of all lengths, rows that end at
    different times, graphs that are outgrown."""
    model = make_model(residual=residual)
    monkeypatch.setattr(mhc_cpu, "by_size", lambda direct, by_log, *args: by_log(*args))  # a CPU alone is asked
    stop = generate(model, PROMPTS * 2, 25, 1.0, seeds=range(8))[0][4]
    wanted = generate(model, PROMPTS * 2, 25, 1.0, seeds=range(8), stop=stop)
    init = loop.Decoder.__init__
    monkeypatch.setattr(loop.Decoder, "__init__", lambda d, *args: init(d, *args) or setattr(d, "graphs", True))
    monkeypatch.setattr(loop.Decoder, "REACH", 8)
    monkeypatch.setattr(loop, "captured", play_back)
    play_back.made, play_back.seen = 0, []
    assert generate(model, PROMPTS * 2, 25, 1.0, seeds=range(8), stop=stop) == wanted
    different = {str(shapes) for shapes in play_back.seen}
    assert 3 < play_back.made < len(play_back.seen) / 2 and len(different) <= play_back.made


@pytest.mark.parametrize(
    "changes, dtype, capability, graph",
    [
        ({}, torch.bfloat16, (9, 0), True), ({}, torch.bfloat16, (8, 0), False), ({}, torch.float32, (8, 0), True),
        ({"moe_intermediate_size": 12}, torch.bfloat16, (8, 0), True),
        ({"first_k_dense_replace": 2}, torch.bfloat16, (8, 0), True),
    ],
)  # fmt: skip
def test_a_token_is_a_graph_where_experts_do_not_wait(changes, dtype, capability, graph, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert loop.never_waits(make_model(**changes).config, dtype) == graph


def test_in_bf16_the_matrices_are_cast_once_and_not_for_every_token():
    """The copies are the runner's; the model keeps its own, and says the same to the bit as under autocast alone."""
    model, idx = make_model(residual="baseline"), torch.tensor([PROMPTS[2]])
    runner = Runner(model, "bfloat16")
    with Shapes() as shapes:
        h = runner.forward(idx)
        logits = runner.logits(h[:, -1])
    matrices = [*(module._parameters[name] for module, name in model.matrices()), model.lm_head.weight]
    casts = {shape for name, made in shapes.of if "_to_copy" in name for shape in made}
    assert casts and not {p.shape for p in matrices} & casts
    assert all(p.dtype == torch.float32 for p in matrices)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.hidden(idx), h) and torch.equal(model.lm_head(h[:, -1]).float(), logits)


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def kept(probs, top_k, top_p):
    logits = torch.tensor([probs], dtype=torch.float64).log()
    return keep_likeliest(logits, top_k, top_p).isfinite().nonzero()[:, 1].tolist()


@pytest.mark.parametrize(
    "top_k, top_p, wanted",
    [
        (0, 1.0, [0, 1, 2, 3, 4]),
        (2, 1.0, [1, 3]),
        (9, 1.0, [0, 1, 2, 3, 4]),  # more than there are
        (0, 0.39, [3]),  # below the likeliest: itself
        (0, 0.41, [1, 3]),  # the one that crosses the border belongs to it
        (0, 0.75, [1, 3, 4]),
        (3, 0.75, [1, 3]),  # top_k first: .4 and .3 of .85 are .82
        (0, 1e-9, [3]),
    ],
)
def test_top_k_and_top_p(top_k, top_p, wanted):
    assert kept([0.05, 0.3, 0.1, 0.4, 0.15], top_k, top_p) == wanted


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies(temperature):
    probs, M = torch.tensor([0.05, 0.0, 0.3, 0.1, 0.4, 0.15], dtype=torch.float64), 20000
    tokens = draw(probs.log().expand(M, 6), temperature, 0, 1.0, [torch.Generator().manual_seed(4)] * M)
    wanted = probs ** (1 / temperature)
    wanted /= wanted.sum()
    frequencies = torch.bincount(torch.tensor(tokens), minlength=6) / M
    assert ((frequencies - wanted).abs() <= 4.5 * (wanted * (1 - wanted) / M).sqrt()).all()  # exactly 0 where p is 0


def test_extreme_temperatures():
    logits = torch.tensor([[3.0, 500.0, -2e4, 499.0]])
    assert draw(logits, 1e-300, 0, 1.0, [torch.Generator()]) == [1]
    many = draw(logits.expand(400, 4), 1e30, 0, 1.0, [torch.Generator().manual_seed(0)] * 400)
    assert min(torch.bincount(torch.tensor(many), minlength=4)) > 60  # all alike


def test_a_draw_on_the_border_falls_on_a_token_that_can_be(monkeypatch):
    """A uniform number of exactly 0 must not pick a first token of probability 0."""
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.zeros(*size, dtype=torch.float64))
    assert draw(torch.tensor([[0.0, 0.5, 0.5]]).log(), 1.0, 0, 1.0, [None]) == [1]
