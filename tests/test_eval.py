"""eval.py as a whole: rigged models score 100 % and 0 %, results.json, comparisons, processes, what is missing."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import checkpoint
import eval as evaluation
from evals import report
from evals.score import Runner
from evals.tasks import TASKS
from tests.eval_items import BYTES, FILES, rigged, right_answer, tiny, write_files

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("eval"))


def wrong_answer(name, row, style):
    if style.choices:
        return style.choices(row)[TASKS[name].gold(row) - 1]
    return right_answer(name, row, style).translate(str.maketrans("0123456789ABRST", "1234567890CDXYZ"))


def score(folder, name, style, model):
    s = {"style": style, "shots": TASKS[name].shots, "limit": 0, "eval_dir": folder, "batch_tokens": 20000,
         "save_predictions": False}  # fmt: skip
    return evaluation.task_record(Runner(model), BYTES, name, evaluation.read(name, s, {}, model.config), s)


@pytest.mark.parametrize("style", ["harness", "deepseek"])
@pytest.mark.parametrize("name", TASKS)
def test_a_model_rigged_right_scores_all_and_one_rigged_wrong_nothing(folder, name, style):
    record = score(folder, name, style, rigged(folder, name, style))
    first = getattr(TASKS[name], style).metrics[0]
    if name == "drop":  # one of two spans was named in the last row
        assert record["scores"] == {"f1": [1.0, 1.0, 0.5], "em": [1.0, 1.0, 0.0]}
    else:
        assert record["scores"][first] == [1.0] * record["n"]
    assert record["partial"] and record["official"] == TASKS[name].sizes[0] and record["truncated"] == 0
    record = score(folder, name, style, rigged(folder, name, style, wrong_answer))
    assert record["scores"][first] == [0.0] * record["n"]


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of two checkpoints each on a corpus of bytes; random weights."""
    root = tmp_path_factory.mktemp("runs")
    (root / "text.txt").write_text("\n\n".join(f"{i} times {j} is {i * j}." for i in range(30) for j in range(30)))
    subprocess.run([sys.executable, "prepare_data.py", f"--dataset={root}/text.txt", "--tokenizer=bytes",
                    f"--data_dir={root}/data", "--val_fraction=0.3"], check=True, capture_output=True)  # fmt: skip
    for residual, seed in (("baseline", 0), ("mhc", 1)):
        for step in (10, 20):
            model = tiny(residual, seed + step, seq_len=256)
            settings = asdict(model.config) | {"data_dir": f"{root}/data"}
            checkpoint.save(root / residual, step, model, torch.optim.AdamW(model.parameters()), {}, settings)
    return root


@pytest.fixture
def command(runs, folder, monkeypatch, capsys):
    """main() with these arguments -> what it printed; its settings are put back afterwards."""
    before = {k: v for k, v in vars(evaluation).items() if type(v) in (bool, int, float, str)}
    monkeypatch.chdir(runs)

    def run(*arguments):
        vars(evaluation).update(before)
        monkeypatch.setattr(sys, "argv", ["eval.py", f"--eval_dir={folder}", "--device=cpu", *arguments])
        evaluation.main()
        return capsys.readouterr().out

    yield run
    vars(evaluation).update(before)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def by_task(found):
    return {(r["checkpoint"], r["task"]): r for r in found["records"]}


