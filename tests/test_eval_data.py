"""evals/fetch.py: official files of every form, made small here, fetched from a local server and converted."""

import csv
import io
import json
import os
import tarfile
import time
import zipfile

import pytest

import download as dl
from data import DataError
from evals import fetch
from evals.fetch import prepare_eval
from owned import NotOurs
from tests.http_server import broken, serving, status

GITHUB = "/raw.githubusercontent.com"
ENDINGS = ["melts.", "sings.", "rolls on.", "is a loaf."]


def table(rows):
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode()


def packed(mode, members):
    """A tar archive of {name: bytes}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zipped(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(tmp_path, task, split):
    with open(tmp_path / "eval" / task / f"{split}.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(dl, "BACKOFF", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as s:
        yield s


def run(server, tmp_path, *tasks):
    prepare_eval(str(tmp_path / "eval"), str(tmp_path / "download"), list(tasks), mirror=server.url)


def test_bbh(server, tmp_path):
    for i, task in enumerate(fetch.BBH_TASKS):
        rows = {"canary": "c", "examples": [{"input": f"{task} {j}?", "target": f"({'AB'[j]})"} for j in range(2)]}
        server.add(f"{GITHUB}/suzgunmirac/BIG-Bench-Hard/main/bbh/{task}.json", json.dumps(rows).encode())
        canary = "Do not train on this. canary GUID\n-----\n" if i else ""
        prompt = f"{canary}Do {task}.\n\nQ: one\nA: Let's think step by step.\nSo the answer is é.\n"
        server.add(f"{GITHUB}/suzgunmirac/BIG-Bench-Hard/main/cot-prompts/{task}.txt", prompt.encode())
    run(server, tmp_path, "bbh")
    test, prompts = read(tmp_path, "bbh", "test"), read(tmp_path, "bbh", "cot_prompts")
    assert len(fetch.BBH_TASKS) == len(prompts) == 27 and len(test) == 54
    assert test[3] == {"task": "causal_judgement", "index": 1, "input": "causal_judgement 1?", "target": "(B)"}
    for i, task in ((0, "boolean_expressions"), (1, "causal_judgement")):
        assert prompts[i] == {
            "task": task,
            "prompt": f"Do {task}.\n\nQ: one\nA: Let's think step by step.\nSo the answer is é.",
        }


def test_drop(server, tmp_path):
    def answer(*spans):
        return {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": list(spans)}

    pair = {"question": "Who?", "answer": answer("Ann", "Bo"), "query_id": "q1", "validated_answers": [answer("Ann")]}
    bare = {"question": "When?", "answer": answer("noon"), "query_id": "q2"}
    files = {
        "train": {"s_0": {"passage": "P", "qa_pairs": [bare]}},
        "dev": {
            "s_1": {"passage": "Ann and Bo.", "qa_pairs": [pair, bare], "wiki_url": "u"},
            "s_2": {"passage": "Noon.", "qa_pairs": [bare]},
        },
    }
    server.add(
        "/s3-us-west-2.amazonaws.com/allennlp/datasets/drop/drop_dataset.zip",
        zipped({f"drop_dataset/drop_dataset_{split}.json": json.dumps(sections) for split, sections in files.items()}),
    )
    run(server, tmp_path, "drop")
    dev = read(tmp_path, "drop", "dev")
    assert dev[0] == {"section_id": "s_1", "passage": "Ann and Bo.", **pair}
    assert dev[1] == {"section_id": "s_1", "passage": "Ann and Bo.", **bare, "validated_answers": []}
    assert [row["section_id"] for row in dev] == ["s_1", "s_1", "s_2"] and len(read(tmp_path, "drop", "train")) == 1


def test_gsm8k_and_hellaswag_stay_as_they_are(server, tmp_path):
    gsm = {
        split: [{"question": f"{split} {i}: 1+1’s?", "answer": "<<1+1=2>>2\n#### 2"} for i in range(3)]
        for split in ("train", "test")
    }
    swag = {
        split: [
            {
                "ind": 1,
                "activity_label": "Rolling",
                "ctx_a": "A",
                "ctx_b": "b",
                "ctx": "A b",
                "endings": ENDINGS,
                "label": 2,
                "source_id": "w",
            }
        ]
        * 2
        for split in ("train", "val")
    }
    for split, rows in gsm.items():
        server.add(f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data/{split}.jsonl", lines(rows))
    for split, rows in swag.items():
        server.add(f"{GITHUB}/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl", lines(rows))
    run(server, tmp_path, "gsm8k", "hellaswag")
    assert {split: read(tmp_path, "gsm8k", split) for split in gsm} == gsm
    assert {split: read(tmp_path, "hellaswag", split) for split in swag} == swag


def test_math_is_partial(server, tmp_path, capsys):
    source = """raise SystemExit("this must not be run")
