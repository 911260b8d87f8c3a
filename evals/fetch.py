"""The official files of every task, converted to what eval.py reads: <eval_dir>/<task>/<split>.jsonl.

    python prepare_data.py --dataset=eval                      # all of them, into data/eval
    python prepare_data.py --dataset=eval --tasks=small        # those for small models; or all, or a list: gsm8k,mmlu

Rows keep the official fields; where the official form is not rows (a tar of tables, nested JSON, labels in a second
file), the fields are those under which the set is commonly published:

    arc_easy   test {id, question {stem, choices}, answerKey}                         rows in a zip of 680 MB
    bbh        test {task, index, input, target}; cot_prompts {task, prompt}          JSON and text files, raw GitHub
    blimp      test {sentence_good, sentence_bad, UID, ...}                           67 files of rows, raw GitHub
    drop       train, dev {section_id, passage, question, answer, query_id, validated_answers}        nested JSON, zip
    gsm8k      train, test {question, answer}                                                      as it is, raw GitHub
    hellaswag  train, val {ind, activity_label, ctx_a, ctx_b, ctx, endings, label, ...}            as it is, raw GitHub
    lambada    test {text}                                                            as it is
    math       test {problem, answer}: 500 of the 5000 problems (MATH-500), since the official archive was taken down;
               fewshot {problem, solution}: Minerva's four examples, read from lm-evaluation-harness' source
    mmlu       dev, test {subject, question, choices, answer}                                      CSV tables, tar
    piqa       valid {goal, sol1, sol2, label}                                        rows and labels, raw GitHub
    triviaqa   train, validation {question, question_id, question_source, answer {...}}: unfiltered   JSON, tar.gz

No more of a file is read, and no more of it held, than an official one could need; whatever else it holds is one line.
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
from records import (
    FILE_LIMIT,
    LINE_LIMIT,
    Missing,
    RecordError,
    anything,
    boolean,
    each,
    integer,
    parse,
    read_bytes,
    read_json,
    read_lines,
)
from records import sha256 as hash_rule

ARC = "https://ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip"
RAW = "https://raw.githubusercontent.com"
BLOB = "https://openaipublic.blob.core.windows.net/simple-evals"
BBH = f"{RAW}/suzgunmirac/BIG-Bench-Hard/main"
BBH_TASKS = """boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages
    formal_fallacies geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
    logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
    penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting""".split()
BLIMP = f"{RAW}/alexwarstadt/blimp/master/data/{{name}}.jsonl"
BLIMP_FILES = """adjunct_island anaphor_gender_agreement anaphor_number_agreement animate_subject_passive
    animate_subject_trans causative complex_NP_island
    coordinate_structure_constraint_complex_left_branch
    coordinate_structure_constraint_object_extraction determiner_noun_agreement_1
    determiner_noun_agreement_2 determiner_noun_agreement_irregular_1
    determiner_noun_agreement_irregular_2 determiner_noun_agreement_with_adj_2
    determiner_noun_agreement_with_adj_irregular_1 determiner_noun_agreement_with_adj_irregular_2
    determiner_noun_agreement_with_adjective_1 distractor_agreement_relational_noun
    distractor_agreement_relative_clause drop_argument ellipsis_n_bar_1 ellipsis_n_bar_2
    existential_there_object_raising existential_there_quantifiers_1 existential_there_quantifiers_2
    existential_there_subject_raising expletive_it_object_raising inchoative intransitive
    irregular_past_participle_adjectives irregular_past_participle_verbs
    irregular_plural_subject_verb_agreement_1 irregular_plural_subject_verb_agreement_2
    left_branch_island_echo_question left_branch_island_simple_question
    matrix_question_npi_licensor_present npi_present_1 npi_present_2 only_npi_licensor_present
    only_npi_scope passive_1 passive_2 principle_A_c_command principle_A_case_1 principle_A_case_2
    principle_A_domain_1 principle_A_domain_2 principle_A_domain_3 principle_A_reconstruction
    regular_plural_subject_verb_agreement_1 regular_plural_subject_verb_agreement_2
    sentential_negation_npi_licensor_present sentential_negation_npi_scope sentential_subject_island
    superlative_quantifiers_1 superlative_quantifiers_2 tough_vs_raising_1 tough_vs_raising_2 transitive
    wh_island wh_questions_object_gap wh_questions_subject_gap wh_questions_subject_gap_long_distance
    wh_vs_that_no_gap wh_vs_that_no_gap_long_distance wh_vs_that_with_gap
    wh_vs_that_with_gap_long_distance""".split()
DROP = "https://s3-us-west-2.amazonaws.com/allennlp/datasets/drop/drop_dataset.zip"
GSM8K = f"{RAW}/openai/grade-school-math/master/grade_school_math/data/{{split}}.jsonl"
HELLASWAG = f"{RAW}/rowanz/hellaswag/master/data/hellaswag_{{split}}.jsonl"
LAMBADA = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"
MATH = f"{BLOB}/math_500_test.csv"
MINERVA = f"{RAW}/EleutherAI/lm-evaluation-harness/v0.4.9/lm_eval/tasks/minerva_math/utils.py"
MMLU = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"
PIQA = f"{RAW}/ybisk/ybisk.github.io/master/piqa/data"
TRIVIAQA = "https://nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz"
MEMBER_LIMIT = 16 << 30  # bytes of an archive's largest member; TriviaQA's is about 3 GB

# ----------------------------------------------------------------------------------------------------------------------
# One function a task: fetch(url) gives a local file; yields (split, rows), each to be used before the next


def arc_easy(fetch):
    with zipfile.ZipFile(fetch(ARC)) as archive:
        name = [n for n in archive.namelist() if re.search(r"^(?!__MACOSX).*/ARC-Easy-Test\.jsonl$", n)][0]
        with archive.open(name) as f:
            yield "test", lines_of(f, name)


def bbh(fetch):
    yield "test", (row for task in BBH_TASKS for row in bbh_rows(task, fetch(f"{BBH}/bbh/{task}.json")))
    yield (
        "cot_prompts",
        ({"task": task, "prompt": bbh_prompt(read_text(fetch(f"{BBH}/cot-prompts/{task}.txt")))} for task in BBH_TASKS),
    )


def bbh_rows(task, path):
    for index, row in enumerate(read_json(path)["examples"]):
        yield {"task": task, "index": index, "input": row["input"], "target": row["target"]}


def bbh_prompt(text):
    """The prompt below the canary that warns against training on it."""
    return text.split("\n-----\n", 1)[-1].strip("\n")


def blimp(fetch):
    yield "test", (row for name in BLIMP_FILES for row in read_lines(fetch(BLIMP.format(name=name))))


def drop(fetch):
    with zipfile.ZipFile(fetch(DROP)) as archive:
        for split in ("train", "dev"):
            name = f"drop_dataset/drop_dataset_{split}.json"
            if archive.getinfo(name).file_size > FILE_LIMIT:
                raise ValueError(f"{name}: larger than {FILE_LIMIT} bytes")
            sections = parse(archive.read(name), anything, name)
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
        yield split, read_lines(fetch(GSM8K.format(split=split)))


def hellaswag(fetch):
    for split in ("train", "val"):
        yield split, read_lines(fetch(HELLASWAG.format(split=split)))


def lambada(fetch):
    yield "test", read_lines(fetch(LAMBADA))


def math(fetch):
    table = csv.DictReader(io.StringIO(read_text(fetch(MATH)), newline=""))
    yield "test", ({"problem": row["Question"], "answer": row["Answer"]} for row in table)
    yield "fewshot", minerva_examples(read_text(fetch(MINERVA)))


def minerva_examples(source):
    """The literal that list_fewshot_samples() returns; the source is read, not run."""
    functions = [node for node in ast.parse(source).body if getattr(node, "name", "") == "list_fewshot_samples"]
    returned = [node for node in ast.walk(functions[0]) if isinstance(node, ast.Return)]
    return [{"problem": row["problem"], "solution": row["solution"]} for row in ast.literal_eval(returned[0].value)]


def mmlu(fetch):
    with tarfile.open(fetch(MMLU), "r:") as archive:
        for split in ("dev", "test"):
            found = {
                match[1]: member
                for member in archive.getmembers()
                if (match := re.fullmatch(rf"(?:\./)?data/{split}/(\w+)_{split}\.csv", member.name))
                and member.size <= LINE_LIMIT
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
    rows = list(read_lines(fetch(f"{PIQA}/valid.jsonl")))
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
            if member.size > MEMBER_LIMIT:
                raise ValueError(f"{member.name}: larger than {MEMBER_LIMIT} bytes")
            if match := re.search(r"unfiltered-web-(train|dev)\.json$", member.name):
                file = archive.extractfile(member)
                text = codecs.iterdecode(iter(lambda file=file: file.read(1 << 20), b""), "utf-8")
                yield names[match[1]], map(triviaqa_row, items(text, "Data"))


def triviaqa_row(item):
    """Official names to the published ones: QuestionId -> question_id; evidence is left out."""
    snake = {k: re.sub(r"(?<!^)(?=[A-Z])", "_", k).lower() for k in {**item, **item["Answer"]}}
    row = {snake[k]: item[k] for k in ("Question", "QuestionId", "QuestionSource")}
    return row | {"answer": {snake[k]: v for k, v in item["Answer"].items()}}


TASKS = {f.__name__: f for f in (arc_easy, bbh, blimp, drop, gsm8k, hellaswag, lambada, math, mmlu, piqa, triviaqa)}
GROUPS = {"all": list(TASKS), "small": [name for name in tasks.SMALL if name != "loss"]}

# ----------------------------------------------------------------------------------------------------------------------
# Reading

SEPARATORS = re.compile(r"[\s,]*")


def read_text(path):
    return read_bytes(path).decode()


def lines_of(f, name):
    """The rows of an open file of JSON lines."""
    while line := f.readline(LINE_LIMIT + 1):
        if len(line) > LINE_LIMIT:
            raise ValueError(f"{name}: a line of more than {LINE_LIMIT} bytes")
        if line.strip():
            yield parse(line, anything, name)


def items(chunks, key):
    """The members of the list {"key": [...]} of a JSON text that comes in chunks, too large to be held, one by one.

    ValueError for a member (or what stands before the first) of more than LINE_LIMIT characters.
    """
    decode, text, chunks = json.JSONDecoder().raw_decode, "", iter(chunks)

    def more(kept):
        if len(kept) > LINE_LIMIT or not (chunk := next(chunks, "")):
            raise ValueError(f"no whole item of {key!r} within {LINE_LIMIT} characters, or truncated")
        return kept + chunk

    while not (start := re.search(rf'"{key}"\s*:\s*\[', text)):
        text = more(text)
    at, blanks = start.end(), 0
    while blanks <= LINE_LIMIT:
        at = SEPARATORS.match(text, at).end()
        if text[at : at + 1] == "]":
            return
        try:
            item, at = decode(text, at)
            yield item
            blanks = -at
        except json.JSONDecodeError:  # the item goes on in the next chunk, or the file is truncated
            blanks += at
            text, at = more(text[at:]), 0
    raise ValueError(f"more than {LINE_LIMIT} blanks between items of {key!r}")


# ----------------------------------------------------------------------------------------------------------------------
# The whole


SOURCES = {  # sources.json: by it a task's files are known for ours
    "complete": boolean, "splits": each({"rows": integer(0), "sha256": hash_rule}), "downloads?": [each(anything)],
}  # fmt: skip


def prepare_eval(eval_dir, download_dir, names, mirror=""):
    """Fetch and convert the tasks of these names (all, small: several).

    Raises DataError naming those that failed, after trying all; NotOurs if one of them because of a file that is not
    ours.
    """
    unknown = [name for name in names if name not in (*TASKS, *GROUPS)]
    if unknown:
        raise DataError(f"unknown task {', '.join(unknown)}: wanted {', '.join(TASKS)}, or {', '.join(GROUPS)}")
    names = dict.fromkeys(n for name in names for n in GROUPS.get(name, [name]))
    failed, refused = [], False
    for name in names:
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
        RecursionError,
        zlib.error,
        csv.Error,
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
