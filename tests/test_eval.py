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
from evals import measure, report
from evals.prompts import Prompt
from evals.rows import TaskError
from evals.score import Runner
from evals.tasks import TASKS
from tests.eval_items import BYTES, FILES, rigged, right_answer, tiny, write_files

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("eval"))


def wrong_answer(name, row, style):
    if style.choices:
        choices = style.choices(row)
        return choices[TASKS[name].gold(row) - 1] if len(choices) > 1 else "zebra"
    return right_answer(name, row, style).translate(str.maketrans("0123456789ABRST", "1234567890CDXYZ"))


def scored(folder, name, style, model, **changes):
    s = {"style": style, "shots": TASKS[name].shots, "limit": 0, "eval_dir": folder, "batch_tokens": 20000,
         "max_length": 0, "save_predictions": False, "save_prompts": False} | changes  # fmt: skip
    given = measure.read(name, s, {}, model.config, BYTES)
    return measure.measure(Runner(model, max_length=s["max_length"]), BYTES, name, given, s)


@pytest.mark.parametrize("style", ["harness", "deepseek"])
@pytest.mark.parametrize("name", TASKS)
def test_a_model_rigged_right_scores_all_and_one_rigged_wrong_nothing(folder, name, style):
    record = scored(folder, name, style, rigged(folder, name, style))
    first = TASKS[name].style(style).metrics[0]
    if name == "drop":  # one of two spans was named in the last row
        assert record["scores"] == {"f1": [1.0, 1.0, 0.5], "em": [1.0, 1.0, 0.0]}
    else:
        assert record["scores"][first] == [1.0] * record["n"]
    groups = record.get("groups", {})
    assert sum(g["n"] for g in groups.values()) == (record["n"] if TASKS[name].group else 0)
    assert all(g[first] == 1.0 for g in groups.values())
    assert record["partial"] and record["official"] == TASKS[name].sizes[0] and record["truncated"] == 0
    record = scored(folder, name, style, rigged(folder, name, style, wrong_answer))
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
    words = ("--resamples=200", "--save_predictions=true", "--save_prompts=true")
    said = command("baseline", "mhc", "--tasks=all,small", *words, "--out_dir=all")
    found = results(runs / "all")
    assert len(found["records"]) == 2 * 12
    assert all(set(r["made_with"]) >= {"torch", "python", "commit", "numpy"} for r in found["records"])
    loss = by_task(found)["mhc/step-00000020", "loss"]
    assert loss["metrics"]["loss"]["value"] == pytest.approx(np.mean(loss["scores"]["loss"])) and not loss["partial"]
    ratio = loss["metrics"]["bits_per_byte"]["value"] / loss["metrics"]["loss"]["value"]
    corpus = json.loads((runs / "data" / "meta.json").read_text())
    assert ratio == pytest.approx(1 / np.log(2) / corpus["splits"]["val"]["bytes_per_token"])
    piqa = by_task(found)["mhc/step-00000020", "piqa"]
    assert [len(p) for p in piqa["predictions"]] == [2] * 4 and piqa["random"]["acc"] == 0.5
    assert len(piqa["files"]["valid.jsonl"]["sha256"]) == 64 and piqa["files"]["valid.jsonl"]["rows"] == 4
    assert piqa["prompts"][1] == {"prompt": "Question: Open jar 1.\nAnswer:",
                                  "choices": [" Turn the lid.", " Hit the lid with a spoon."]}  # fmt: skip
    assert set(by_task(found)["mhc/step-00000020", "mmlu"]["groups"]) == {"sums_of_two", "more"}
    for words in ("4 of 1838 (partial)", "78.5  79.9  80.5", "PIQA acc: mhc 20 minus baseline 20", " of 8  strict",
                  "stock lm_eval draws them", "Holm's correction for these 19 comparisons"):  # fmt: skip
        assert words in said
    assert len(found["comparisons"]) == sum(len(r["metrics"]) for r in found["records"]) // 2
    assert not list((runs / "all").glob("*.tmp"))


