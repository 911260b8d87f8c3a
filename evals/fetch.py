"""The official files of the eight tasks, converted to what eval.py reads: <eval_dir>/<task>/<split>.jsonl.

    python prepare_data.py --dataset=eval                      # all of them, into data/eval
    python prepare_data.py --dataset=eval --tasks=gsm8k,mmlu

Rows keep the official fields; where the official form is not rows (a tar of tables, nested JSON, labels in a second
file), the fields are those under which the set is commonly published:

    bbh        test {task, index, input, target}; cot_prompts {task, prompt}          JSON and text files, raw GitHub
    drop       train, dev {section_id, passage, question, answer, query_id, validated_answers}        nested JSON, zip
    gsm8k      train, test {question, answer}                                                      as it is, raw GitHub
    hellaswag  train, val {ind, activity_label, ctx_a, ctx_b, ctx, endings, label, ...}            as it is, raw GitHub
    math       test {problem, answer}: 500 of the 5000 problems (MATH-500), since the official archive was taken down;
               fewshot {problem, solution}: Minerva's four examples, read from lm-evaluation-harness' source
    mmlu       dev, test {subject, question, choices, answer}                                      CSV tables, tar
    piqa       valid {goal, sol1, sol2, label}                                        rows and labels, raw GitHub
    triviaqa   train, validation {question, question_id, question_source, answer {...}}: unfiltered   JSON, tar.gz

<task>/sources.json names the downloads, their sha256, and the rows of each split. Files put there by hand are kept.
"""

import ast
import codecs
import csv
import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
import zlib

from data import DataError, sha256_file
from download import DownloadError, download
from evals import tasks
from owned import NotOurs, check_file, sync_folder, whole_file, write_json
from records import Missing, RecordError, anything, boolean, each, integer, read_json
from records import sha256 as hash_rule

RAW = "https://raw.githubusercontent.com"
BLOB = "https://openaipublic.blob.core.windows.net/simple-evals"
BBH = f"{RAW}/suzgunmirac/BIG-Bench-Hard/main"
BBH_TASKS = """boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages
    formal_fallacies geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
    logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
    penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting""".split()
DROP = "https://s3-us-west-2.amazonaws.com/allennlp/datasets/drop/drop_dataset.zip"
GSM8K = f"{RAW}/openai/grade-school-math/master/grade_school_math/data/{{split}}.jsonl"
HELLASWAG = f"{RAW}/rowanz/hellaswag/master/data/hellaswag_{{split}}.jsonl"
MATH = f"{BLOB}/math_500_test.csv"
MINERVA = f"{RAW}/EleutherAI/lm-evaluation-harness/v0.4.9/lm_eval/tasks/minerva_math/utils.py"
MMLU = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"
PIQA = f"{RAW}/ybisk/ybisk.github.io/master/piqa/data"
TRIVIAQA = "https://nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz"

# ----------------------------------------------------------------------------------------------------------------------
# One function a task: fetch(url) gives a local file; yields (split, rows), each to be used before the next


def bbh(fetch):
    yield "test", (row for task in BBH_TASKS for row in bbh_rows(task, fetch(f"{BBH}/bbh/{task}.json")))
    yield (
        "cot_prompts",
        ({"task": task, "prompt": bbh_prompt(read_text(fetch(f"{BBH}/cot-prompts/{task}.txt")))} for task in BBH_TASKS),
    )


def bbh_rows(task, path):
    for index, row in enumerate(json.loads(read_text(path))["examples"]):
        yield {"task": task, "index": index, "input": row["input"], "target": row["target"]}


def bbh_prompt(text):
    """The prompt below the canary that warns against training on it."""
    return text.split("\n-----\n", 1)[-1].strip("\n")


def drop(fetch):
    with zipfile.ZipFile(fetch(DROP)) as archive:
        for split in ("train", "dev"):
            sections = json.loads(archive.read(f"drop_dataset/drop_dataset_{split}.json"))
            yield split, (row for section, content in sections.items() for row in drop_rows(section, content))


def drop_rows(section, content):
    for pair in content["qa_pairs"]:
        yield {
            "section_id": section,
            "passage": content["passage"],
            "question": pair["question"],
            "answer": pair["answer"],
            "query_id": pair["query_id"],
            "validated_answers": pair.get("validated_answers", []),
        }