def test_everything_on_two_runs(command, runs):
    said = command("baseline", "mhc", "--resamples=200", "--save_predictions=true", "--out_dir=all")
    found = results(runs / "all")
    assert len(found["records"]) == 2 * 9 and set(found["versions"]) >= {"torch", "python", "commit", "numpy"}
    loss = by_task(found)["mhc/step-00000020", "loss"]
    assert loss["metrics"]["loss"]["value"] == pytest.approx(np.mean(loss["scores"]["loss"])) and not loss["partial"]
    ratio = loss["metrics"]["bits_per_byte"]["value"] / loss["metrics"]["loss"]["value"]
    corpus = json.loads((runs / "data" / "meta.json").read_text())
    assert ratio == pytest.approx(1 / np.log(2) / corpus["splits"]["val"]["bytes_per_token"])
    piqa = by_task(found)["mhc/step-00000020", "piqa"]
    assert [len(p) for p in piqa["predictions"]] == [2] * 4 and piqa["random"]["acc"] == 0.5
    assert len(piqa["files"]["valid.jsonl"]["sha256"]) == 64 and piqa["files"]["valid.jsonl"]["rows"] == 4
    for words in ("4 of 1838 (partial)", "78.5  79.9  80.5", "PIQA acc: mhc 20 minus baseline 20", "cut on the left"):
        assert words in said
    assert len(found["comparisons"]) == sum(len(r["metrics"]) for r in found["records"]) // 2
    assert not list((runs / "all").glob("*.tmp"))


def test_loss_is_the_models_own(command, runs):
    command("mhc", "--tasks=loss", "--limit=3", "--out_dir=loss", "--batch_tokens=600")
    record = results(runs / "loss")["records"][0]
    model, _ = checkpoint.load_model(str(runs / "mhc"))
    x, y = evaluation.Corpus(str(runs / "data"), "val", 256).sequences([0, 1, 2])
    whole = [float(model(a[None], b[None])[1]) for a, b in zip(x, y, strict=True)]
    assert record["scores"]["loss"] == pytest.approx(whole)
    assert record["partial"] and record["n"] == 3


def test_a_second_call_keeps_what_is_there(command, runs, monkeypatch):
    command("mhc", "--tasks=piqa,triviaqa", "--out_dir=again")
    first = results(runs / "again")["records"]
    monkeypatch.setattr(evaluation, "task_record", lambda *args: pytest.fail("scored again"))
    assert "kept from" in command("mhc", "--tasks=triviaqa,piqa", "--out_dir=again")
    assert sorted(map(str, results(runs / "again")["records"])) == sorted(map(str, first))
    for change in ("--shots=2", "--fresh=True", "--save_predictions=True", "--style=deepseek", "--max_length=99"):
        with pytest.raises(pytest.fail.Exception, match="scored again"):
            command("mhc", "--tasks=triviaqa", "--out_dir=again", change)
    assert results(runs / "again")["records"] == first


def test_changed_data_are_scored_again(command, runs, tmp_path, monkeypatch):
    mine = write_files(tmp_path, {"piqa/valid": FILES["piqa/valid"]})
    command("mhc", "--tasks=piqa", "--out_dir=changed", f"--eval_dir={mine}")
    write_files(tmp_path, {"piqa/valid": FILES["piqa/valid"][:3]})
    said = command("mhc", "--tasks=piqa", "--out_dir=changed", f"--eval_dir={mine}")
    assert "kept from" not in said and [r["n"] for r in results(runs / "changed")["records"]] == [3]


def test_score_against_step(command, runs):
    said = command("mhc/step-00000020", "mhc/step-00000010", "--tasks=piqa,loss", "--out_dir=steps", "--resamples=50")
    assert "picture: " in said and "mhc 20 minus mhc 10" in said
    image = matplotlib.image.imread(runs / "steps" / "score_vs_step.png")
    assert image.shape[0] > 200 and image[..., :3].std() > 0.05


