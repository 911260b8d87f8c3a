"""Prompts character by character, examples, files that are missing or damaged."""

import re

import pytest

from evals.prompts import context, guess, prompts
from evals.rows import TaskError, read_task
from evals.tasks import TASKS, drop_golds
from tests.eval_items import BYTES, FILES, drop, write_files

HARNESS = {
    "arc_easy": "Question: What is 1?\nAnswer:",
    "blimp": "",
    "lambada": "Ann saw two dogs. 'Here,' said Bo, and gave Ann two",
    "bbh": "Say what is odd_sums.\n\n"
    "Q: Is x odd_sums?\nA: Let's think step by step.\nWe look at x. So the answer is x.\n\n"
    "Q: Is y odd_sums?\nA: Let's think step by step.\nWe look at y. So the answer is y.\n\n"
    "Q: Is 0 odd_sums?\nOptions:\n(A) yes\n(B) no\nA: Let's think step by step.\n",
    "drop": "The Reds had 6 goals, the Blues 2. What of 6? 6\n\nThe Reds had 7 goals, the Blues 2. What of 7? 7\n\n"
    "The Reds had 3 goals, the Blues 2. What of 3?",
    "gsm8k": "Question: Bo eats 10.\nAnswer: He eats 10.\nSo 10.\n#### 10\n\n"
    "Question: Bo eats 11.\nAnswer: He eats 11.\nSo 11.\n#### 11\n\n"
    "Question: Ann has 3 pens and buys 3. How many?\nAnswer:",
    "hellaswag": "Juggling: A man has 20 balls.. He throws. He while the band plays.\n\n"
    "Juggling: A man has 21 balls.. He throws. He and sits down 21.\n\nJuggling: A man has 0 balls.. He throws. He",
    "math": "Problem:\nWhat is $0+1$?\n\nSolution: Add: $\\boxed{1}$.\n"
    "Final Answer: The final answer is $1$. I hope it is correct.\n\n"
    "Problem:\nWhat is $1+1$?\n\nSolution: Add: $\\boxed{2}$.\n"
    "Final Answer: The final answer is $2$. I hope it is correct.\n\nProblem:\nWhat is $1/4$?\n\nSolution:",
    "mmlu": "The following are multiple choice questions (with answers) about sums of two.\n\n"
    "What is 5 plus 5?\nA. 10\nB. 11\nC. 12\nD. 13\nAnswer: B\n\n"
    "What is 6 plus 6?\nA. 12\nB. 13\nC. 14\nD. 15\nAnswer: C\n\n"
    "What is 1 plus 1?\nA. 2\nB. 3\nC. 4\nD. 5\nAnswer:",
    "piqa": "Question: Open jar 0.\nAnswer:",
    "triviaqa": "Question: Which town is number 3??\nAnswer: Town 3\n\n"
    "Question: Which town is number 4??\nAnswer: Town 4\n\n"
    "Question: Which town is number 1??\nAnswer:",
}  # fmt: skip

CALCULATE = (
    "Answer the following questions based on the above passage, please calculate carefully if calculation is necessary."
)
DEEPSEEK = HARNESS | {
    "bbh": HARNESS["bbh"],  # the official prompts
    "drop": f"Passage: The Reds had 3 goals, the Blues 2.\n\n{CALCULATE}\n"
    "Q: What of 3?\nA: The answer type is spans. So according to above Passage, the answer is",
    "gsm8k": "Q: Bo eats 10.\nA: Let's think step by step. He eats 10. So 10. The answer is 10.\n\n"
    "Q: Ann has 3 pens and buys 3. How many?\nA: Let's think step by step.",
    "hellaswag": "Juggling: A man has 20 balls.. He throws. He while the band plays.\n\n"
    "Juggling: A man has 0 balls.. He throws. He",
    "math": HARNESS["math"],
    "mmlu": HARNESS["mmlu"],
    "piqa": "Open jar 0.",
    "triviaqa": "Answer these questions:\nQ: Which town is number 3?\nA: Town 3\nQ: Which town is number 1?\nA:",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("eval"))


