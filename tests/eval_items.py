"""Invented items of every task in their official fields, and models that say what a test wants them to say."""

import json
import os

import tiktoken
import torch

from evals.prompts import context, examples_of
from evals.rows import read_task
from evals.tasks import TASKS, drop_golds
from model import GPT, GPTConfig

BYTES = tiktoken.Encoding(
    "bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)},
    special_tokens={"<|endoftext|>": 256}, explicit_n_vocab=257,
)  # fmt: skip


def bbh_prompt(word):
    parts = [f"Q: Is {i} {word}?\nA: Let's think step by step.\nWe look at {i}. So the answer is {i}." for i in "xyz"]
    return f"Say what is {word}.\n\n" + "\n\n".join(parts)


def hellaswag(i, label):
    ends = [f"and sits down {i}.", "[substeps] Then runs  away.", "while the band plays.", "who is a lamp."]
    return {"ind": i, "activity_label": "Juggling", "ctx_a": f"A man has {i} balls. [title] He throws.", "ctx_b": "he",
            "ctx": f"A man has {i} balls. [title] He throws. he", "endings": ends, "label": label}  # fmt: skip


def drop(n, spans, number=""):
    date = {"day": "", "month": "", "year": ""}
    answer = {"number": number, "date": date, "spans": spans}
    return {"passage": f"The Reds had {n} goals, the Blues 2.", "question": f"What of {n}?", "answer": answer,
            "validated_answers": []}  # fmt: skip


def trivia(i, aliases):
    answer = {"aliases": aliases, "normalized_aliases": [a.lower() for a in aliases], "value": aliases[0]}
    return {"question": f"Which town is number {i}?", "question_id": str(i), "answer": answer}


def mmlu(subject, i, answer):
    return {"subject": subject, "question": f" What is {i} plus {i}? ", "choices": [str(2 * i + k) for k in range(4)],
            "answer": answer}  # fmt: skip


def arc(i, labels, key):
    texts = ("Water.", "Dry old sand.", "Air", "The sun above", "Ice")
    choices = [{"text": texts[(k + i) % 5], "label": label} for k, label in enumerate(labels)]
    return {"id": str(i), "question": {"stem": f"What is {i}?", "choices": choices}, "answerKey": key}


FILES = {
    "arc_easy/test": [arc(1, "ABCD", "B"), arc(2, "1234", "4"), arc(3, "ABCDE", "E")],
    "bbh/test": [{"task": t, "index": i, "input": f"Is {i} {t}?\nOptions:\n(A) yes\n(B) no", "target": "(A)"}
                 for t in ("odd_sums", "long_words") for i in range(2)],
    "blimp/test": [{"sentence_good": f"{who} cats {verb}.", "sentence_bad": f"{who} cats {verb}s.", "UID": uid}
                   for who, verb, uid in (("Some", "sleep", "plurals"), ("All", "eat", "plurals"),
                                          ("Who likes", "see", "islands"))],
    "bbh/cot_prompts": [{"task": t, "prompt": bbh_prompt(t)} for t in ("odd_sums", "long_words")],
    "drop/dev": [drop(3, ["the Reds"]), drop(4, [], "4"), drop(5, ["Reds", "Blues"])],
    "drop/train": [drop(i, [], str(i)) for i in range(6, 10)],
    "gsm8k/test": [{"question": f"Ann has {i} pens and buys {i}. How many?",
                    "answer": f"{i}+{i}=<<{i}+{i}={j}>>{j}\n#### {j}"}
                   for i, j in ((3, 6), (600, "1,200"), (41, 82))],
    "gsm8k/train": [{"question": f"Bo eats {i}.", "answer": f"He eats {i}.\nSo {i}.\n#### {i}"} for i in range(10, 20)],
    "hellaswag/val": [hellaswag(i, i % 4) for i in range(5)],
    "hellaswag/train": [hellaswag(i, str(i % 3)) for i in range(20, 32)],
    "lambada/test": [{"text": f"Ann saw {n} dogs. 'Here,' said Bo, and gave Ann {n} bones"} for n in ("two", "nine")],
    "math/test": [{"problem": f"What is ${i}/4$?", "solution": f"It is $\\boxed{{\\frac{{{i}}}{{4}}}}$."}
                  for i in (1, 3)],
    "math/fewshot": [{"problem": f"What is ${i}+1$?", "solution": f"Add: $\\boxed{{{i + 1}}}$.\nFinal Answer: The "
                      f"final answer is ${i + 1}$. I hope it is correct."} for i in range(4)],
    "mmlu/test": [mmlu("sums_of_two", 1, 0), mmlu("sums_of_two", 2, 3), mmlu("more", 3, 1)],
    "mmlu/dev": [mmlu(s, i, i % 4) for s in ("more", "sums_of_two") for i in range(5, 10)],
    "piqa/valid": [{"goal": f"Open jar {i}.", "sol1": "Turn the lid.", "sol2": "Hit the lid with a spoon.",
                    "label": i % 2} for i in range(4)],
    "triviaqa/validation": [trivia(1, ["St. Ives", "Saint Ives"]), trivia(2, ["The Hague"])],
    "triviaqa/train": [trivia(i, [f"Town {i}"]) for i in range(3, 9)],
}  # fmt: skip