def test_missing_tasks_are_named_and_do_not_stop_others(command, runs, tmp_path, capsys):
    only = write_files(tmp_path, {"piqa/valid": FILES["piqa/valid"]})
    said = command("mhc", "--tasks=gsm8k,piqa,mmlu", f"--eval_dir={only}", "--out_dir=missing")
    assert "python prepare_data.py --dataset=eval --tasks=gsm8k" in said and "missing: mmlu" in said and "PIQA" in said
    with pytest.raises(SystemExit) as e:
        command("mhc", "--tasks=gsm8k", f"--eval_dir={only}", "--out_dir=missing")
    assert e.value.code and "nothing could be scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("mhc", "--tasks=piqa,hellaswg"), "unknown task 'hellaswg'"),
        ((), "no checkpoint given"),
        (("nowhere",), "nowhere: wanted a run folder"),
        (("mhc", "--style=openai"), "wanted one of 'harness', 'deepseek'"),
        (("mhc", "--lm_eval=arc_easy", "--tasks=piqa"), "--lm_eval= does not use tasks"),
        (("mhc", "--tasks=piqa", "--out_dir=text.txt/eval"), "text.txt/eval: the folder for results cannot be made"),
    ],
)
def test_mistakes_are_one_line(command, arguments, message, capsys):
    with pytest.raises(SystemExit) as e:
        command(*arguments)
    said = capsys.readouterr().err
    assert e.value.code == 2 and message in said and said.count("\n") == 1


def test_batch_size_changes_no_prediction(command, runs):
    command("mhc", "--tasks=all", "--out_dir=one", "--batch_tokens=1", "--save_predictions=True")
    command("mhc", "--tasks=all", "--out_dir=many", "--batch_tokens=8192", "--save_predictions=True")
    for a, b in zip(results(runs / "one")["records"], results(runs / "many")["records"], strict=True):
        for x, y in zip(a.get("predictions", []), b.get("predictions", []), strict=True):
            assert x == (pytest.approx(y, abs=1e-4) if isinstance(y, list) else y)
        for metric, scores in b["scores"].items():
            assert a["scores"][metric] == (pytest.approx(scores, abs=1e-5) if a["task"] == "loss" else scores)


def test_two_processes_of_torchrun_give_the_same_bits(folder, runs):
    """As the commands themselves: torchrun's variables, the process group, who prints and who writes."""
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for out, launcher in (("alone", ()), ("torchrun", two)):
        words = [sys.executable, *launcher, f"{ROOT}/eval.py", "mhc", f"--eval_dir={folder}", "--device=cpu",
                 "--tasks=loss,piqa,mmlu,triviaqa", "--save_predictions=True", "--batch_tokens=3000",
                 f"--out_dir={out}"]  # fmt: skip
        with subprocess.Popen(words, cwd=runs, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:  # fmt: skip
            try:
                said, _ = process.communicate(timeout=120)
            finally:
                process.terminate()  # torchrun takes its workers with it
        assert process.returncode == 0 and said.count("results: ") == 1, said
    one, two = (results(runs / out)["records"] for out in ("alone", "torchrun"))
    assert [r | {"seconds": 0} for r in one] == [r | {"seconds": 0} for r in two] and len(one) == 4


def test_altered_tokens_are_not_scored(command, runs, capsys):
    shutil.copytree(runs / "data", runs / "altered")
    path = runs / "altered" / "val_000000.bin"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit):
        command("mhc", "--tasks=loss", "--data_dir=altered", "--out_dir=altered_eval")
    assert "val_000000.bin: altered since it was written" in capsys.readouterr().out


def test_one_item_has_no_error_and_results_stay_json(command, runs):
    said = command("baseline", "mhc", "--tasks=piqa", "--limit=1", "--out_dir=single")
    text = (runs / "single" / "results.json").read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert found["records"][0]["metrics"]["acc"]["se"] is None and found["comparisons"][0]["se"] is None
    assert " ± -" in said and "1 of 1838 (partial) items" in said and "nan" not in said


def test_choices_that_do_not_fit_are_told(command):
    said = command("mhc", "--tasks=piqa", "--max_length=8", "--out_dir=short")
    assert "choices alone too long, cut too, to fit 8 tokens: mhc 20: PIQA 4 of 4" in said


@pytest.mark.parametrize("text", ["[1]", '{"records": [{"task": "piqa"}, 3]}', "{", '{"records": 5}'])
def test_damaged_results_are_told_and_scored_again(command, runs, text):
    (runs / "damaged").mkdir(exist_ok=True)
    (runs / "damaged" / "results.json").write_text(text)
    assert "is damaged or from another version" in command("mhc", "--tasks=piqa", "--out_dir=damaged")
    assert len(results(runs / "damaged")["records"]) == 1


