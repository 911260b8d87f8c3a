"""Prompts character by character, examples, files that are missing or damaged."""

import pytest

from evals.tasks import TASKS, TaskError, ask, context, drop_golds, guess, read_task, shown
from tests.eval_items import FILES, drop, write_files

HARNESS = {
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
DEEPSEEK = {
    "bbh": HARNESS["bbh"],  # the official prompts
    "drop": f"Passage: The Reds had 6 goals, the Blues 2.\n\n{CALCULATE}\nQ: What of 6?\n"
    f"A: The answer type is number. So according to above Passage, the answer is 6.\n\n"
    f"Passage: The Reds had 3 goals, the Blues 2.\n\n{CALCULATE}\n"
    "Q: What of 3?\nA:",
    "gsm8k": "Q: Bo eats 10.\nA: Let's think step by step. He eats 10. So 10. The answer is 10.\n\n"
    "Q: Ann has 3 pens and buys 3. How many?\nA: Let's think step by step.",
    "hellaswag": "Juggling: A man has 20 balls. [title] He throws. he while the band plays.\n\n"
    "Juggling: A man has 0 balls. [title] He throws. he",
    "math": HARNESS["math"],
    "mmlu": HARNESS["mmlu"],
    "piqa": "Open jar 0.",
    "triviaqa": "Answer these questions:\nQ: Which town is number 3?\nA: Town 3\nQ: Which town is number 1?\nA:",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("eval"))


def prompt(folder, name, style, shots, row=0):
    rows, examples, _ = read_task(folder, name, shots)
    return context(getattr(TASKS[name], style), rows[row], shown(TASKS[name], examples, rows[row], shots))


@pytest.mark.parametrize("name", TASKS)
def test_harness_prompts(folder, name):
    assert prompt(folder, name, "harness", min(2, TASKS[name].shots)) == HARNESS[name]


@pytest.mark.parametrize("name", TASKS)
def test_deepseek_prompts(folder, name):
    shots = {"bbh": 2, "math": 2, "mmlu": 2, "piqa": 0}.get(name, 1)
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
    assert TASKS["hellaswag"].deepseek.choices(row) is row["endings"]
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
    dated = TASKS["drop"].deepseek.target({"answer": day, "validated_answers": []})
    assert dated == "The answer type is date. So according to above Passage, the answer is 4 July."


def test_guessing():
    task, row = TASKS["bbh"], FILES["bbh/test"][0]
    assert guess(task, row) == 1 / 2
    assert guess(task, row | {"input": "Pick.\n(A) x\n(B) y\n(C) z (D) no"}) == 1 / 3
    assert guess(task, {"input": "True and?", "target": "True"}) == 1 / 2
    assert guess(task, {"input": "Sort.", "target": "a b"}) == 0
    assert guess(TASKS["piqa"], FILES["piqa/valid"][0]) == 1 / 2 and guess(TASKS["gsm8k"], FILES["gsm8k/test"][0]) == 0


def test_missing_files_name_the_command(tmp_path):
    command = "python prepare_data.py --dataset=eval --tasks=gsm8k --eval_dir=/"
    with pytest.raises(TaskError, match=f"test.jsonl; to fetch it: {command}"):
        read_task(str(tmp_path), "gsm8k", 8)
    folder = write_files(tmp_path, {"gsm8k/test": FILES["gsm8k/test"]})
    assert read_task(folder, "gsm8k", 0)[1] == []  # no examples wanted, none needed
    with pytest.raises(TaskError, match="gsm8k/train.jsonl"):
        read_task(folder, "gsm8k", 8)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"goal": 1', "line 1: not JSON"),
        ("7", "line 1: no field goal, sol1"),
        ('{"goal": "x"}', "line 1: no field sol1, sol2, label"),
        ("", "has no rows"),
    ],
)
def test_damaged_files(tmp_path, text, message):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "valid.jsonl").write_text(text)
    with pytest.raises(TaskError, match=message):
        read_task(str(tmp_path), "piqa", 0)


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("mmlu/test", {"answer": "B"}, "wanted the number of one of 4 choices, got 'B'"),  # the official letters
        ("piqa/valid", {"label": 2}, "wanted the number of one of 2 choices, got 2"),
        ("hellaswag/val", {"label": ""}, "invalid literal for int"),
        ("math/test", {"solution": None}, "neither an answer nor"),
        ("gsm8k/test", {"answer": "6"}, "ends in '#### ' and a number, got '6'"),
        ("triviaqa/validation", {"answer": {"value": "x"}}, "no 'aliases'"),
        ("drop/dev", {"answer": None}, "not subscriptable"),
        ("bbh/test", {"target": 1}, "no attribute 'lower'"),
    ],
)
def test_rows_that_could_not_be_scored_are_found_before_anything_runs(name, row, message):
    task = TASKS[name.split("/")[0]]
    with pytest.raises(TaskError, match=message) as e:
        ask(task, task.harness, FILES[name][0] | row, [], 0, name)
    assert str(e.value).startswith(f"{name}: a row or its examples cannot be used: ")
    assert ask(task, task.harness, FILES[name][0], [], 0, name) == context(task.harness, FILES[name][0], [])


def test_examples_in_another_form(tmp_path):
    folder = write_files(tmp_path, FILES | {"math/fewshot": [{"problem": "p"}], "bbh/cot_prompts": [
        {"task": "odd_sums", "prompt": "Say.\n\nQ: x\nA: no steps"}]})  # fmt: skip
    with pytest.raises(TaskError, match="fewshot.jsonl, line 1: no field solution"):
        read_task(folder, "math", 4)
    with pytest.raises(TaskError, match="cot_prompts.jsonl: not in the official form"):
        read_task(folder, "bbh", 3)
    task, row, example = TASKS["gsm8k"], FILES["gsm8k/test"][0], {"question": "q", "answer": "no number"}
    with pytest.raises(TaskError, match="here: .* not enough values to unpack"):
        ask(task, task.deepseek, row, [example], 1, "here")
    with pytest.raises(TaskError, match="prepare_data.py does not fetch it: put it there, or set --shots=0"):
        read_task(folder, "piqa", 5)


def test_triviaqa_takes_human_answers():
    row = FILES["triviaqa/validation"][1]
    row = row | {"answer": row["answer"] | {"human_answers": ["Den Haag"]}}
    assert TASKS["triviaqa"].deepseek.score("den haag", row) == {"em": 1.0}


def test_too_few_examples(folder):
    with pytest.raises(TaskError, match="MMLU: wanted 6 examples of subject 'sums_of_two', got 5; set --shots=5"):
        prompt(folder, "mmlu", "harness", 6)