def list_fewshot_samples() -> list[dict]:
    return [{"problem": "Is $1<2$?", "solution": "Yes. \\\\boxed{1}", "few_shot": "1"}]
"""
    server.add(
        "/openaipublic.blob.core.windows.net/simple-evals/math_500_test.csv",
        table([["Question", "Answer"], ['How\nmany, "x"?', "\\frac{1}{2}"], ["b", "2"]]),
    )
    server.add(f"{GITHUB}/EleutherAI/lm-evaluation-harness/v0.4.9/lm_eval/tasks/minerva_math/utils.py", source.encode())
    run(server, tmp_path, "math")
    assert read(tmp_path, "math", "test")[0] == {"problem": 'How\nmany, "x"?', "answer": "\\frac{1}{2}"}
    assert read(tmp_path, "math", "fewshot") == [{"problem": "Is $1<2$?", "solution": "Yes. \\boxed{1}"}]
    assert "math: test: 2 rows of 5000: partial" in capsys.readouterr().out
    with pytest.raises(IndexError):
        fetch.minerva_examples("def other(): return []")


def test_mmlu(server, tmp_path):
    members = {
        f"data/{split}/{subject}_{split}.csv": table([[f'{subject} {split}, "q"\n?', "w", "x", "y", "z", "C"]] * n)
        for split, n in (("dev", 1), ("test", 2), ("val", 3))
        for subject in ("virology", "anatomy")
    }
    members["data/auxiliary_train/race.csv"] = table([["q", "w", "x", "y", "z", "A"]])
    server.add("/people.eecs.berkeley.edu/~hendrycks/data.tar", packed("w", members))
    run(server, tmp_path, "mmlu")
    test, dev = read(tmp_path, "mmlu", "test"), read(tmp_path, "mmlu", "dev")
    assert [row["subject"] for row in test] == ["anatomy", "anatomy", "virology", "virology"] and len(dev) == 2
    assert test[0] == {
        "subject": "anatomy",
        "question": 'anatomy test, "q"\n?',
        "choices": ["w", "x", "y", "z"],
        "answer": 2,
    }


def test_piqa(server, tmp_path):
    rows = [{"id": "i", "goal": f"g{i}", "sol1": "a", "sol2": "b"} for i in range(3)]
    server.add(f"{GITHUB}/ybisk/ybisk.github.io/master/piqa/data/valid.jsonl", lines(rows))
    labels = server.add(f"{GITHUB}/ybisk/ybisk.github.io/master/piqa/data/valid-labels.lst", b"1\n0\n1\n")
    run(server, tmp_path, "piqa")
    assert read(tmp_path, "piqa", "valid") == [
        {"goal": f"g{i}", "sol1": "a", "sol2": "b", "label": label} for i, label in enumerate([1, 0, 1])
    ]
    labels.content = b"1\n0\n"
    with pytest.raises(DataError, match="no piqa"):
        prepare_eval(str(tmp_path / "b"), str(tmp_path / "d2"), ["piqa"], mirror=server.url)
    assert not (tmp_path / "b" / "piqa" / "valid.jsonl").exists()


def triviaqa_json(split, n):
    answer = {
        "Aliases": ["The Sun", "Sol"],
        "HumanAnswers": ["x"],
        "MatchedWikiEntityName": "Sun",
        "NormalizedAliases": ["sun", "sol"],
        "NormalizedMatchedWikiEntityName": "sun",
        "NormalizedValue": "sun",
        "Type": "WikipediaEntity",
        "Value": "The Sun",
    }
    data = [
        {
            "Answer": answer,
            "EntityPages": [],
            "Question": f'{split} {i}? ]}} "Data": [',
            "QuestionId": f"tc_{i}",
            "QuestionSource": "http://q/",
            "SearchResults": [{"Description": "d" * 3000}],
        }
        for i in range(n)
    ]
    return json.dumps({"Data": data, "Domain": "Web", "Split": split}, indent=4).encode()


def test_triviaqa(server, tmp_path):
    """Three megabytes of evidence, so that items lie across the chunks that are read."""
    server.add(
        "/nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz",
        packed(
            "w:gz",
            {
                "triviaqa-unfiltered/unfiltered-web-train.json": triviaqa_json("train", 900),
                "triviaqa-unfiltered/README": b"-",
                "triviaqa-unfiltered/unfiltered-web-test-without-answers.json": b"{}",
                "triviaqa-unfiltered/unfiltered-web-dev.json": triviaqa_json("dev", 3),
            },
        ),
    )
    run(server, tmp_path, "triviaqa")
    rows = read(tmp_path, "triviaqa", "train")
    assert [row["question_id"] for row in rows] == [f"tc_{i}" for i in range(900)]
    assert read(tmp_path, "triviaqa", "validation")[1] == {
        "question": 'dev 1? ]} "Data": [',
        "question_id": "tc_1",
        "question_source": "http://q/",
        "answer": {
            "aliases": ["The Sun", "Sol"],
            "human_answers": ["x"],
            "matched_wiki_entity_name": "Sun",
            "normalized_aliases": ["sun", "sol"],
            "normalized_matched_wiki_entity_name": "sun",
            "normalized_value": "sun",
            "type": "WikipediaEntity",
            "value": "The Sun",
        },
    }


def test_tasks_for_small_models(server, tmp_path):
    """In one go by their common name; hellaswag and piqa, which it names too, are missing on this server."""
    pairs = [
        {"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps.", "UID": "x", "pairID": str(i)} for i in range(2)
    ]
    for name in fetch.BLIMP_FILES:
        server.add(f"{GITHUB}/alexwarstadt/blimp/master/data/{name}.jsonl", lines([p | {"UID": name} for p in pairs]))
    words = [{"text": "He said 'thé end"}]
    server.add("/openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl", lines(words))
    question = {"stem": "Why?", "choices": [{"text": "So", "label": "A"}, {"text": "Not", "label": "B"}]}
    arc = {"id": "Q1", "question": question, "answerKey": "B"}
    members = {f"{folder}ARC-V1-Feb2018-2/ARC-{kind}/{mark}ARC-{kind}-{split}.jsonl":
               lines([arc | {"id": f"{kind} {split}"}])
               for folder, mark in (("", ""), ("__MACOSX/", "._")) for kind in ("Challenge", "Easy")
               for split in ("Train", "Test")}  # fmt: skip
    server.add("/ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip", zipped(members))
    with pytest.raises(DataError, match="no hellaswag, piqa "):
        run(server, tmp_path, "small")
    assert len(set(fetch.BLIMP_FILES)) == 67 and read(tmp_path, "lambada", "test") == words
    blimp = read(tmp_path, "blimp", "test")
    assert len(blimp) == 134 and blimp[2] == pairs[0] | {"UID": "anaphor_gender_agreement"}
    assert read(tmp_path, "arc_easy", "test") == [arc | {"id": "Easy Test"}]


MB = 1 << 20
BOMBS = {
    "a line": ("gsm8k", f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data/train.jsonl",
               b'{"question": "' + b"a" * (17 * MB)),
    "a JSON file": ("bbh", f"{GITHUB}/suzgunmirac/BIG-Bench-Hard/main/bbh/boolean_expressions.json", b"[" * 100_000),
    "a field": ("mmlu", "/people.eecs.berkeley.edu/~hendrycks/data.tar",
                packed("w", {"data/dev/law_dev.csv": b'"' + b"q" * MB})),
    "a table in gzip": ("mmlu", "/people.eecs.berkeley.edu/~hendrycks/data.tar",
                        packed("w:gz", {"data/dev/law_dev.csv": b" " * (20 * MB)})),
    "blanks": ("triviaqa", "/nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz",
               packed("w:gz", {"unfiltered-web-train.json": b'{"Data": [' + b" " * (40 * MB)})),
    "blanks before": ("triviaqa", "/nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz",
                      packed("w:gz", {"unfiltered-web-train.json": b" " * (40 * MB)})),
    "an item": ("triviaqa", "/nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz",
                packed("w:gz", {"unfiltered-web-train.json": b'{"Data": [{"Question": "' + b"a" * (40 * MB)})),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_is_larger_than_an_official_file_could_be_is_one_line(server, tmp_path, capsys, bomb):
    task, path, content = BOMBS[bomb]
    server.add(path, content)
    start = time.process_time()
    with pytest.raises(DataError, match=f"no {task}"):
        run(server, tmp_path, task)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "not in the form it was published in" in said and len(said) < 500
    assert time.process_time() - start < 8
    assert os.listdir(tmp_path / "eval" / task) == ["sources.json"]


def test_items_of_a_truncated_list():
    good = '{"a": 1, "Data": [{"x": 1}, {"x": [2, "]"]}], "b": 2}'
    for size in (1, 3, 100):
        chunks = [good[i : i + size] for i in range(0, len(good), size)]
        assert list(fetch.items(chunks, "Data")) == [{"x": 1}, {"x": [2, "]"]}]
    assert list(fetch.items(['{"Data": []}'], "Data")) == []
    for bad in (good[:20], good[:30], good[:43], '{"Rows": []}'):
        with pytest.raises(ValueError):
            list(fetch.items([bad], "Data"))


# ----------------------------------------------------------------------------------------------------------------------
# Trouble


def gsm8k_server(server, **how):
    path = f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data/"
    return [
        server.add(f"{path}{split}.jsonl", lines([{"question": split, "answer": "#### 1"}] * 5000), **how)
        for split in ("train", "test")
    ]


def test_second_run_fetches_nothing_and_repairs(server, tmp_path, capsys):
    files = gsm8k_server(server, faults=[broken(100_000), status(500)])
    run(server, tmp_path, "gsm8k")
    assert "gsm8k: test: 5000 rows of 1319: partial" in capsys.readouterr().out
    n = [len(f.requests) for f in files]
    run(server, tmp_path, "gsm8k")
    assert "complete already" in capsys.readouterr().out
    path = tmp_path / "eval" / "gsm8k" / "test.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(NotOurs, match="no gsm8k"):
        run(server, tmp_path, "gsm8k")
    assert "test.jsonl: is there and was not made by this program, or altered" in capsys.readouterr().out
    assert path.read_bytes() == whole[:-100]
    path.unlink()
    run(server, tmp_path, "gsm8k")
    assert path.read_bytes() == whole and n == [len(f.requests) for f in files] == [3, 3]
    record = json.loads((tmp_path / "eval" / "gsm8k" / "sources.json").read_text())
    assert record["splits"]["test"]["rows"] == 5000 and len(record["downloads"]) == 2


def test_our_own_full_disk_is_not_blamed_on_the_official_file(server, tmp_path, capsys, monkeypatch):
    gsm8k_server(server)

    def full(path, *others):
        raise DataError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(fetch, "write_rows", full)
    with pytest.raises(DataError, match="no gsm8k"):
        run(server, tmp_path, "gsm8k")
    out = capsys.readouterr().out
    assert "train.jsonl: cannot be written" in out and "not in the form" not in out


def test_a_sources_json_that_is_not_ours_is_refused(server, tmp_path, capsys):
    gsm8k_server(server)
    folder = tmp_path / "eval" / "gsm8k"
    folder.mkdir(parents=True)
    for content in ("[]", '{"complete": true}', '{"complete": true, "splits": {"test": 3}}'):
        (folder / "sources.json").write_text(content)
        with pytest.raises(NotOurs, match="no gsm8k"):
            run(server, tmp_path, "gsm8k")
        assert "sources.json" in capsys.readouterr().out and os.listdir(folder) == ["sources.json"]


def test_files_put_there_by_hand_are_kept(server, tmp_path, capsys):
    gsm8k_server(server)
    folder = tmp_path / "eval" / "gsm8k"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("{}")
    run(server, tmp_path, "gsm8k")
    assert "put there by hand" in capsys.readouterr().out and (folder / "test.jsonl").read_text() == "{}"


def test_one_missing_task_does_not_stop_the_others(server, tmp_path, capsys):
    gsm8k_server(server)
    with pytest.raises(DataError, match="no piqa .*the other tasks are in"):
        run(server, tmp_path, "piqa", "gsm8k")
    assert "piqa: failed: " in capsys.readouterr().out
    assert len(read(tmp_path, "gsm8k", "test")) == 5000


@pytest.mark.parametrize(
    "task, path, content",
    [
        ("mmlu", "/people.eecs.berkeley.edu/~hendrycks/data.tar", b"<html>moved</html>"),
        ("mmlu", "/people.eecs.berkeley.edu/~hendrycks/data.tar", packed("w", {"other.csv": b"a,b\n"})),
        (
            "mmlu",
            "/people.eecs.berkeley.edu/~hendrycks/data.tar",
            packed("w", {"data/dev/law_dev.csv": b"q,a,b,c,A\n"}),
        ),
        ("drop", "/s3-us-west-2.amazonaws.com/allennlp/datasets/drop/drop_dataset.zip", b"<html>moved</html>"),
        ("drop", "/s3-us-west-2.amazonaws.com/allennlp/datasets/drop/drop_dataset.zip", zipped({"other.json": "{}"})),
        (
            "triviaqa",
            "/nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz",
            packed("w:gz", {"unfiltered-web-train.json": triviaqa_json("train", 3)[:-9000]}),
        ),
        ("triviaqa", "/nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz", b"\x1f\x8b" + b"x" * 100),
    ],
)
def test_official_file_of_another_form(server, tmp_path, capsys, task, path, content):
    server.add(path, content)
    with pytest.raises(DataError, match=f"no {task}"):
        run(server, tmp_path, task)
    assert not [f for f in os.listdir(tmp_path / "eval" / task) if "sources" not in f]
    run_again = capsys.readouterr().out
    assert f"{task}: failed:" in run_again and run_again.count("\n") == 1
