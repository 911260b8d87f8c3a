"""Log-likelihoods and generation against the plain way: one whole sequence at a time, no cache."""

import random

import pytest
import tiktoken
import torch

from evals import generate as generation
from evals import score
from evals.batches import Unit, common_prefix, plan
from evals.generate import generate
from evals.score import Runner, encode_pair, loglikelihoods
from tests.eval_items import BYTES, tiny


def plain_loglikelihood(model, context, continuation, max_length):
    """By definition, on one sequence, in one forward."""
    whole = (context + continuation)[-(max_length + 1) :]
    targets = continuation[-(len(whole) - 1) :]
    logprobs = model(torch.tensor([whole[:-1]]))[0][0].log_softmax(-1)[-len(targets) :]
    picked = logprobs.gather(1, torch.tensor(targets).unsqueeze(1)).sum()
    return float(picked), logprobs.argmax(-1).tolist() == targets


def plain_generate(model, prompt, budget, max_length):
    """Greedy, the whole sequence again for every token."""
    ids = (BYTES.encode_ordinary(prompt) or [256])[budget - max_length :]
    start = len(ids)
    while len(ids) < start + budget:
        token = int(model(torch.tensor([ids]))[0][0, -1].argmax())
        if token == 256:
            break
        ids = ids + [token]
    return BYTES.decode_bytes(ids[start:]).decode(errors="replace")


def ids(rng, n):
    return [rng.randrange(256) for _ in range(n)]


def items_and_groups(rng):
    """Questions of 1 to 4 choices behind a common beginning; some too long, some that are one token, a lone one."""
    few = ids(rng, 40)
    items = []
    for _ in range(14):
        question = few + ids(rng, rng.randint(1, 30))
        items.append([(question, ids(rng, rng.randint(1, 9))) for _ in range(rng.randint(1, 4))])
    items.append([(few + [1, 2], [letter]) for letter in (65, 66, 67, 68)])  # one row, four answers
    items.append([(few * 3, [5, 6]), (few * 3, [5, 6, 7])])  # cut on the left, each by its own length
    items.append([([7], ids(rng, 150))])  # longer than the model's context: its last tokens are scored
    items.append([([256], [9]), ([256], [9, 9])])  # nothing that could be shared
    groups = [i % 2 for i in range(len(items))]
    return items, groups


@pytest.mark.parametrize("residual", ["baseline", "hc", "mhc"])
def test_loglikelihoods_are_those_of_whole_sequences(residual):
    model, rng = tiny(residual, seq_len=100), random.Random(0)
    items, groups = items_and_groups(rng)
    plain = [[plain_loglikelihood(model, *pair, 100) for pair in item] for item in items]
    for batch_tokens, share in ((1, True), (900, True), (10**6, True), (900, False)):
        got = loglikelihoods(Runner(model), items, groups, batch_tokens, share)
        for item, wanted in zip(got, plain, strict=True):
            assert [lp for lp, _ in item] == pytest.approx([lp for lp, _ in wanted], abs=1e-4)
            assert [g for _, g in item] == [g for _, g in wanted]


def test_greedy_is_seen():
    model, context = tiny(), BYTES.encode_ordinary("abc")
    best = int(model(torch.tensor([context]))[0][0, -1].argmax())
    then = int(model(torch.tensor([context + [best]]))[0][0, -1].argmax())
    choices = [[best], [best, then], [best, then ^ 1], [best ^ 1, then]]
    got = loglikelihoods(Runner(model), [[(context, choice) for choice in choices]])
    assert [greedy for _, greedy in got[0]] == [True, True, False, False]


def test_sharing_runs_far_fewer_tokens():
    """What makes it fast, counted: the common beginning once, each question once, each choice's own tokens."""
    model, rng = tiny(), random.Random(0)
    few = ids(rng, 300)
    items = [[(few + q, ids(rng, 5)) for _ in range(4)] for q in (ids(rng, 20) for _ in range(6))]
    ran = []
    hidden = model.hidden
    model.hidden = lambda idx, cache=None: ran.append(idx.numel()) or hidden(idx, cache)
    loglikelihoods(Runner(model), items, share=True)
    shared, ran[:] = sum(ran), []
    loglikelihoods(Runner(model), items, share=False)
    # a question's last token is run with each of its choices, which need the prediction that it makes
    assert shared == 300 + 6 * 19 + 24 * 5 and sum(ran) == 24 * 324


