"""What eval.py says about its scores: the table, the comparisons, the picture. No model in here.

A record is one task scored on one checkpoint, as eval.py keeps it in results.json: checkpoint, run, step, task, style,
shots, shown, n, partial, random, metrics {name: {value, low, high}}, scores {name: one number per item}. Scores are
fractions from 0 to 1, shown in per cent; losses (nats, bits per byte) and perplexities are shown as they are.
"""

import os

import owned
from evals.stats import PLAIN, holm, paired
from evals.tasks import TASKS

ITEMS = ("files", "seq_len", "n")  # equal in two records: they are about the same items in the same order


def finals(records):
    """Which checkpoints to compare: the last of each run; of a single run its first and last."""
    runs = {}
    for r in records:
        runs.setdefault(r["run"], {})[r["step"]] = r["checkpoint"]
    last = [steps[max(steps)] for steps in runs.values()]
    if len(last) == 1:
        steps = next(iter(runs.values()))
        return [steps[min(steps)], steps[max(steps)]] if len(steps) > 1 else last
    return last


def comparisons(records, seed, resamples):
    """Paired comparisons of the first of `finals` with each other one, for every task and metric they share.

    -> comparisons, and a line for every pair that cannot be compared: their items are not the same.
    """
    first, *others = finals(records)
    found = {(r["checkpoint"], r["task"]): r for r in records}
    results, unlike = [], []
    for other in others:
        for task in dict.fromkeys(r["task"] for r in records):
            a, b = found.get((first, task)), found.get((other, task))
            if not a or not b:
                continue
            if differ := [k for k in ITEMS if a.get(k) != b.get(k)]:
                unlike.append(f"{title(task)}: {first} and {other} are not compared: other items ({', '.join(differ)})")
                continue
            for metric in a["scores"]:
                pair = paired(a["scores"][metric], b["scores"][metric], seed, resamples)
                of = {k: a[k] for k in ("official", "partial")}
                results.append({"task": task, "metric": metric, "a": first, "b": other, **pair, **of, "seed": seed})
    for result, p in zip(results, holm([r["p"] for r in results]), strict=True):
        result["p_holm"] = p
    return results, unlike


# ----------------------------------------------------------------------------------------------------------------------
# Text


def checkpoint_names(records):
    """{checkpoint: 'mhc 200'}: its run's folder, with as many folders above it as tell the runs apart, and the step."""
    parts = {r["run"]: os.path.abspath(r["run"]).split(os.sep) for r in records}
    depth = 1
    while len({tuple(p[-depth:]) for p in parts.values()}) < len(parts):
        depth += 1
    return {r["checkpoint"]: f"{os.path.join(*parts[r['run']][-depth:])} {r['step']}" for r in records}


def number(value, metric):
    if value is None:
        return "-"
    return f"{value:.4f}" if metric in PLAIN else f"{100 * value:.1f}"


def title(task):
    return TASKS[task].title if task in TASKS else "validation"


def extent(record):
    """'1319', or '50 of 1319 (partial)' for less than the whole official set."""
    whole = f" of {record['official']}" if record["official"] else ""
    return f"{record['n']}{whole} (partial)" if record["partial"] else str(record["n"])


def shots_shown(record):
    """'8', or '1.5 of 8' where prompts had to leave examples out, on average."""
    shown, wanted = record["shown"], record["shots"]
    return str(wanted) if shown == wanted else f"{shown:.2g} of {wanted}"


def joined(words):
    """One word where all records agree; else each once."""
    return ", ".join(dict.fromkeys(words))


def cell(m, metric):
    return f"{number(m['value'], metric)} [{number(m['low'], metric)}, {number(m['high'], metric)}]"


