"""What eval.py says about its scores: standard errors, paired comparisons, the table, the picture. No model in here.

A record is one task scored on one checkpoint, as eval.py keeps it in results.json: checkpoint, run, step, task, style,
shots, n, partial, random, metrics {name: {value, se}}, scores {name: one number per item}. Scores are fractions from 0
to 1, shown in per cent; `loss` (nats) and `bits_per_byte` are shown as they are.
"""

import numpy as np

from evals.tasks import TASKS

PLAIN = ("loss", "bits_per_byte")  # no percentages, and less is better
ITEMS = ("files", "seq_len", "n")  # equal in two records: they are about the same items in the same order


def mean_and_error(scores):
    """The mean of per-item scores and its standard error (None for a single item)."""
    scores = np.asarray(scores, dtype=np.float64)
    error = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
    return float(scores.mean()), error


def paired(a, b, seed=0, resamples=10_000):
    """Compare two runs item by item: mean of b - a, its standard error, and the middle 95 % of its bootstrap.

    a, b: scores of the same items in the same order. The bootstrap draws items with replacement, seeded.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired comparison needs the same items: got {len(a)} and {len(b)} scores")
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    rng, n = np.random.default_rng(seed), len(difference)
    step = max(1, 10**7 // n)  # resamples at once: 80 MB of indices
    counts = [min(step, resamples - i) for i in range(0, resamples, step)]
    means = np.concatenate([difference[rng.integers(n, size=(k, n))].mean(1) for k in counts])
    low, high = np.percentile(means, (2.5, 97.5))
    value, error = mean_and_error(difference)
    return {"difference": value, "se": error, "low": float(low), "high": float(high), "n": n, "resamples": resamples}


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
    return results, unlike


# ----------------------------------------------------------------------------------------------------------------------
# Text


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


def joined(words):
    """One word where all records agree; else each once."""
    return ", ".join(dict.fromkeys(words))


def table(records, names):
    """Lines of the table: a row per task and metric, a column per checkpoint ({checkpoint: name}) and the paper's."""
    head = ["task", "shots", "metric", "items", *names.values(), "random", "paper: baseline", "HC", "mHC"]
    rows = [head]
    found = {(r["checkpoint"], r["task"]): r for r in records}
    for task in dict.fromkeys(r["task"] for r in records):
        mine = [r for r in records if r["task"] == task]
        shots, items = joined(str(r["shots"]) for r in mine), joined(map(extent, mine))
        for i, metric in enumerate(mine[0]["metrics"]):
            cells = []
            for checkpoint in names:
                m = found[checkpoint, task]["metrics"][metric] if (checkpoint, task) in found else None
                cells.append(f"{number(m['value'], metric)} ± {number(m['se'], metric)}" if m else "-")
            paper = [f"{p:.1f}" for p in TASKS[task].paper] if task in TASKS and i == 0 else ["-"] * 3
            random = joined(number(r["random"].get(metric), metric) for r in mine)
            rows.append([title(task), shots, metric, items, *cells, random, *paper])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    widths = [-w if i in (0, 2) else w for i, w in enumerate(widths)]  # names to the left, numbers to the right
    lines = ["  ".join(c.rjust(w) if w > 0 else c.ljust(-w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def comparison_lines(results, names):
    """A line per comparison; a star where the bootstrap's 95 % leave out zero."""
    lines = []
    for r in results:
        scale, unit = (1, "") if r["metric"] in PLAIN else (100, " points")
        d, low, high = (scale * r[k] for k in ("difference", "low", "high"))
        digits = 4 if r["metric"] in PLAIN else 2
        se = "-" if r["se"] is None else f"{scale * r['se']:.{digits}f}"
        star = " *" if low > 0 or high < 0 else ""
        lines.append(
            f"{title(r['task'])} {r['metric']}: {names[r['b']]} minus {names[r['a']]} = {d:+.{digits}f}{unit} ± "
            f"{se}, 95 % {low:+.{digits}f} .. {high:+.{digits}f}, {extent(r)} items{star}"
        )
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Picture


def picture(records, path):
    """Score against training step: a panel per task (its first metric), a line per run, bars of one standard error."""
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
            errors = [scale * (r["metrics"][metric]["se"] or 0.0) for r in line]
            ax.errorbar([r["step"] for r in line], values, errors, marker="o", capsize=2, label=run)
        if mine[0]["random"].get(metric) is not None:
            ax.axhline(scale * mine[0]["random"][metric], color="gray", linestyle=":", label="random guessing")
        partial = " (partial)" if any(r["partial"] for r in mine) else ""
        ax.set(title=f"{title(task)}{partial}", xlabel="training step", ylabel=metric + ("" if scale == 1 else ", %"))
    axes.flat[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