@pytest.mark.parametrize("batch_tokens", [1, 400, 10**6])
def test_generation_is_that_of_whole_sequences(batch_tokens):
    model, rng = tiny(seq_len=120), random.Random(3)
    begin = "what all prompts have in common; "
    prompts = [begin + "".join(rng.choice("abc ") for _ in range(rng.randint(0, 25))) for _ in range(9)]
    prompts += ["", "".join(rng.choice("abc ") for _ in range(200)), "ö"]
    wanted = [plain_generate(model, p, 12, 120) for p in prompts]
    assert len(set(wanted)) > 6  # they do differ
    assert generate(Runner(model), BYTES, prompts, None, (), 12, batch_tokens) == wanted
    stop = wanted[0][4]
    got = generate(Runner(model), BYTES, prompts, None, ("never there", stop), 12, batch_tokens)
    assert got == [text.split(stop)[0] for text in wanted]


def test_generation_ends_at_endoftext_and_never_leaves_the_tokenizer():
    model = tiny(vocab_size=300)  # padded: ids 257 .. 299 are no tokens
    model.lm_head = torch.nn.Linear(32, 300).requires_grad_(False)
    model.lm_head.weight.zero_()
    model.lm_head.bias.zero_()
    model.lm_head.bias[97], model.lm_head.bias[299] = 5.0, 9.0
    assert generate(Runner(model), BYTES, ["abc"], None, (), 7) == ["a" * 7]
    model.lm_head.bias[256] = 6.0
    assert generate(Runner(model), BYTES, ["abc"], None, (), 7) == [""]


def test_budget_is_at_most_half_of_the_context():
    model = tiny(seq_len=20)
    model.lm_head = torch.nn.Linear(32, 257).requires_grad_(False)
    model.lm_head.weight.zero_()
    model.lm_head.bias.copy_(torch.arange(257) == 97)
    assert generate(Runner(model), BYTES, ["b" * 50, "b"], None, (), 256) == ["a" * 10] * 2
    assert generate(Runner(model), BYTES, ["b" * 50, "b"], None, (), 4) == ["a" * 4] * 2


def test_encoding_of_pairs():
    assert encode_pair(BYTES, "ab ", "cd") == ([97, 98], [32, 99, 100])  # the space belongs to the continuation
    assert encode_pair(BYTES, "", "x") == ([256], [120])
    with pytest.raises(ValueError, match="no tokens"):
        encode_pair(BYTES, "ab", "")


def merging(*merges):
    """The byte tokenizer with these texts as tokens 256, 257, ..., none of them kept apart by a pattern."""
    ranks = {bytes([i]): i for i in range(256)} | {text.encode(): 256 + i for i, text in enumerate(merges)}
    end = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("merging", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens=end)


def test_a_merge_across_the_border():
    """As in lm-evaluation-harness the context keeps its own number of tokens, and the rest is the continuation."""
    bc = merging("bc")
    assert bc.encode_ordinary("abcd") == [97, 256, 100]
    assert encode_pair(bc, "ab", "cd") == ([97, 98], [100])  # the merged 'bc' stands where the context's 'b' does
    with pytest.raises(ValueError, match="'c' has no tokens of its own behind 'ab'"):
        encode_pair(bc, "ab", "c")


def test_stops_cut_at_the_earliest():
    assert generation.cut(b"ab.c\nd", (b"\n", b".")) == b"ab"
    assert generation.cut(b"abc", (b"\n",)) == b"abc"


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_prefix([[1, 2], [1, 3], [1, 2]]) == 1 == common_prefix([[1, 3], [1, 2], [1, 3]])
    assert common_prefix([[1], [2]]) == 0 and common_prefix([[1, 2]]) == 2 and common_prefix([[], [1]]) == 0


def a_unit(rng, asked, rows=None, question=None):
    question = rng.choice([0, rng.randint(1, 200)]) if question is None else question
    return Unit([[0]] * (rows or rng.randint(1, 4)), question, rng.randint(1, 90), [asked])


