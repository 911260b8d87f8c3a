"""What eval.py can ask, as one table of records: prompts, shots, files, stops, scores. No model and no file in here.

    task = TASKS["gsm8k"]
    style = task.style("harness")                    # or "deepseek"
    style.question(row), style.target(row)           # the parts that evals/prompts.py makes a prompt of
    style.score(generated_text, row)                 # {'strict': 1.0, 'flexible': 1.0}

Rows are in the official fields (evals/fetch.py). Two prompt styles: `harness` is lm-evaluation-harness 0.4.13 character
by character, but for DROP, whose prompt is broken there (the examples print the answer's keys, and generation ends at
the first full stop, that of 54.6 too). `deepseek` is how DeepSeek's base models are prompted (DeepSeek-V2, appendix),
where that differs. Few-shot examples are always the first ones of their file, in both styles.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from evals import math_answer
from evals import metrics as em
from records import any_of, anything, each, integer, null_or, number, one_of, string


@dataclass(frozen=True)
class Style:
    """One way to ask. A prompt is description + (question + glue + target + separator) per example + question."""

    question: Callable  # row -> str
    target: Callable  # row -> the answer as an example shows it
    metrics: tuple  # names, the one that stands in the table first
    choices: Callable | None = None  # row -> texts, whose log-probabilities behind `glue` are taken ...
    rate: Callable = em.choice_scores  # ... and judged: ((log-probability, greedy) of each, texts, gold) -> {metric: x}
    score: Callable | None = None  # without choices: (generated text, row) -> {metric: 0.0 .. 1.0}
    stops: tuple = ()  # generation ends at the first of these (and at <|endoftext|>)
    max_new_tokens: int = 256
    description: Callable = lambda row, examples: ""
    glue: str = " "
    separator: str = "\n\n"
    beside: str | None = None  # a field: the examples are the other test rows that share it, as many as there are


@dataclass(frozen=True)
class Task:
    """What is the same in both styles."""

    title: str
    shots: int
    sizes: tuple  # rows of the official test set (of its official variants)
    tests: tuple  # split names of the test file, the first found is used
    fields: dict  # kinds (records.py) of what every test row must have
    gold: Callable  # row -> number of the right choice, or what free answers are held against
    harness: Style
    deepseek: Style | None = None  # None: the same, or DeepSeek has none
    paper: tuple | None = None  # Table 4, 27B: baseline, HC, mHC
    examples: tuple = ()  # as `tests`, for the file of examples; (): there are none
    example_fields: dict | None = None  # kinds of what every line of that file must have; None: `fields`
    fetched: bool = True  # whether prepare_data.py makes that file
    group: str | None = None  # field by which examples belong to rows and scores are broken down (a subject)
    unfold: Callable | None = None  # one line of the examples' file -> its examples, where a line holds several
    needs: Callable = lambda: None  # raises ImportError if a library that the metric needs is missing

    def style(self, name):
        return self.deepseek if name == "deepseek" and self.deepseek else self.harness


# ----------------------------------------------------------------------------------------------------------------------
# Rows to text


def hellaswag_text(text):
    """The harness' clean-up of HellaSwag's WikiHow half; a double space only shrinks once, as there."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def mmlu_question(row):
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
    return "\n".join([row["question"].strip(), *lines, "Answer:"])


def mmlu_description(row, examples):
    subject = row["subject"].replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def gsm8k_gold(row):
    if "#### " not in row["answer"]:
        raise ValueError(f"wanted an answer that ends in '#### ' and a number, got {row['answer'][-60:]!r}")
    return em.gsm8k_number(row["answer"])


def gsm8k_chain(row):
    """A GSM8K solution as a chain of thought on one line: no <<calculator>> notes, 'The answer is N.' at the end."""
    steps, answer = re.sub(r"<<.*?>>", "", row["answer"]).split("\n#### ")
    return f"{' '.join(steps.split())} The answer is {answer.strip()}."


def gsm8k_chain_scores(text, row):
    number = em.find(em.GSM8K_FLEXIBLE, em.answer_is(text))
    return {"em": float(em.gsm8k_number(number) == em.gsm8k_number(row["answer"]))}