def prompt(folder, name, style, shots, row=0):
    task, style = TASKS[name], TASKS[name].style(style)
    rows, examples, _ = read_task(folder, name, style, shots)
    return prompts(task, style, rows, [row], examples, shots, lambda row: 10**6, BYTES, "here")[0].text


@pytest.mark.parametrize("name", TASKS)
def test_harness_prompts(folder, name):
    assert prompt(folder, name, "harness", min(2, TASKS[name].shots)) == HARNESS[name]


@pytest.mark.parametrize("name", TASKS)
def test_deepseek_prompts(folder, name):
    shots = {"bbh": 2, "math": 2, "mmlu": 2}.get(name, min(1, TASKS[name].shots))
    assert prompt(folder, name, "deepseek", shots) == DEEPSEEK[name]


def test_examples_belong_to_the_subject(folder):
    other = prompt(folder, "mmlu", "harness", 1, row=2)
    assert other.startswith("The following are multiple choice questions (with answers) about more.\n\nWhat is 5")
    assert "long_words" in prompt(folder, "bbh", "harness", 3, row=2)
    assert "odd_sums" not in prompt(folder, "bbh", "harness", 3, row=2)


def test_bbh_keeps_an_official_prompt_that_differs(tmp_path):
    lines = [{"task": "t", "prompt": "Tell.\n\nQ: a\nA: Let's think step by step. It is. So the answer is b."}]
    rows = [{"task": "t", "input": "c", "target": "d"}]
    folder = write_files(tmp_path, {"bbh/test": rows, "bbh/cot_prompts": lines})
    assert prompt(folder, "bbh", "deepseek", 1).startswith(lines[0]["prompt"] + "\n\nQ: c\n")
    assert "step.\nIt is." in prompt(folder, "bbh", "harness", 1)  # the harness has a line break everywhere


def test_choices_and_golds(folder):
    row = FILES["hellaswag/val"][1]
    assert TASKS["hellaswag"].harness.choices(row)[1] == " Then runs away."  # stripped before the bracket goes
    assert TASKS["hellaswag"].style("deepseek") is TASKS["hellaswag"].harness  # published: '... at a piano. He'
    assert TASKS["arc_easy"].harness.choices(FILES["arc_easy/test"][0])[1] == "Air"
    assert [TASKS["arc_easy"].gold(r) for r in FILES["arc_easy/test"]] == [1, 3, 4]  # by letters and by numbers
    assert TASKS["blimp"].harness.choices(FILES["blimp/test"][0]) == ["Some cats sleep.", "Some cats sleeps."]
    assert TASKS["lambada"].harness.choices(FILES["lambada/test"][0]) == ["bones"]
    assert [TASKS["mmlu"].gold(r) for r in FILES["mmlu/test"]] == [0, 3, 1]
    assert TASKS["piqa"].harness.target(FILES["piqa/valid"][1]) == "Hit the lid with a spoon."


def test_drop_golds_of_every_layout():
    nested = drop(5, ["Reds", "Blues"])
    assert drop_golds(nested) == [("Reds", "Blues")]
    day = {"number": "", "date": {"day": "4", "month": "July", "year": ""}, "spans": []}
    assert drop_golds(nested | {"validated_answers": [day, nested["answer"]]}) == [("Reds", "Blues"), ("4 July",)]
    columns = {"number": ["7", ""], "date": [{}, {}], "spans": [[], ["x"]]}
    assert drop_golds(nested | {"validated_answers": columns}) == [("Reds", "Blues"), ("7",), ("x",)]
    assert drop_golds({"answers": [["a", "b"], ["c"]]}) == [("a", "b"), ("c",)]


