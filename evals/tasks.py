"""The eight tasks of the paper's Table 4 as one table of records: prompts, shots, files, stops, scores. No model here.

    rows, examples, files = read_task(eval_dir, "gsm8k", shots=8)
    style = TASKS["gsm8k"].harness                        # or .deepseek
    prompt = context(style, rows[0], shown(TASKS["gsm8k"], examples, rows[0], 8))
    style.score(generated_text, rows[0])                  # {'strict': 1.0, 'flexible': 1.0}

Files lie at <eval_dir>/<task>/<split>.jsonl, one row a line in the official fields (prepare_data.py --dataset=eval puts
them there). Two prompt styles: `harness` is lm-evaluation-harness 0.4.13 character by character (but for DROP, whose
prompt is broken there: the examples print the answer's keys; here they show the answer), with the first n examples.
`deepseek` is how DeepSeek's base models are prompted (DeepSeek-V2, appendix). Examples always come first n.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from evals import metrics as em

PREPARE = "python prepare_data.py --dataset=eval"


@dataclass(frozen=True)
class Style:
    """One way to ask. A prompt is description + (question + glue + target + separator) per example + question."""

    question: Callable  # row -> str
    target: Callable  # row -> the answer as an example shows it
    metrics: tuple  # names, the one that stands in the table first
    choices: Callable | None = None  # row -> the texts of the choices, scored by log-probability after `glue`
    score: Callable | None = None  # without choices: (generated text, row) -> {metric: 0.0 .. 1.0}
    stops: tuple = ()  # generation ends at the first of these (and at <|endoftext|>)
    max_new_tokens: int = 256
    description: Callable = lambda row, examples: ""
    glue: str = " "
    separator: str = "\n\n"


@dataclass(frozen=True)
class Task:
    """What is the same in both styles."""

    title: str
    shots: int
    paper: tuple  # Table 4, 27B: baseline, HC, mHC
    sizes: tuple  # rows of the official test set (of its official variants)
    tests: tuple  # split names of the test file, the first found is used
    examples: tuple  # the same for the file of examples
    fields: tuple  # that every test row must have
    harness: Style
    deepseek: Style
    gold: Callable  # row -> number of the right choice, or what free answers are held against
    example_fields: tuple = ()  # that every line of the examples' file must have; (): `fields`
    fetched: bool = True  # whether prepare_data.py makes the examples' file
    group: str | None = None  # field by which examples belong to rows (a subject has its own)
    unfold: Callable | None = None  # one line of the examples' file -> its examples, where a line holds several
    needs: Callable = lambda: None  # raises ImportError if a library that the metric needs is missing


# ----------------------------------------------------------------------------------------------------------------------
# Rows to text


def hellaswag_text(text):
    """The harness' clean-up of HellaSwag's WikiHow half; a double space only shrinks once, as there."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag_question(row):
    return hellaswag_text(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")


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
    if len(spans) > 1:
        return "multiple spans"
    dated = "answer" in row and not row["answer"]["number"] and not row["answer"]["spans"]
    return "number" if em.is_number(spans[0]) else "date" if dated else "span"


def drop_chain(row):
    answer = ", ".join(drop_golds(row)[0])
    return f"The answer type is {drop_type(row)}. So according to above Passage, the answer is {answer}."


def drop_question(row):
    return (
        f"Passage: {row['passage']}\n\nAnswer the following questions based on the above passage, please calculate "
        f"carefully if calculation is necessary.\nQ: {row['question']}\nA:"
    )


def guess(task, row):
    """The score (0 to 1) that guessing at random among a row's possible answers has on average; 0 for free answers."""
    if task.harness.choices:
        return 1 / len(task.harness.choices(row))
    if "target" in row:  # BBH: lettered options, or one of a pair of words
        options = len(re.findall(r"^\([A-Z]\)", row["input"], re.M))
        pair = row["target"].lower() in ("yes", "no", "true", "false", "valid", "invalid")
        return 1 / options if options else 0.5 if pair else 0.0
    return 0.0


# ----------------------------------------------------------------------------------------------------------------------
# The table

TASKS = {
    "bbh": Task(
        title="BBH", shots=3, paper=(43.8, 48.9, 51.0), sizes=(6511,),
        tests=("test",), examples=("cot_prompts",), fields=("task", "input", "target"), group="task",
        example_fields=("task", "prompt"), unfold=bbh_examples, gold=lambda row: row["target"],
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
        tests=("dev", "validation"), examples=("train", "fewshot"), fields=("passage", "question"), gold=drop_golds,
        harness=Style(
            question=lambda row: f"{row['passage']} {row['question']}",
            target=lambda row: ",".join(drop_golds(row)[0]),
            stops=(".",),
            score=lambda text, row: em.drop_scores(text, drop_golds(row)),
            metrics=("f1", "em"),
        ),
        deepseek=Style(
            question=drop_question,
            target=drop_chain,
            stops=("\n",),
            score=lambda text, row: em.drop_scores(em.answer_is(text), drop_golds(row)),
            metrics=("f1", "em"),
        ),
    ),
    "gsm8k": Task(
        title="GSM8K", shots=8, paper=(46.7, 53.2, 53.8), sizes=(1319,),
        tests=("test",), examples=("train",), fields=("question", "answer"), gold=gsm8k_gold,
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
        fields=("activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"),
        gold=lambda row: int(row["label"]),
        harness=Style(
            question=hellaswag_question,
            target=lambda row: hellaswag_text(row["endings"][int(row["label"])]),
            choices=lambda row: [hellaswag_text(ending) for ending in row["endings"]],
            metrics=("acc", "acc_norm"),
        ),
        deepseek=Style(
            question=lambda row: f"{row['activity_label']}: {row['ctx']}",
            target=lambda row: row["endings"][int(row["label"])],
            choices=lambda row: row["endings"],
            metrics=("acc", "acc_norm"),
        ),
    ),
    "math": Task(
        title="MATH", shots=4, paper=(22.0, 26.4, 26.0), sizes=(5000,),
        tests=("test",), examples=("fewshot",), fields=("problem",),
        example_fields=("problem", "solution"), gold=em.math_gold, needs=em.need_latex_parser,
        harness=(_minerva := Style(  # Minerva's four examples, in both styles
            question=lambda row: f"Problem:\n{row['problem']}\n\nSolution:",
            target=lambda row: row["solution"],
            score=lambda text, row: em.math_scores(text, em.math_gold(row)),
            metrics=("em",),
            stops=("Problem:",),
        )),
        deepseek=_minerva,
    ),
    "mmlu": Task(
        title="MMLU", shots=5, paper=(59.0, 63.0, 63.4), sizes=(14042,),
        tests=("test",), examples=("dev",), fields=("subject", "question", "choices", "answer"), group="subject",
        gold=lambda row: row["answer"],
        harness=(_mmlu := Style(
            description=mmlu_description,
            question=mmlu_question,
            target=lambda row: "ABCD"[row["answer"]],
            choices=lambda row: list("ABCD"),
            metrics=("acc",),
        )),
        deepseek=_mmlu,
    ),
    "piqa": Task(
        title="PIQA", shots=0, paper=(78.5, 79.9, 80.5), sizes=(1838,),
        tests=("valid", "validation"), examples=("train",), fields=("goal", "sol1", "sol2", "label"),
        fetched=False,  # of PIQA only the validation split is
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
        tests=("validation", "dev"), examples=("train", "fewshot_validation"), fields=("question", "answer"),
        gold=lambda row: triviaqa_golds(row["answer"]),
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
}  # fmt: skip


def triviaqa_golds(answer):
    """What the official metric takes for right: every alias, and what people answered where a row has it."""
    people = answer.get("human_answers") or ()
    return [*answer.get("normalized_aliases", ()), *answer["aliases"], *people, answer["value"]]


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


def shown(task, examples, row, shots):
    """The first `shots` examples that belong to a row. TaskError if there are fewer."""
    mine = [e for e in examples if not task.group or e[task.group] == row[task.group]][:shots]
    if len(mine) < shots:
        which = f" of {task.group} {row[task.group]!r}" if task.group else ""
        raise TaskError(f"{task.title}: wanted {shots} examples{which}, got {len(mine)}; set --shots={len(mine)}")
    return mine


def context(style, row, examples):
    """The whole prompt of a row: everything up to where the model answers."""
    before = (style.question(e) + style.glue + style.target(e) + style.separator for e in examples)
    return style.description(row, examples) + "".join(before) + style.question(row)


def ask(task, style, row, examples, shots, where):
    """The prompt of a row, once its right answer and its score by guessing are known to be readable.

    Raises TaskError saying `where` the row and the examples are from.
    """
    mine = shown(task, examples, row, shots)
    try:
        gold = task.gold(row)
        if style.choices and gold not in range(len(style.choices(row))):
            raise ValueError(f"wanted the number of one of {len(style.choices(row))} choices, got {gold!r}")
        guess(task, row)
        return context(style, row, mine)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
        what = f"no {e}" if isinstance(e, KeyError) else e
        raise TaskError(f"{where}: a row or its examples cannot be used: {what}; the row: {str(row)[:200]}") from e


# ----------------------------------------------------------------------------------------------------------------------
# Files


class TaskError(Exception):
    """A task that cannot be scored: files missing or damaged, too few examples. The message says what to do."""


def find_split(eval_dir, name, splits, fetched=True):
    """Path of the first of `splits` that exists. TaskError otherwise; fetched: whether prepare_data.py makes it."""
    paths = [os.path.join(eval_dir, name, f"{split}.jsonl") for split in splits]
    for path in paths:
        if os.path.isfile(path):
            return path
    what = (
        f"to fetch it: {PREPARE} --tasks={name} --eval_dir={eval_dir}"
        if fetched
        else "prepare_data.py does not fetch it: put it there, or set --shots=0"
    )
    raise TaskError(f"{name}: no {' or '.join(paths)}; {what}")


def read_rows(path, fields):
    """The rows of a .jsonl file. TaskError naming file and line for what is not JSON or lacks a field."""
    rows = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
            except ValueError as e:  # of UTF-8 too
                raise TaskError(f"{path}, line {number}: not JSON ({e}); fetch it again: {PREPARE}") from e
            lacking = [name for name in fields if not isinstance(row, dict) or name not in row]
            if lacking:
                raise TaskError(f"{path}, line {number}: no field {', '.join(lacking)}; wanted {', '.join(fields)}")
            rows.append(row)
    if not rows:
        raise TaskError(f"{path}: has no rows; fetch it again: {PREPARE}")
    return rows


def read_task(eval_dir, name, shots):
    """-> test rows, examples (none if shots is 0), {file: {'rows', 'sha256'}}. Raises TaskError."""
    task = TASKS[name]
    try:
        task.needs()
    except ImportError as e:
        raise TaskError(str(e)) from e
    test = find_split(eval_dir, name, task.tests)
    rows, files = read_rows(test, task.fields), [test]
    examples = []
    if shots:
        files.append(find_split(eval_dir, name, task.examples, task.fetched))
        examples = read_rows(files[-1], task.example_fields or task.fields)
        try:
            examples = [e for line in examples for e in task.unfold(line)] if task.unfold else examples
        except (ValueError, AttributeError) as e:
            raise TaskError(f"{files[-1]}: not in the official form ({e}); fetch it again: {PREPARE}") from e
    return rows, examples, {os.path.basename(path): describe(path) for path in files}


def describe(path):
    with open(path, "rb") as f:
        data = f.read()
    return {"rows": data.count(b"\n") + (not data.endswith(b"\n")), "sha256": hashlib.sha256(data).hexdigest()}