BBH_STEP = "\nA: Let's think step by step.\n"


def bbh_examples(line):
    """The official prompt of a subtask -> its three examples, each with the description they begin with.

    `step` is what stands between question and answer; in one subtask (sports_understanding) it ends in a space.
    """
    description, *parts = line["prompt"].strip().split("\n\nQ: ")
    examples = []
    for part in parts:
        question, step, target = re.split(r"(\nA: Let's think step by step\.\s)", part, maxsplit=1)
        examples.append({"task": line["task"], "description": description + "\n\n", "input": question, "step": step,
                         "target": target})  # fmt: skip
    return examples


def drop_golds(row):
    """Every gold answer of a DROP row as a tuple of spans, none twice. `answers` where a row has it, else from the
    official `answer` and `validated_answers` (a list of answers, or one dict of lists)."""
    if "answers" in row:
        return [tuple(spans) for spans in row["answers"]]
    others = row.get("validated_answers") or []
    if isinstance(others, dict):
        others = [dict(zip(others, values, strict=True)) for values in zip(*others.values(), strict=True)]
    return list(dict.fromkeys(drop_spans(answer) for answer in [row["answer"], *others]))


def drop_spans(answer):
    if answer["number"] != "":
        return (str(answer["number"]),)
    if answer["spans"]:
        return tuple(answer["spans"])
    return (" ".join(answer["date"].get(part, "") for part in ("day", "month", "year")).strip(),)


def drop_type(row):
    spans = drop_golds(row)[0]
    dated = "answer" in row and not row["answer"]["number"] and not row["answer"]["spans"]
    return "number" if len(spans) == 1 and em.is_number(spans[0]) else "date" if dated else "spans"


def drop_passage(row, examples):
    return (
        f"Passage: {row['passage']}\n\nAnswer the following questions based on the above passage, please calculate "
        f"carefully if calculation is necessary.\n"
    )


def drop_question(row):
    return f"Q: {row['question']}\nA: The answer type is {drop_type(row)}. So according to above Passage, the answer is"


def triviaqa_golds(answer):
    """What the official metric takes for right: every alias, and what people answered where a row has it."""
    people = answer.get("human_answers") or ()
    return [*answer.get("normalized_aliases", ()), *answer["aliases"], *people, answer["value"]]


def arc_texts(row):
    return [choice["text"] for choice in row["question"]["choices"]]


def arc_gold(row):
    return [choice["label"] for choice in row["question"]["choices"]].index(row["answerKey"])


def last_word(row):
    return row["text"].split(" ")[-1]


# ----------------------------------------------------------------------------------------------------------------------
# The table

TEXT = string()
DROP_ANSWER = {"number": any_of(number(), TEXT), "date": each(TEXT), "spans": [TEXT]}
TRIVIAQA_ANSWER = {"value": TEXT, "aliases": [TEXT], "normalized_aliases?": [TEXT],
                   "human_answers?": null_or([TEXT])}  # fmt: skip

