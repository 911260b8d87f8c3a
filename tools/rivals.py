"""bench.py rival: a training step of our baseline and of transformers' DeepseekV3 with the same weights, in turn.

Both take the loss of the same tokens, go backward, and step AdamW; their first losses must agree.
"""

import statistics
import time

import torch
import torch.nn.functional as F

from convert import config_to_hf, weights_to_hf
from model import GPT, GPTConfig


def both(settings, vocab_size, seed):
    """-> our baseline of these settings (a dict), and DeepseekV3ForCausalLM with the same weights, in train mode."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    given = {k: v for k, v in settings.items() if k in GPTConfig.__dataclass_fields__}
    config = GPTConfig(**given | {"residual": "baseline", "vocab_size": vocab_size, "single_pass": False})
    ours = GPT(config)
    ours.init_weights(seed)
    weights = weights_to_hf(ours.state_dict(), config)
    config = DeepseekV3Config(**config_to_hf(config) | {"use_cache": False})
    theirs = DeepseekV3ForCausalLM.from_pretrained(None, config=config, state_dict=weights)  # which stacks the experts
    return ours.train(), theirs.train()


def stepper(model, loss):
    """-> step(): the loss of one training step, CPU seconds, seconds. loss(model) is a tensor."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        cpu, clock = time.process_time(), time.perf_counter()
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        return value.item(), time.process_time() - cpu, time.perf_counter() - clock

    return step


def train_step(settings, vocab_size, rounds, seed):
    """-> {name: [(loss, CPU seconds, seconds), one a round]} of 'ours' and 'theirs'; the first round is not kept."""
    ours, theirs = both(settings, vocab_size, seed)
    shape = settings["micro_batch_size"], ours.config.seq_len + 1
    idx = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    steps = {
        "ours": stepper(ours, lambda m: m(x, y)[1]),
        "theirs": stepper(theirs, lambda m: F.cross_entropy(m(input_ids=x).logits.flatten(0, 1), y.flatten())),
    }
    found = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            found[name].append(step())
    first = [
        values[0][0] for values in found.values()
    ]  # before a step: afterwards AdamW sees differently scaled weights
    if abs(first[0] - first[1]) > 1e-4:
        raise RuntimeError(f"the two do not compute the same: their first losses are {first[0]:.6f} and {first[1]:.6f}")
    return {name: values[1:] for name, values in found.items()}


def report(name, settings, vocab_size, rounds, seed):
    """Print the median step of both, and how much longer theirs takes, round by round."""
    found = train_step(settings, vocab_size, rounds, seed)
    print(f"{name}, baseline, vocabulary {vocab_size}, {torch.get_num_threads()} threads, medians of {rounds} in turn")
    for column, what in ((1, "CPU seconds"), (2, "seconds")):
        ours, theirs = ([v[column] for v in found[k]] for k in ("ours", "theirs"))
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        print(f"  {what:<12} ours {statistics.median(ours):.3f}, theirs {statistics.median(theirs):.3f}, "
              f"theirs over ours {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")  # fmt: skip