def gsm8k(fetch):
    for split in ("train", "test"):
        yield split, json_lines(fetch(GSM8K.format(split=split)))


def hellaswag(fetch):
    for split in ("train", "val"):
        yield split, json_lines(fetch(HELLASWAG.format(split=split)))


def math(fetch):
    with open(fetch(MATH), encoding="utf-8", newline="") as f:
        yield "test", ({"problem": row["Question"], "answer": row["Answer"]} for row in csv.DictReader(f))
    yield "fewshot", minerva_examples(read_text(fetch(MINERVA)))


def minerva_examples(source):
    """The literal that list_fewshot_samples() returns; the source is read, not run."""
    functions = [node for node in ast.parse(source).body if getattr(node, "name", "") == "list_fewshot_samples"]
    returned = [node for node in ast.walk(functions[0]) if isinstance(node, ast.Return)]
    return [{"problem": row["problem"], "solution": row["solution"]} for row in ast.literal_eval(returned[0].value)]


def mmlu(fetch):
    with tarfile.open(fetch(MMLU)) as archive:
        for split in ("dev", "test"):
            found = {
                match[1]: member
                for member in archive.getmembers()
                if (match := re.fullmatch(rf"(?:\./)?data/{split}/(\w+)_{split}\.csv", member.name))
            }
            yield (
                split,
                (
                    row
                    for subject, member in sorted(found.items())
                    for row in mmlu_rows(subject, archive.extractfile(member))
                ),
            )


def mmlu_rows(subject, file):
    for question, *choices, letter in csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline="")):
        if len(choices) != 4:
            raise ValueError(f"{subject}: a row of {len(choices) + 2} columns, not 6")
        yield {"subject": subject, "question": question, "choices": choices, "answer": "ABCD".index(letter)}


def piqa(fetch):
    labels = read_text(fetch(f"{PIQA}/valid-labels.lst")).split()
    rows = list(json_lines(fetch(f"{PIQA}/valid.jsonl")))
    yield (
        "valid",
        (
            {k: row[k] for k in ("goal", "sol1", "sol2")} | {"label": int(label)}
            for row, label in zip(rows, labels, strict=True)
        ),
    )


def triviaqa(fetch):
    names = {"train": "train", "dev": "validation"}
    with tarfile.open(fetch(TRIVIAQA), "r|gz") as archive:  # read once from the front: it is large
        for member in archive:
            if match := re.search(r"unfiltered-web-(train|dev)\.json$", member.name):
                file = archive.extractfile(member)
                text = codecs.iterdecode(iter(lambda file=file: file.read(1 << 20), b""), "utf-8")
                yield names[match[1]], map(triviaqa_row, items(text, "Data"))


def triviaqa_row(item):
    """Official names to the published ones: QuestionId -> question_id; evidence is left out."""
    snake = {k: re.sub(r"(?<!^)(?=[A-Z])", "_", k).lower() for k in {**item, **item["Answer"]}}
    row = {snake[k]: item[k] for k in ("Question", "QuestionId", "QuestionSource")}
    return row | {"answer": {snake[k]: v for k, v in item["Answer"].items()}}


TASKS = {f.__name__: f for f in (bbh, drop, gsm8k, hellaswag, math, mmlu, piqa, triviaqa)}

# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_text(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def json_lines(path):
    with open(path, encoding="utf-8") as f:
        for line in f:
            if line.strip():
                yield json.loads(line)


def items(chunks, key):
    """The members of the list {"key": [...]} of a JSON text that comes in chunks, too large to be held, one by one."""
    decode, text, chunks = json.JSONDecoder().raw_decode, "", iter(chunks)
    while not (start := re.search(rf'"{key}"\s*:\s*\[', text)):
        if not (chunk := next(chunks, "")):
            raise ValueError(f"no list {key!r} in it")
        text += chunk
    at = start.end()
    while True:
        at = re.compile(r"[\s,]*").match(text, at).end()
        if text[at : at + 1] == "]":
            return
        try:
            item, at = decode(text, at)
            yield item
        except json.JSONDecodeError:  # the item goes on in the next chunk, or the file is truncated
            if not (chunk := next(chunks, "")):
                raise
            text, at = text[at:] + chunk, 0


# ----------------------------------------------------------------------------------------------------------------------
# The whole


SOURCES = {  # sources.json: by it a task's files are known for ours
    "complete": boolean, "splits": each({"rows": integer(0), "sha256": hash_rule}), "downloads?": [each(anything)],
}  # fmt: skip