TASKS = {
    "bbh": Task(
        title="BBH", shots=3, paper=(43.8, 48.9, 51.0), sizes=(6511,),
        tests=("test",), fields={"task": TEXT, "input": TEXT, "target": TEXT},
        examples=("cot_prompts",), example_fields={"task": TEXT, "prompt": TEXT}, unfold=bbh_examples,
        group="task", gold=lambda row: row["target"],
        harness=Style(
            description=lambda row, examples: examples[0]["description"] if examples else "",
            question=lambda row: f"Q: {row['input']}{BBH_STEP}",
            target=lambda row: row["target"],
            glue="",
            stops=("</s>", "Q", "\n\n"),  # 'Q' also cuts answers that hold a capital Q
            score=lambda text, row: {"em": float(em.bbh_harness_answer(text) == row["target"])},
            metrics=("em",),
            max_new_tokens=1024,
        ),
        deepseek=Style(
            description=lambda row, examples: examples[0]["description"] if examples else "",
            question=lambda row: f"Q: {row['input']}{row.get('step', BBH_STEP)}",  # as in the official prompt
            target=lambda row: row["target"],
            glue="",
            stops=("\n\n", "\nQ:"),
            score=lambda text, row: {"em": float(em.answer_is(text) == row["target"])},
            metrics=("em",),
            max_new_tokens=1024,
        ),
    ),
    "drop": Task(
        title="DROP", shots=3, paper=(47.0, 51.6, 53.9), sizes=(9536, 9535),
        tests=("dev", "validation"), examples=("train", "fewshot"), gold=drop_golds,
        fields={"passage": TEXT, "question": TEXT, "answers?": [[TEXT]], "answer?": DROP_ANSWER,
                "validated_answers?": any_of(each([anything]), [DROP_ANSWER])},
        harness=Style(
            question=lambda row: f"{row['passage']} {row['question']}",
            target=lambda row: ", ".join(drop_golds(row)[0]),
            stops=("\n",),
            score=lambda text, row: em.drop_scores(em.drop_answer(text), drop_golds(row)),
            metrics=("f1", "em"),
        ),
        deepseek=Style(  # examples from the row's own passage, which may say the answer in other words, as theirs do
            description=drop_passage,
            question=drop_question,
            target=lambda row: ", ".join(drop_golds(row)[0]) + ".",
            stops=("\n",),
            score=lambda text, row: em.drop_scores(em.drop_answer(text), drop_golds(row)),
            metrics=("f1", "em"),
            beside="passage",
        ),
    ),
    "gsm8k": Task(
        title="GSM8K", shots=8, paper=(46.7, 53.2, 53.8), sizes=(1319,),
        tests=("test",), examples=("train",), fields={"question": TEXT, "answer": TEXT}, gold=gsm8k_gold,
        harness=Style(
            question=lambda row: f"Question: {row['question']}\nAnswer:",
            target=lambda row: row["answer"],
            stops=("Question:", "</s>", "<|im_end|>"),
            score=lambda text, row: em.gsm8k_scores(text, row["answer"]),
            metrics=("strict", "flexible"),
        ),
        deepseek=Style(
            question=lambda row: f"Q: {row['question']}\nA: Let's think step by step.",
            target=gsm8k_chain,
            stops=("\n\n", "Q:"),
            score=gsm8k_chain_scores,
            metrics=("em",),
        ),
    ),
    "hellaswag": Task(
        title="HellaSwag", shots=10, paper=(73.7, 74.3, 74.7), sizes=(10042,),
        tests=("val", "validation"), examples=("train", "fewshot_val"),
        fields={"activity_label": TEXT, "ctx_a": TEXT, "ctx_b": TEXT, "endings": [TEXT],
                "label": any_of(integer(0, 3), one_of("0", "1", "2", "3"))},
        gold=lambda row: int(row["label"]),
        harness=Style(  # DeepSeek's published prompt is cleaned and capitalised in the same way
            question=lambda row: hellaswag_text(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
            target=lambda row: hellaswag_text(row["endings"][int(row["label"])]),
            choices=lambda row: [hellaswag_text(ending) for ending in row["endings"]],
            metrics=("acc", "acc_norm"),
        ),
    ),
    "math": Task(
        title="MATH", shots=4, paper=(22.0, 26.4, 26.0), sizes=(5000,),
        tests=("test",), fields={"problem": TEXT, "solution?": null_or(TEXT), "answer?": null_or(TEXT)},
        examples=("fewshot",), example_fields={"problem": TEXT, "solution": TEXT},
        gold=math_answer.math_gold, needs=math_answer.need_latex_parser,
        harness=Style(  # Minerva's four examples, as DeepSeek's
            question=lambda row: f"Problem:\n{row['problem']}\n\nSolution:",
            target=lambda row: row["solution"],
            score=lambda text, row: math_answer.math_scores(text, math_answer.math_gold(row)),
            metrics=("em",),
            stops=("Problem:",),
        ),
    ),
    "mmlu": Task(
        title="MMLU", shots=5, paper=(59.0, 63.0, 63.4), sizes=(14042,),
        tests=("test",), examples=("dev",), group="subject", gold=lambda row: row["answer"],
        fields={"subject": TEXT, "question": TEXT, "choices": (TEXT,) * 4, "answer": integer(0, 3)},
        harness=Style(
            description=mmlu_description,
            question=mmlu_question,
            target=lambda row: "ABCD"[row["answer"]],
            choices=lambda row: list("ABCD"),
            metrics=("acc",),
        ),
    ),
    "piqa": Task(
        title="PIQA", shots=0, paper=(78.5, 79.9, 80.5), sizes=(1838,),
        tests=("valid", "validation"), examples=("train",), fetched=False,  # of PIQA only the validation split is
        fields={"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": any_of(integer(0, 1), one_of("0", "1"))},
        gold=lambda row: int(row["label"]),
        harness=Style(
            question=lambda row: f"Question: {row['goal']}\nAnswer:",
            target=lambda row: row[f"sol{int(row['label']) + 1}"],
            choices=lambda row: [row["sol1"], row["sol2"]],
            metrics=("acc", "acc_norm"),
        ),
        deepseek=Style(
            question=lambda row: row["goal"],
            target=lambda row: row[f"sol{int(row['label']) + 1}"],
            choices=lambda row: [row["sol1"], row["sol2"]],
            metrics=("acc", "acc_norm"),
        ),
    ),
    "triviaqa": Task(
        title="TriviaQA", shots=5, paper=(54.3, 56.3, 57.6), sizes=(11313, 17944),  # unfiltered, reading comprehension
        tests=("validation", "dev"), examples=("train", "fewshot_validation"),
        fields={"question": TEXT, "answer": TRIVIAQA_ANSWER}, gold=lambda row: triviaqa_golds(row["answer"]),
        harness=Style(
            question=lambda row: f"Question: {row['question']}?\nAnswer:",  # a second '?', as there
            target=lambda row: row["answer"]["aliases"][0],
            stops=("\n", ".", ","),
            score=lambda text, row: {"em": em.triviaqa_harness_em(text, row["answer"]["aliases"])},
            metrics=("em",),
        ),
        deepseek=Style(
            description=lambda row, examples: "Answer these questions:\n",
            question=lambda row: f"Q: {row['question']}\nA:",
            target=lambda row: row["answer"]["value"],
            separator="\n",
            stops=("\n",),
            score=lambda text, row: {"em": em.triviaqa_em(text, triviaqa_golds(row["answer"]))},
            metrics=("em",),
        ),
    ),
    # for models of 1M to 1B parameters, which Table 4 finds at chance
    "arc_easy": Task(
        title="ARC-easy", shots=0, sizes=(2376,), tests=("test",), gold=arc_gold,
        fields={"question": {"stem": TEXT, "choices": [{"text": TEXT, "label": TEXT}]}, "answerKey": TEXT},
        harness=Style(
            question=lambda row: f"Question: {row['question']['stem']}\nAnswer:",
            target=lambda row: arc_texts(row)[arc_gold(row)],
            choices=arc_texts,
            metrics=("acc", "acc_norm"),
        ),
    ),
    "blimp": Task(  # 67 files of 1,000 pairs: the mean over pairs is the mean over files
        title="BLiMP", shots=0, sizes=(67000,), tests=("test",), group="UID", gold=lambda row: 0,
        fields={"sentence_good": string(1), "sentence_bad": string(1), "UID": TEXT},
        harness=Style(  # an empty prompt is one <|endoftext|>; the sentence follows a space, as there
            question=lambda row: "",
            target=lambda row: row["sentence_good"],
            choices=lambda row: [row["sentence_good"], row["sentence_bad"]],
            metrics=("acc",),
        ),
    ),
    "lambada": Task(
        title="LAMBADA", shots=0, sizes=(5153,), tests=("test",), fields={"text": string(1)}, gold=lambda row: 0,
        harness=Style(
            question=lambda row: row["text"][: -len(last_word(row)) - 1],
            target=last_word,
            choices=lambda row: [last_word(row)],
            rate=em.last_word_scores,
            metrics=("acc", "perplexity"),
        ),
    ),
}  # fmt: skip

ALL = {"loss": None} | {name: None for name, task in TASKS.items() if task.paper}  # task: shots, None for its own
SMALL = {"loss": None, "hellaswag": 0, "piqa": None, "blimp": None, "lambada": None, "arc_easy": None}
GROUPS = {"all": ALL, "small": SMALL}