def table(records, names):
    """Lines of the table: a row per task and metric, a column per checkpoint ({checkpoint: name}) and the paper's."""
    head = ["task", "shots", "metric", "items", *names.values(), "random", "paper: baseline", "HC", "mHC"]
    rows = [head]
    found = {(r["checkpoint"], r["task"]): r for r in records}
    for task in dict.fromkeys(r["task"] for r in records):
        mine = [r for r in records if r["task"] == task]
        shots, items = joined(map(shots_shown, mine)), joined(map(extent, mine))
        for i, metric in enumerate(mine[0]["metrics"]):
            have = [found[c, task]["metrics"][metric] if (c, task) in found else None for c in names]
            paper = TASKS[task].paper if task in TASKS and i == 0 else None
            random = joined(number(r["random"].get(metric), metric) for r in mine)
            rows.append([title(task), shots, metric, items, *(cell(m, metric) if m else "-" for m in have), random,
                         *([f"{p:.1f}" for p in paper] if paper else ["-"] * 3)])  # fmt: skip
    if all(row[-1] == "-" for row in rows[1:]):
        rows = [row[:-3] for row in rows]  # no task of the paper's
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    widths = [-w if i in (0, 2) else w for i, w in enumerate(widths)]  # names to the left, numbers to the right
    lines = ["  ".join(c.rjust(w) if w > 0 else c.ljust(-w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def notes(records, names):
    """What has to be said beside the table."""
    lines = ["per cent [95 % interval]; losses and perplexities as they are"]
    if any(r["shots"] for r in records):
        lines.append(
            "examples in a prompt are the first ones of their file; stock lm_eval draws them, and prints others"
        )
    if own := [title(r["task"]) for r in records if r["task"] in TASKS and not TASKS[r["task"]].deepseek]:
        if any(r["style"] == "deepseek" for r in records):
            lines.append(f"prompts: deepseek's; the harness' for {joined(own)}")
    if any(r["task"] in TASKS and TASKS[r["task"]].paper for r in records):
        lines.append("the paper's are 27B models after 262B tokens")
    for key, what in (("truncated", "prompts cut on the left"), ("clipped", "choices alone too long, cut too,")):
        if cut := [f"{names[r['checkpoint']]}: {title(r['task'])} {r[key]} of {r['n']}" for r in records if r.get(key)]:
            longest = joined(str(r["max_length"]) for r in records)
            lines.append(f"{what} to fit {longest} tokens: {'; '.join(cut)}")
    return lines


def comparison_lines(results, names):
    """A line per comparison, and what the stars mean."""
    lines = []
    for r in results:
        scale, unit = (1, "") if r["metric"] in PLAIN else (100, " points")
        d, low, high = (scale * r[k] for k in ("difference", "low", "high"))
        digits = 4 if r["metric"] in PLAIN else 2
        metric = "log perplexity" if r["metric"] == "perplexity" else r["metric"]
        star = " *" if r["p_holm"] <= 0.05 else ""
        lines.append(
            f"{title(r['task'])} {metric}: {names[r['b']]} minus {names[r['a']]} = {d:+.{digits}f}{unit}, "
            f"95 % {low:+.{digits}f} .. {high:+.{digits}f}, p {r['p']:.2g}, {extent(r)} items{star}"
        )
    if lines:
        lines.append(
            "95 %: bootstrap over items; p: sign flips; *: p <= 0.05 after Holm's correction for "
            + (f"these {len(lines)} comparisons" if len(lines) > 1 else "this one comparison")
        )
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Picture


def picture(records, path):
    """Score against training step: a panel per task (its first metric), a line per run, bars of its 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(r["task"] for r in records))
    columns = min(3, len(tasks))
    figure, axes = plt.subplots(-(-len(tasks) // columns), columns, squeeze=False, constrained_layout=True,
                                figsize=(4 * columns, 3 * -(-len(tasks) // columns)))  # fmt: skip
    for ax in axes.flat[len(tasks) :]:
        ax.axis("off")
    for ax, task in zip(axes.flat, tasks, strict=False):
        mine = [r for r in records if r["task"] == task]
        metric = next(iter(mine[0]["metrics"]))
        scale = 1 if metric in PLAIN else 100
        for run in dict.fromkeys(r["run"] for r in mine):
            line = sorted((r for r in mine if r["run"] == run), key=lambda r: r["step"])
            values = [scale * r["metrics"][metric]["value"] for r in line]
            m = [r["metrics"][metric] for r in line]
            errors = [
                [scale * abs((x["value"] if x[end] is None else x[end]) - x["value"]) for x in m]
                for end in ("low", "high")
            ]
            ax.errorbar([r["step"] for r in line], values, errors, marker="o", capsize=2, label=run)
        if mine[0]["random"].get(metric) is not None:
            ax.axhline(scale * mine[0]["random"][metric], color="gray", linestyle=":", label="random guessing")
        partial = " (partial)" if any(r["partial"] for r in mine) else ""
        ax.set(title=f"{title(task)}{partial}", xlabel="training step", ylabel=metric + ("" if scale == 1 else ", %"))
    axes.flat[0].legend(fontsize="small")
    with owned.whole_file(path, binary=True) as f:
        figure.savefig(f, dpi=150, format="png")
    plt.close(figure)
