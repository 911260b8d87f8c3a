"""lm-evaluation-harness on a checkpoint: a task of choices and one of generation, from invented items."""

import json

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13")

from lm_eval.tasks import TaskManager  # noqa: E402

from evals import harness  # noqa: E402
from evals.generate import generate  # noqa: E402
from evals.rows import TaskError  # noqa: E402
from evals.score import Runner, encode_pair, loglikelihoods  # noqa: E402
from tests.eval_items import BYTES, tiny  # noqa: E402

CHOICE = """
task: jars
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/jars.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_choice: "{{[sol1, sol2]}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATION = """
task: towns
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/towns.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["never there", STOP], do_sample: false, max_gen_toks: 20}
metric_list: [{metric: exact_match}]
"""
JARS = [{"goal": f"Open jar {i}.", "sol1": "Turn it.", "sol2": "Hit with spoons.", "label": i % 2} for i in range(6)]


@pytest.fixture(scope="module")
def model():
    return tiny("mhc", seq_len=256)


def test_choices_and_generation_are_ours(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [f"Which town is {i}?" for i in range(3)]
    whole = generate(Runner(model), BYTES, [f"Q: {q}\nA:" for q in questions], None, (), 20)
    stop = next(c for c in whole[1][1:] if c.isascii() and c.isprintable())  # one that is met
    said = [text.split(stop)[0] for text in whole]
    towns = [{"q": q, "a": text if i else "no"} for i, (q, text) in enumerate(zip(questions, said, strict=True))]
    for name, rows, task in (("jars", JARS, CHOICE), ("towns", towns, GENERATION)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(task.replace("FOLDER", str(tmp_path)).replace("STOP", json.dumps(stop)))
    found = lm_eval.simple_evaluate(
        model=harness.Checkpoint(model=model, encoding=BYTES), tasks=["jars", "towns"], num_fewshot=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    assert found["results"]["towns"]["exact_match,none"] == pytest.approx(2 / 3)  # of the three, the first is wrong
    for sample, row in zip(found["samples"]["jars"], JARS, strict=True):
        assert sample["doc"]["goal"] == row["goal"]
        item = [encode_pair(BYTES, f"Question: {row['goal']}\nAnswer:", f" {row[k]}") for k in ("sol1", "sol2")]
        whole = loglikelihoods(Runner(model), [item], share=False)[0]
        assert [lp for lp, _ in sample["filtered_resps"]] == pytest.approx([lp for lp, _ in whole], abs=1e-4)


def test_unknown_tasks_end_with_one_line(capsys):
    with pytest.raises(SystemExit) as e:
        harness.run([], ["arc_eazy"], {}, ".", True)
    said = capsys.readouterr().err
    assert e.value.code == 2 and "lm_eval: lm-evaluation-harness has no task 'arc_eazy'" in said


def test_without_a_network_there_is_one_line(model, tmp_path, monkeypatch):
    """Whatever datasets, the hub and requests raise: program.py makes a line of TaskError."""

    def unreachable(manager, names):
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr(TaskManager, "load", unreachable)
    ours = harness.Checkpoint(model=model, encoding=BYTES)
    monkeypatch.setattr(harness, "Checkpoint", lambda checkpoint, **s: ours)
    s = {
        "device": "cpu",
        "dtype": "float32",
        "batch_tokens": 9,
        "max_length": 0,
        "data_dir": "",
        "limit": 1,
        "shots": 0,
    }
    with pytest.raises(
        TaskError, match=r"piqa could not be loaded \(ConnectionError: Couldn't reach 'baber/piqa'"
    ) as e:
        harness.run(["run"], ["piqa"], s, str(tmp_path), True)
    assert "\n" not in str(e.value)