def write_files(folder, files=FILES):
    for name, rows in files.items():
        path = os.path.join(folder, name + ".jsonl")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    return str(folder)


def right_answer(name, row, style):
    """What a model has to say (behind the glue) to be right; for choices the right choice's text."""
    if style.choices:
        return style.choices(row)[TASKS[name].gold(row)]
    deepseek = style is TASKS[name].deepseek
    return {
        "bbh": lambda: f"Because. So the answer is {row['target']}.",
        "drop": lambda: drop_golds(row)[0][0] + ".\n",
        "gsm8k": lambda: "Think. The answer is 1,200.".replace("1,200", row["answer"].split("#### ")[1]) + "\n\n"
        if deepseek else "Think.\n" + row["answer"].split("\n")[-1],
        "math": lambda: "Final Answer: The final answer is $0.25$. I hope it is correct.".replace(
            "0.25", str(int(row["problem"][9]) / 4)),
        "triviaqa": lambda: row["answer"]["aliases"][-1].upper().replace(".", "") + "\n",
    }[name]()  # fmt: skip


def tiny(residual="mhc", seed=0, **changes):
    """A GPT with random weights, large enough in spread that its predictions differ from place to place."""
    sizes = dict(
        vocab_size=257, seq_len=4096, n_layer=2, n_embd=32, n_head=2, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, intermediate_size=64, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, init_std=0.3,
    )  # fmt: skip
    model = GPT(GPTConfig(residual=residual, **(sizes | changes)))
    model.init_weights(seed)
    return model.requires_grad_(False)


class Rigged(torch.nn.Module):
    """Continues every text it was told as told, and others with 'z'. It sees the past through the real LatentCache."""

    def __init__(self, texts, seq_len=8192):
        super().__init__()
        self.config = GPTConfig(vocab_size=257, seq_len=seq_len, n_layer=1, kv_lora_rank=1, qk_rope_head_dim=2)
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.next = {}
        for context_ids, answer_ids in texts:
            for i in range(len(answer_ids)):
                self.next[tuple(context_ids + answer_ids[:i])] = answer_ids[i]

    def hidden(self, idx, cache=None):
        past = [[] for _ in idx]
        if cache is not None:
            past = [cache.latent[0, r, :n, 0].long().tolist() for r, n in enumerate(cache.length.tolist())]
            cache.write(0, idx.unsqueeze(-1).float(), torch.zeros(*idx.shape, 2))
            cache.advance(idx.shape[1])
        seen = [before + row for before, row in zip(past, idx.tolist(), strict=True)]
        T = idx.shape[1]
        told = [[self.next.get(tuple(s[: len(s) - T + t + 1]), 122) for t in range(T)] for s in seen]
        return torch.nn.functional.one_hot(torch.tensor(told), 257).float() * 30  # (B, T, 257): logits themselves

    def lm_head(self, h):
        return h


def rigged(eval_dir, name, style_name, answer=right_answer, shots=None):
    """A model that gives `answer(name, row, style)` to every row of a task."""
    task = TASKS[name]
    style, shots = task.style(style_name), task.shots if shots is None else shots
    rows, examples, _ = read_task(eval_dir, name, style, shots)
    find, texts = examples_of(task, style, rows, examples), []
    for i, row in enumerate(rows):
        prompt = context(style, row, find(i)[:shots])
        if style.choices:
            prompt += style.glue
        bare = prompt.rstrip(" ") if style.choices else prompt
        told = (
            BYTES.encode_ordinary(bare) or [256],
            BYTES.encode_ordinary(prompt[len(bare) :] + answer(name, row, style)),
        )
        texts.append((told[0], told[1] + [256]))
    return Rigged(texts)