def test_loss_is_the_models_own(command, runs):
    command("mhc", "--tasks=loss", "--limit=3", "--out_dir=loss", "--batch_tokens=600")
    record = results(runs / "loss")["records"][0]
    model, _ = checkpoint.load_model(str(runs / "mhc"))
    x, y = measure.Corpus(str(runs / "data"), "val", 256).sequences([0, 1, 2])
    whole = [float(model(a[None], b[None])[1]) for a, b in zip(x, y, strict=True)]
    assert record["scores"]["loss"] == pytest.approx(whole)
    assert record["partial"] and record["n"] == 3


def test_a_second_call_keeps_what_is_there(command, runs, monkeypatch):
    command("mhc", "--tasks=piqa,triviaqa", "--out_dir=again")
    first = results(runs / "again")["records"]
    monkeypatch.setattr(evaluation, "measure", lambda *args: pytest.fail("scored again"))
    assert "kept from" in command("mhc", "--tasks=triviaqa,piqa", "--out_dir=again")
    assert sorted(map(str, results(runs / "again")["records"])) == sorted(map(str, first))
    for change in ("--shots=2", "--fresh=True", "--save_predictions=True", "--save_prompts=True", "--style=deepseek",
                   "--max_length=99"):  # fmt: skip
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


def test_missing_tasks_are_named_last_and_do_not_stop_others(command, runs, tmp_path, capsys):
    only = write_files(tmp_path, {"piqa/valid": FILES["piqa/valid"]})
    with pytest.raises(TaskError, match=r"not scored: gsm8k, mmlu \(see above\)"):  # program.py makes it exit code 1
        command("mhc", "--tasks=gsm8k,piqa,mmlu", f"--eval_dir={only}", "--out_dir=missing")
    said = capsys.readouterr().out
    assert "python prepare_data.py --dataset=eval --tasks=gsm8k" in said and "missing: mmlu" in said and "PIQA" in said
    assert [r["task"] for r in results(runs / "missing")["records"]] == ["piqa"]


def test_what_small_models_are_asked(command, runs):
    said = command("mhc", "--out_dir=small")
    records = {r["task"]: r for r in results(runs / "small")["records"]}
    assert list(records) == ["loss", "hellaswag", "piqa", "blimp", "lambada", "arc_easy"]
    assert records["hellaswag"]["shots"] == 0 and "HellaSwag       0" in said
    nats = records["lambada"]["scores"]["perplexity"]
    assert records["lambada"]["metrics"]["perplexity"]["value"] == pytest.approx(np.exp(np.mean(nats)))
    assert records["arc_easy"]["random"]["acc"] == pytest.approx((1 / 4 + 1 / 4 + 1 / 5) / 3)


def test_a_diverged_checkpoint_is_refused_and_the_others_are_scored(command, runs, capsys):
    model = tiny("mhc", 3, seq_len=256)
    model.norm.weight[0] = torch.nan
    settings = asdict(model.config) | {"data_dir": f"{runs}/data"}
    checkpoint.save(runs / "diverged", 30, model, torch.optim.AdamW(model.parameters()), {}, settings)
    with pytest.raises(TaskError, match="not scored: diverged/step-00000030"):
        command("diverged", "mhc", "--tasks=piqa,triviaqa", "--out_dir=nan")
    assert "diverged/step-00000030: norm.weight holds what is no number: take a" in capsys.readouterr().out
    with pytest.raises(checkpoint.CheckpointError, match="holds what is no number"):
        command("diverged", "--tasks=piqa", "--out_dir=nan")
    assert [r["checkpoint"] for r in results(runs / "nan")["records"]] == ["mhc/step-00000020"] * 2