def prepare_eval(eval_dir, download_dir, tasks, mirror=""):
    """Fetch and convert the tasks (a list of names). Raises DataError naming those that failed, after trying all;
    NotOurs if one of them because of a file that is not ours."""
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise DataError(f"unknown task {', '.join(unknown)}: wanted {', '.join(TASKS)} or all")
    failed, refused = [], False
    for name in tasks:
        try:
            prepare_task(os.path.join(eval_dir, name), download_dir, name, mirror)
        except (DataError, DownloadError, NotOurs, OSError) as e:
            print(f"{name}: failed: {e}")
            failed.append(name)
            refused |= isinstance(e, NotOurs)
    if failed:
        raise (NotOurs if refused else DataError)(
            f"no {', '.join(failed)} (see above); the other tasks are in {eval_dir}. Run again, or put "
            f"<split>.jsonl there yourself"
        )


def prepare_task(folder, download_dir, name, mirror):
    """One task; nothing of it is visible before its file is whole. sources.json knows the sha256 of each file before it
    is there, and says at the end that all are. Raises NotOurs for a file that was altered since."""
    record = os.path.join(folder, "sources.json")
    done = {"complete": False, "splits": {}}
    try:
        done = read_json(record, SOURCES)
    except Missing:
        pass
    except RecordError as e:
        raise NotOurs(f"{e}; move it away, or choose another --eval_dir=") from None
    if not os.path.exists(record) and os.path.isdir(folder) and any(f.endswith(".jsonl") for f in os.listdir(folder)):
        print(f"{name}: {folder} holds files that were put there by hand; they are kept (remove them to fetch others)")
        return
    paths = {os.path.join(folder, f"{split}.jsonl"): s["sha256"] for split, s in done["splits"].items()}
    if done["complete"] and all(os.path.exists(path) and sha256_file(path) == sha256 for path, sha256 in paths.items()):
        print(f"{name}: complete already")
        return
    os.makedirs(folder, exist_ok=True)
    for path, sha256 in paths.items():
        check_file(path, lambda path, sha256=sha256: sha256_file(path) == sha256)
    write_json(record, {"complete": False, "splits": done["splits"]})
    sources, splits = [], {}

    def fetch(url):
        path = os.path.join(download_dir, url.split("://", 1)[1].replace("~", ""))
        sources.append(download(url, path, mirror=mirror))
        return path

    try:
        for split, rows in TASKS[name](fetch):
            path = os.path.join(folder, f"{split}.jsonl")

            def announce(n, sha256, split=split):
                splits[split] = {"rows": n, "sha256": sha256}
                write_json(record, {"complete": False, "splits": done["splits"] | splits})

            write_rows(path, rows, announce, lambda path, split=split: known(path, done["splits"].get(split)))
    except DataError:  # a ValueError too, but not about the official file's form
        raise
    except (
        LookupError,
        ValueError,
        TypeError,
        EOFError,
        SyntaxError,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
    ) as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise DataError(f"{sources[-1]['url']}: not in the form it was published in ({reason})") from e
    write_json(record, {"complete": True, "splits": splits, "downloads": sources})
    sync_folder(folder)
    task = tasks.TASKS[name]
    for split, s in splits.items():
        partial = split in task.tests and s["rows"] not in task.sizes
        print(f"{name}: {split}: {s['rows']} rows" + (f" of {task.sizes[0]}: partial" if partial else ""))


def known(path, split):
    """Whether a task's file is as we have made it; split: what sources.json says of it, or None."""
    return split is not None and sha256_file(path) == split["sha256"]


def write_rows(path, rows, announce=lambda n, sha256: None, ours=None):
    """Write rows as JSON lines, whole; returns their number. Raises DataError if there is none.

    announce(rows, sha256): called before the file gets its name. ours: see owned.check_file."""
    n, digest = 0, hashlib.sha256()
    try:
        with whole_file(path, ours, binary=True) as f:
            for row in rows:
                line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
                f.write(line)
                digest.update(line)
                n += 1
            if not n:
                raise DataError(f"{path}: the official file holds no row that was looked for")
            announce(n, digest.hexdigest())
    except OSError as e:
        raise DataError(f"{path}: cannot be written: {e}; make room or choose another --eval_dir=") from e
    return n