def test_deepseeks_drop_examples_share_the_passage(tmp_path):
    """Its own passage once; the other questions on it, never the row itself; the type before each answer."""
    day = {"number": "", "date": {"day": "4", "month": "July", "year": ""}, "spans": []}
    two = drop(3, ["the Reds", "the Blues"]) | {"question": "Who?"}
    when = drop(3, []) | {"answer": day, "question": "When?"}
    rows = [drop(3, [], "54.6"), drop(9, [], "1"), two, when]
    folder = write_files(tmp_path, {"drop/dev": rows})  # no file of examples is read
    asked, answer = "A: The answer type is {}. So according to above Passage, the answer is", " 54.6.\n\n"
    assert prompt(folder, "drop", "deepseek", 3, row=2) == (
        f"Passage: The Reds had 3 goals, the Blues 2.\n\n{CALCULATE}\n"
        f"Q: What of 3?\n{asked.format('number')}{answer}Q: When?\n{asked.format('date')} 4 July.\n\n"
        f"Q: Who?\n{asked.format('spans')}"
    )
    assert f"Q: Who?\n{asked.format('spans')} the Reds, the Blues.\n\n" in prompt(folder, "drop", "deepseek", 2, row=3)
    assert prompt(folder, "drop", "deepseek", 3, row=1).count("Q: ") == 1  # alone on its passage


def test_guessing():
    task, row = TASKS["bbh"].harness, FILES["bbh/test"][0]
    assert guess(task, row) == 1 / 2
    assert guess(task, row | {"input": "Pick.\n(A) x\n(B) y\n(C) z (D) no"}) == 1 / 3
    assert guess(task, {"input": "True and?", "target": "True"}) == 1 / 2
    assert guess(task, {"input": "Sort.", "target": "a b"}) == 0
    for name, wanted in (("piqa/valid", 1 / 2), ("gsm8k/test", 0), ("arc_easy/test", 1 / 4), ("lambada/test", 0)):
        assert guess(TASKS[name.split("/")[0]].harness, FILES[name][0]) == wanted