def test_prompts_lose_whole_examples_and_say_how_many_are_left(folder, tmp_path):
    """256 bytes hold two or three examples of GSM8K's 8, none of them in halves."""
    rows, model = FILES["gsm8k/test"], tiny(seq_len=256)
    s = {"style": "harness", "shots": 8, "limit": 0, "eval_dir": folder, "max_length": 256}
    given = measure.read("gsm8k", s, {}, model.config, BYTES)
    for row, prompt in zip(rows, given["prompts"], strict=True):
        assert 0 < prompt.shots < 8 and prompt.text.count("####") == prompt.shots
        assert prompt.text.startswith("Question: Bo eats 10.") and prompt.text.endswith(f"{row['question']}\nAnswer:")
        assert (
            len(prompt.text)
            <= 128
            < len(prompt.text) + len("Question: Bo eats 10.\nAnswer: He eats 10.\nSo 10.\n#### 10\n\n")
        )
    given["prompts"] = [Prompt(p.text, k, p.chance) for p, k in zip(given["prompts"], (1, 2, 0), strict=True)]
    record = measure.measure(Runner(model), BYTES, "gsm8k", given, s | {"batch_tokens": 9999, "save_predictions": False,
                                                                       "save_prompts": False})  # fmt: skip
    assert record["shown"] == 1.0 and record["truncated"] == 0
    assert (
        report.shots_shown(record | {"shots": 8}) == "1 of 8" and report.shots_shown({"shown": 8.0, "shots": 8}) == "8"
    )
    longest = scored(folder, "hellaswag", "harness", tiny(seq_len=60))
    assert longest["shown"] == 0 and longest["truncated"] == 5  # not even the question and an ending


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("mhc", "--tasks=piqa,hellaswg"), "unknown task 'hellaswg': wanted all, small, or a list out of loss, bbh"),
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
                said, _ = process.communicate(timeout=300)
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
    with pytest.raises(TaskError):
        command("mhc", "--tasks=loss", "--data_dir=altered", "--out_dir=altered_eval")
    assert "val_000000.bin: altered since it was written" in capsys.readouterr().out


def test_one_item_proves_nothing_and_results_stay_json(command, runs):
    said = command("baseline", "mhc", "--tasks=piqa", "--limit=1", "--out_dir=single")
    text = (runs / "single" / "results.json").read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    acc = found["records"][0]["metrics"]["acc"]
    assert acc["high"] - acc["low"] == pytest.approx(0.7935, abs=1e-4)  # Wilson's interval of 1 of 1, or of 0 of 1
    assert found["comparisons"][0]["se"] is None and "1 of 1838 (partial) items" in said and "nan" not in said
    assert not any(line.endswith("items *") for line in said.splitlines())


def test_choices_that_do_not_fit_are_told(command):
    said = command("mhc", "--tasks=piqa", "--max_length=8", "--out_dir=short")
    assert "choices alone too long, cut too, to fit 8 tokens: mhc 20: PIQA 4 of 4" in said


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]", "wanted an object, got [1]"),
        ('{"records": [{"task": "piqa"}, 3]}', "records[0]: no 'checkpoint'"),
        ("{", "not JSON"),
        ('{"records": 5}', "records: wanted a list, got 5"),
        ('{"mine": 1}', "no 'records'"),
    ],
)
def test_a_results_file_that_is_not_ours_is_left_alone(command, runs, text, message, capsys):
    (runs / "strange").mkdir(exist_ok=True)
    (runs / "strange" / "results.json").write_text(text)
    with pytest.raises(SystemExit) as e:
        command("mhc", "--tasks=piqa", "--out_dir=strange")
    said = capsys.readouterr().err
    assert e.value.code == 2 and message in said and "move it away, or choose another --out_dir=" in said
    assert (runs / "strange" / "results.json").read_text() == text


def test_a_merge_that_leaves_a_choice_no_token_is_told(command, monkeypatch, capsys):
    def none_left(*pair):
        raise ValueError("the continuation ' x' has no tokens of its own")

    monkeypatch.setattr(measure.score, "encode_pair", none_left)
    with pytest.raises(TaskError):
        command("mhc", "--tasks=piqa", "--out_dir=merged")
    assert "missing: PIQA: the continuation ' x' has no tokens of its own; it cannot be" in capsys.readouterr().out


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert evaluation.versions()["commit"] is None