def test_a_merge_that_leaves_a_choice_no_token_is_told(command, monkeypatch, capsys):
    def none_left(*pair):
        raise ValueError("the continuation ' x' has no tokens of its own")

    monkeypatch.setattr(evaluation.score, "encode_pair", none_left)
    with pytest.raises(SystemExit):
        command("mhc", "--tasks=piqa", "--out_dir=merged")
    assert "missing: PIQA: the continuation ' x' has no tokens of its own; it cannot be" in capsys.readouterr().out


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert evaluation.versions()["commit"] is None


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def test_standard_error_and_paired_comparison_by_hand():
    assert report.mean_and_error([0, 1, 1, 0]) == pytest.approx((0.5, (1 / 12) ** 0.5))
    a, b = [1, 0, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0]
    got = report.paired(a, b, seed=3, resamples=4000)
    assert got["difference"] == pytest.approx(1 / 3)
    assert got["se"] == pytest.approx(np.std([0, 1, 0, 0, 1, 0], ddof=1) / 6**0.5)
    assert got["low"] == 0.0 and got["high"] == pytest.approx(2 / 3)  # of Binomial(6, 1/3) / 6
    assert got == report.paired(a, b, seed=3, resamples=4000) != report.paired(a, b, seed=3, resamples=999)
    with pytest.raises(ValueError, match="the same items: got 6 and 5"):
        report.paired(a, b[:5])


def test_unlike_items_are_not_compared():
    def record(run, task="loss", sha="a", seq_len=8, scores=(1.0, 2.0)):
        return {"checkpoint": run, "run": run, "step": 1, "task": task, "files": {"val": sha}, "seq_len": seq_len,
                "n": len(scores), "official": 5, "partial": True, "scores": {"loss": list(scores)}}  # fmt: skip

    first = record("a")
    for other in (record("b", sha="b"), record("b", seq_len=9), record("b", scores=[1.0])):
        pairs, unlike = report.comparisons([first, other], 0, 50)
        assert not pairs and len(unlike) == 1 and "validation: a and b are not compared" in unlike[0]
    pairs, unlike = report.comparisons([first, record("b")], 0, 50)
    assert len(pairs) == 1 and not unlike
    assert "2 of 5 (partial) items" in report.comparison_lines(pairs, {"a": "a", "b": "b"})[0]


def test_the_table_shows_what_differs_between_checkpoints():
    def record(run, n, random):
        return {"checkpoint": run, "task": "piqa", "shots": 0, "n": n, "official": 9, "partial": n < 9,
                "metrics": {"acc": {"value": 0.5, "se": None}}, "random": {"acc": random}}  # fmt: skip

    line = report.table([record("a", 3, 0.5), record("b", 9, 0.25)], {"a": "a", "b": "b"})[2]
    assert "3 of 9 (partial), 9" in line and "50.0, 25.0" in line


def test_bootstrap_agrees_with_the_normal_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=3000), rng.normal(0.1, 1, size=3000)
    got = report.paired(a, b, seed=1, resamples=20_000)
    for key, sign in (("low", -1), ("high", 1)):
        assert (got[key] - got["difference"]) / got["se"] == pytest.approx(sign * 1.96, abs=0.05)


def test_limits_take_every_subject():
    rows = [{"subject": s, "i": i} for s in "ab" for i in range(3)] + [{"subject": "c", "i": 0}]
    taken = evaluation.first_rows(rows, "subject", 4)
    assert [(r["subject"], r["i"]) for r in taken] == [("a", 0), ("a", 1), ("b", 0), ("c", 0)]
    assert evaluation.first_rows(rows, None, 2) == rows[:2] and evaluation.first_rows(rows, "subject", 0) == rows