def test_missing_files_name_the_command(tmp_path):
    command = "python prepare_data.py --dataset=eval --tasks=gsm8k --eval_dir=/"
    with pytest.raises(TaskError, match=f"test.jsonl; to fetch it: {command}"):
        read_task(str(tmp_path), "gsm8k", TASKS["gsm8k"].harness, 8)
    folder = write_files(tmp_path, {"gsm8k/test": FILES["gsm8k/test"]})
    assert read_task(folder, "gsm8k", TASKS["gsm8k"].harness, 0)[1] == []  # no examples wanted, none needed
    with pytest.raises(TaskError, match="gsm8k/train.jsonl"):
        read_task(folder, "gsm8k", TASKS["gsm8k"].harness, 8)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"goal": 1', "valid.jsonl:1: not JSON"),
        ("7", "valid.jsonl:1: wanted an object, got 7"),
        ('{"goal": "x"}', "valid.jsonl:1: no 'sol1': wanted goal, sol1, sol2, label"),
        ('{"goal": "x", "sol1": "", "sol2": 3, "label": 0}', "valid.jsonl:1: sol2: wanted a string, got 3"),
        ('{"goal": "x", "sol1": "", "sol2": "", "label": 2}', 'label: wanted "0" or "1", got 2'),
        ("[" * 100_000, "nested too deeply"),
        ('"' + "x" * (17 << 20), "too large: wanted at most 16777216 bytes in a line"),
        ("", "has no rows"),
    ],
    ids=lambda text: text[:20],
)
def test_damaged_files(tmp_path, text, message):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "valid.jsonl").write_text(text)
    with pytest.raises(TaskError, match=re.escape(message)) as e:
        read_task(str(tmp_path), "piqa", TASKS["piqa"].harness, 0)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("mmlu/test", {"answer": "B"}, "answer: wanted a whole number from 0 to 3, got 'B'"),  # the official letters
        ("mmlu/test", {"choices": ["a"]}, "choices: wanted a list of 4, got ['a']"),
        ("hellaswag/val", {"label": ""}, "label: wanted"),
        ("triviaqa/validation", {"answer": {"value": "x"}}, "answer: no 'aliases'"),
        ("drop/dev", {"answer": None}, "answer: wanted an object, got None"),
        ("bbh/test", {"target": 1}, "target: wanted a string, got 1"),
        ("arc_easy/test", {"question": {"stem": "x", "choices": [{"text": "a"}]}}, "question.choices[0]: no 'label'"),
        ("blimp/test", {"sentence_bad": ""}, "sentence_bad: wanted a string with text, got ''"),
    ],
)
def test_rows_of_another_form_are_refused_with_their_line(tmp_path, name, change, message):
    task, rows = name.split("/")[0], FILES[name]
    folder = write_files(tmp_path, {name: [rows[0], rows[1] | change]})
    with pytest.raises(TaskError, match=re.escape(f".jsonl:2: {message}")):
        read_task(folder, task, TASKS[task].harness, 0)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("math/test", {"solution": None}, "neither an answer nor"),
        (
            "math/test",
            {"solution": f"$\\boxed{{{'9' * 1001}}}$"},
            "wanted an answer of at most 1000 characters, got 1001",
        ),
        ("gsm8k/test", {"answer": "6"}, "ends in '#### ' and a number, got '6'"),
        ("hellaswag/val", {"label": 3, "endings": ["a", "b"]}, "wanted the number of one of 2 choices, got 3"),
        ("arc_easy/test", {"answerKey": "Z"}, "'Z' is not in list"),
    ],
)
def test_rows_that_could_not_be_scored_are_found_before_anything_runs(name, change, message):
    task, row = TASKS[name.split("/")[0]], FILES[name][0]

    def ask(row):
        return prompts(task, task.harness, [row], [0], [], 0, lambda row: 999, BYTES, name)[0].text

    with pytest.raises(TaskError, match=message) as e:
        ask(row | change)
    assert str(e.value).startswith(f"{name}: a row or its examples cannot be used: ")
    assert ask(row) == context(task.harness, row, [])


def test_examples_in_another_form(tmp_path):
    folder = write_files(tmp_path, FILES | {"math/fewshot": [{"problem": "p"}], "bbh/cot_prompts": [
        {"task": "odd_sums", "prompt": "Say.\n\nQ: x\nA: no steps"}]})  # fmt: skip
    with pytest.raises(TaskError, match="fewshot.jsonl:1: no 'solution'"):
        read_task(folder, "math", TASKS["math"].harness, 4)
    with pytest.raises(TaskError, match="cot_prompts.jsonl: not in the official form"):
        read_task(folder, "bbh", TASKS["bbh"].harness, 3)
    task, row, example = TASKS["gsm8k"], FILES["gsm8k/test"][0], {"question": "q", "answer": "no number"}
    with pytest.raises(TaskError, match="here: .* not enough values to unpack"):
        prompts(task, task.deepseek, [row], [0], [example], 1, lambda row: 999, BYTES, "here")
    with pytest.raises(TaskError, match="prepare_data.py does not fetch it: put it there, or set --shots=0"):
        read_task(folder, "piqa", TASKS["piqa"].harness, 5)
    with pytest.raises(TaskError, match="LAMBADA: has no examples to show: wanted --shots=0, got 5"):
        read_task(folder, "lambada", TASKS["lambada"].harness, 5)


def test_triviaqa_takes_human_answers():
    row = FILES["triviaqa/validation"][1]
    row = row | {"answer": row["answer"] | {"human_answers": ["Den Haag"]}}
    assert TASKS["triviaqa"].deepseek.score("den haag", row) == {"em": 1.0}


def test_too_few_examples(folder):
    with pytest.raises(TaskError, match="MMLU: wanted 6 examples of subject 'sums_of_two', got 5; set --shots=5"):
        prompt(folder, "mmlu", "harness", 6)