def test_plan_covers_every_unit_once_within_the_limit():
    rng = random.Random(5)
    pools = [([7] * 20, [a_unit(rng, i) for i in range(60)]), ([], [a_unit(rng, i) for i in range(60, 90)])]
    batches = plan(pools, 900, room=3)
    assert sorted(u.asked[0] for b in batches for u in b.units) == list(range(90))
    for b in batches:
        longest = len(b.prefix) + max(u.question for u in b.units) + max(u.tail for u in b.units) + 3
        assert longest * sum(len(u.rows) for u in b.units) <= 900 or len(b.units) == 1
        assert b.prefix == ([] if b.units[0].asked[0] >= 60 else [7] * 20)
    assert len(batches) < 60


def run_by(batches):
    """Tokens that the stages of these batches run, counted from the definition."""
    return sum(len(b.units) * max(u.question for u in b.units)
               + sum(len(u.rows) for u in b.units) * max(u.tail for u in b.units) for b in batches)  # fmt: skip


def test_a_batch_pads_no_more_than_a_call_costs():
    rng = random.Random(6)
    units = [Unit([[0]], 0, length) for length in [500, 90, 90, 7] + [rng.randint(20, 120) for _ in range(300)]]
    own = sum(u.tail for u in units)
    batches = plan([([], units)], 10**6)
    assert run_by(batches) - own <= 32 * len(batches) and run_by(batches) < 1.05 * own
    assert 8 < len(batches) < 40  # not one row a call either
    assert len(plan([([], units)], 10**6, room=256)) <= 3  # generation: 256 calls more for every batch


def test_questions_and_tails_are_both_cut():
    """Two kinds whose lengths go against each other: sorted by the whole length they would pad one another."""
    units = [Unit([[0]] * 4, q, t) for q, t in ((300, 10), (10, 300)) for _ in range(8)]
    batches = plan([([], units)], 10**6)
    assert len(batches) == 2 and run_by(batches) == 8 * 300 + 32 * 10 + 8 * 10 + 32 * 300


def test_short_rows_run_hardly_more_than_their_own_tokens():
    """PIQA's shape: questions of 10 to 40 tokens, two answers of 5 to 80 of about the same length, nothing common."""
    model, rng = tiny(), random.Random(0)
    items = []
    for _ in range(60):
        question, n = ids(rng, rng.randint(10, 40)), round(5 + 75 * rng.random() ** 2)
        items.append([(question, ids(rng, n + rng.randint(0, 1))) for _ in range(2)])
    ran, hidden = [], model.hidden
    model.hidden = lambda idx, cache=None: ran.append(idx.numel()) or hidden(idx, cache)
    loglikelihoods(Runner(model), items)
    assert sum(ran) <= 1.1 * sum(len(c) + len(t) - 1 for item in items for c, t in item)
    assert len(ran) < 40


@pytest.mark.parametrize("where", [slice(None), slice(97, 98)])
def test_what_is_not_a_number_is_refused(where):
    """A model that diverged, wholly or for one token alone: choice 0 and empty texts would look like answers."""
    model = tiny(seq_len=100)
    model.embed_tokens.weight[where] = torch.nan
    items = [[(BYTES.encode_ordinary("xyz"), [1]), ([5], [2])], [(BYTES.encode_ordinary("abc"), [1])]]
    with pytest.raises(FloatingPointError, match="not a number; take a checkpoint from before"):
        loglikelihoods(Runner(model), items)
    with pytest.raises(FloatingPointError):
        generate(Runner(model), BYTES, ["xyz", "abc"], None, (), 3)


def test_max_logits_does_not_change_anything(monkeypatch):
    model, (items, groups) = tiny(seq_len=100), items_and_groups(random.Random(2))
    whole = loglikelihoods(Runner(model), items, groups)
    monkeypatch.setattr(score, "MAX_LOGITS", 257 * 3)
    pieces = loglikelihoods(Runner(model), items, groups)
    assert [lp for i in pieces for lp, _ in i] == pytest.approx([lp for i in whole for lp, _ in i], abs=1e-5)
