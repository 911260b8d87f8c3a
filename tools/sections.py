"""REPORT.md's sections of the experiments after `rates`: each takes its rows, and gives a text and a figure or None."""

import itertools
import math
import statistics
from functools import cache

import matplotlib.pyplot as plt
import numpy as np

from configurator import read_file
from experiments import ASKED, DEMO, KINDS, LARGE, SIZES, SMALL, rated
from experiments import name_of as cell_name
from model import GPTConfig
from tools.depth import depth
from tools.rates import BASELINE, HC, finish
from tools.rows import (
    differences,
    exactly,
    floats,
    grid_table,
    groups,
    loss_of,
    mean_se,
    paired,
    pick,
    power_law,
    span,
    standing,
    table,
    values,
)

COLORS = ("#777777", "#d55e00", "#0072b2", "#009e73", "#cc79a7")


def chart(n, width=5.5):
    fig, axes = plt.subplots(1, n, figsize=(width * n, 3.8), layout="constrained")
    return fig, axes if n > 1 else [axes]


# -- sizes: Figs 5 and 6 -----------------------------------------------------------------------------------------------


WHAT = ("n_layer", "n_embd", "max_steps", "residual", "manifold", "single_pass")  # a size and a kind


def tune(rows):
    """Which of its rates is best for each kind and size, and whether a better one may lie beyond those tried."""
    lines = []
    for size, kind in itertools.product(SIZES, KINDS):
        tried = [rows[cell_name(c)] for c in rated(size, kind) if cell_name(c) in rows]
        if len(tried) == len(rated(size, kind)):
            best = min(tried, key=lambda row: float(row["val_loss"] or "inf"))
            every = [row for row in rows.values() if all(row.get(k) == best.get(k) for k in WHAT)]
            edge = [rate for rate in ("lr", "maps_lr_scale") if at_edge(rate, best, every)]
            beyond = f"; the last of those tried: {' and '.join(edge)}" if edge else ""
            name = f"{size_name(tuple(size.items()))}, {name_of(kind)}"
            lines.append(f"- {name}: lr {best['lr']}, maps × {best['maps_lr_scale']}{beyond}.")
    lines += [said for size in SIZES if (said := where_hc_breaks(rows, size))]
    return f"{grid_table(rows)}\n\n" + "\n".join(lines), None


def where_hc_breaks(rows, size):
    """Which gains cost HC its lead over the baseline of the same lr, on the one seed that all rates are tried on."""
    base, hc = ([rows[cell_name(c)] for c in rated(size, kind) if cell_name(c) in rows] for kind in (BASELINE, HC))
    if len(hc) < len(rated(size, HC)) or len(base) < len(rated(size, BASELINE)):
        return ""
    loss = lambda row: float(row["val_loss"] or "inf")  # noqa: E731
    best = {row["lr"]: loss(row) for row in base}
    lost, kept = (
        [float(r["gain_peak"]) for r in hc if (loss(r) > best[r["lr"]]) == behind] for behind in (True, False)
    )
    gains = [f" {where} with gains of {span(some)}" for where, some in (("behind", lost), ("ahead", kept)) if some]
    return f"- {size_name(tuple(size.items()))}: HC against the baseline of the same lr is{','.join(gains)}."


def at_edge(rate, best, tried):
    """Whether the best rate is the lowest or the highest of several."""
    values = sorted({float(row[rate]) for row in tried})
    return len(values) > 1 and float(best[rate]) in (values[0], values[-1])


def name_of(kind):
    if kind["residual"] != "mhc":
        return {"baseline": "baseline", "hc": "HC"}[kind["residual"]]
    return "mHC" + ("" if len(kind) == 1 else ", single-pass" if "single_pass" in kind else ", H_res = I")


def at_size(rows, size, kind):
    """{seed: row}, whatever the rates that `tune` has chosen."""
    return pick(rows, **dict.fromkeys(WHAT, "") | size | kind)


@cache
def size_name(size):
    given = {k: v for k, v in read_file(DEMO).items() if k in GPTConfig.__dataclass_fields__} | dict(size)
    return f"{given['n_layer']} layers of {given['n_embd']}"


def sizes(rows):
    lines, found = [], {}
    for size in SIZES:
        base = values(at_size(rows, size, BASELINE), "val_loss")
        for kind in KINDS:
            if some := at_size(rows, size, kind):
                loss, one = values(some, "val_loss"), next(iter(some.values()))
                found.setdefault(name_of(kind), []).append((float(one["flops"] or "nan"), loss))
                rates = f"{one['lr']}, × {one['maps_lr_scale'] or 1}"
                less = "–" if kind == BASELINE else paired(loss, base)
                lines.append([size_name(tuple(size.items())), one["tokens"], name_of(kind), rates, len(some),
                              mean_se(loss.values()), less])  # fmt: skip
    header = ["size", "tokens", "", "lr, maps' rate", "seeds", "val. loss", "less the baseline's"]
    return "\n\n".join(filter(None, (table(header, lines), orders(rows), laws(found)))), draw_sizes(rows, found)


def orders(rows):
    """Who is ahead of whom at each size, where five seeds say so."""
    lines = []
    for size in SIZES:
        losses = {name_of(kind): values(at_size(rows, size, kind), "val_loss") for kind in KINDS}
        mhc, others = losses.pop("mHC"), losses
        said = [
            f"{standing(mhc, b)} {name} ({paired(mhc, b)})" for name, b in others.items() if min(len(b), len(mhc)) >= 5
        ]
        if said:
            lines.append(f"- {size_name(tuple(size.items()))}: mHC is {', '.join(said)}.")
    return "\n".join(lines)


def complete(points):
    """[(FLOPs, {seed: loss})] of all sizes -> FLOPs (sizes,), losses (sizes, seeds); None with fewer than two seeds."""
    seeds = sorted(set.intersection(*(set(loss) for _, loss in points)))
    losses = np.array([[loss[s] for s in seeds] for _, loss in points])
    if len(points) < len(SIZES) or len(seeds) < 2 or not np.isfinite(losses).all():
        return None
    return np.array([flops for flops, _ in points]), losses


def laws(found):
    """Fig 6: the exponent of each kind, and how its distance from the baseline goes with size."""
    lines = []
    for name, points in found.items():
        if fit := complete(points):
            b, low, high = power_law(*fit)
            lines.append(f"- {name}: loss ∝ FLOPs^−{b:.4f} (95 %: {low:.4f} to {high:.4f}).")
    for name, points in found.items():
        if name != "baseline" and complete(points) and complete(found.get("baseline", points[:1])):
            gaps = [differences(a[1], b[1]) for a, b in zip(points, found["baseline"], strict=True)]
            lines.append(f"- {name} less the baseline, largest size less smallest: {paired(gaps[-1], gaps[0])}.")
    return "\n".join(lines) or "Power laws want all sizes and two seeds of a kind."


def draw_sizes(rows, found):
    """Losses less the baseline's over training, a panel for each size that has rows; losses against FLOPs."""
    there = [size for size in SIZES if at_size(rows, size, BASELINE)]
    fig, (*lefts, right) = chart(len(there) + 1, 4.8)
    for ax, size in zip(lefts, there, strict=True):
        base = at_size(rows, size, BASELINE)
        for kind, color in zip(KINDS[1:], COLORS[1:], strict=True):
            some = at_size(rows, size, kind)
            if seeds := sorted(some.keys() & base.keys()):
                curves = [floats(some[s], "loss_curve") - floats(base[s], "loss_curve") for s in seeds]
                ax.plot(floats(some[seeds[0]], "at_step"), np.mean(curves, 0), color=color, label=name_of(kind))
        ax.axhline(0, color=COLORS[0], linewidth=1, label="baseline")
        ax.set(title=f"{size_name(tuple(size.items()))}: training loss\nless the baseline's (Fig 5)", xlabel="step")
    for kind, color in zip(KINDS, COLORS, strict=True):
        if points := found.get(name_of(kind)):
            means = [statistics.mean(loss.values()) for _, loss in points]
            right.plot([flops for flops, _ in points], means, color=color, marker="o", label=name_of(kind))
    right.set(xscale="log", yscale="log", title="validation loss (Fig 6)", xlabel="training FLOPs")
    finish((*lefts, right))
    return fig


# -- what decides HC against mHC ---------------------------------------------------------------------------------------

PAIRS = (("HC", {"residual": "hc"}), ("mHC, 'home'", {"residual": "mhc", "maps_init": "home"}),
         ("mHC, 'paper'", {"residual": "mhc", "maps_init": "paper"}))  # fmt: skip


def decides(rows):
    """HC less mHC at each length and alpha, and the gain that HC's streams had by then."""
    lines = []
    changes = dict.fromkeys(tuple((k, r[k]) for k in ("max_steps", "alpha_init") if r.get(k))
                            for r in rows.values())  # fmt: skip
    for change in changes:
        for scale in dict.fromkeys(r["maps_lr_scale"] for r in rows.values() if r["maps_lr_scale"]):
            settings = dict(change) | {"maps_lr_scale": scale}
            hc, home, paper = (loss_of(rows, **settings, **kind) for _, kind in PAIRS)
            gains = values(exactly(rows, **settings, **PAIRS[0][1]), "gain_peak")
            if hc:
                how = ", ".join(f"{k}={v}" for k, v in change)
                lines.append([how, f"× {scale}", len(hc), paired(hc, home), paired(hc, paper), span(gains.values())])
    header = ["", "maps' rate", "seeds", "HC less mHC, 'home'", "HC less mHC, 'paper'", "HC's peak gain"]
    return f"{table(header, lines)}\n\n{grid_table(rows)}", None


# -- which map brings the gain; what the paper leaves open -------------------------------------------------------------


def ablation(rows):
    base = loss_of(rows, **BASELINE)
    page = grid_table(rows, [("less the baseline's", lambda some: paired(values(some, "val_loss"), base))])
    return f"{page}\n\n{of_each_map(rows)}", None


ADDED = {  # (the maps that are learned, and those with one more)
    "hc": [("", "res"), ("res", "pre,res"), ("pre,res", "pre,post,res")],
    "mhc": [("", "post"), ("post", "post,res"), ("post", "pre,post"), ("pre,post", "pre,post,res")],
}


def of_each_map(rows):
    """What it brings to learn one map more; the baseline learns none."""

    def loss(maps):
        learned = {"residual": residual, "maps_lr_scale": scale, "learned_maps": maps}
        return loss_of(rows, **(learned if maps else BASELINE))

    lines = []
    for residual, scale in itertools.product(ADDED, (1, 100)):
        said = []
        for before, after in ADDED[residual]:
            (more,) = set(after.split(",")) - set(before.split(","))
            beside = f" beside {before.replace(',', ' and ')}" if before else " alone"
            said += [f"{more}{beside} {paired(loss(after), loss(before))}"] if loss(after) else []
        lines += [f"- {'HC' if residual == 'hc' else 'mHC'} × {scale}: {', '.join(said)}."] if said else []
    return "\n".join(lines)


def choices(rows):
    """Against the paper's mHC, which is manifold='sinkhorn' with all else as it is."""
    home = loss_of(rows, residual="mhc", maps_lr_scale=100, manifold="sinkhorn")
    return grid_table(rows, [("less mHC's", lambda some: paired(values(some, "val_loss"), home))]), None


# -- upcycling ---------------------------------------------------------------------------------------------------------


def starts(some):
    """{seed: loss before the first step}."""
    return {seed: floats(row, "val_curve")[0] for seed, row in some.items()}


def continued(rows):
    """{name: {seed: row}} of what the baselines were continued as."""
    names = {"baseline": "baseline", "hc": "HC", "mhc": "mHC"}
    scale = lambda found: f" × {found['maps_lr_scale']}" if found.get("maps_lr_scale") else ""  # noqa: E731
    found = [(dict(group), some) for group, some in groups(rows).items()]
    return {names[next(iter(some.values()))["residual"]] + scale(group): some for group, some in found}


def apart_at_start(rows):
    """The largest difference between two starts from one baseline."""
    found = [starts(some) for some in continued(rows).values()]
    return max(max(v) - min(v) for seed in found[0] if (v := [f[seed] for f in found if seed in f]))


def upcycling(rows):
    found, lines = continued(rows), []
    base = values(found.get("baseline", {}), "val_loss")
    for name, some in found.items():
        loss, less = values(some, "val_loss"), paired(values(some, "val_loss"), base) if name != "baseline" else "–"
        peak = span(values(some, "gain_peak").values()) if name != "baseline" else "–"
        lines.append([name, len(some), *(mean_se(v.values()) for v in (starts(some), loss)), less, peak])
    header = ["continued as", "seeds", "loss at the start", "at the end", "less the baseline's", "peak gain"]
    text = (
        f"A baseline ({size_name(tuple(SMALL.items()))}, {SMALL['max_steps']} steps), and as many steps again from "
        "its weights, with a new optimizer, on the same data for all. One baseline's starts are at most "
        f"{apart_at_start(rows):.0e} apart."
    )
    fig, (ax,) = chart(1)
    for (name, some), color in zip(found.items(), COLORS, strict=False):
        if seeds := sorted(some.keys() & found.get("baseline", {}).keys()):
            curves = [floats(some[s], "loss_curve") - floats(found["baseline"][s], "loss_curve") for s in seeds]
            ax.plot(floats(some[seeds[0]], "at_step"), np.mean(curves, 0), color=color, label=name)
    ax.set(title="training loss less the continued baseline's", xlabel="step", ylabel="nats per token")
    finish([ax])
    return f"{text}\n\n{table(header, lines)}", fig


# -- benchmarks --------------------------------------------------------------------------------------------------------


def right(rows, task, kind):
    """{seed: right answers in percent}"""
    return values(at_size(rows, LARGE, kind), task)


def above_chance(rows, task, kind):
    """By more than two standard errors: of seeds, and of so many answers guessed at random, the same for all seeds."""
    some = list(right(rows, task, kind).values())
    if len(some) < 2:
        return False
    chance, n = (float(next(iter(rows.values()))[f"{task} {of}"]) for of in ("by chance", "of"))
    error = math.hypot(statistics.stdev(some) / len(some) ** 0.5, (chance * (100 - chance) / n) ** 0.5)
    return statistics.mean(some) - chance > 2 * error


def downstream(rows):
    """Table 4 in small."""
    lines, first = [], next(iter(rows.values()))
    there = [kind for kind in KINDS if at_size(rows, LARGE, kind)]
    for task in ASKED:
        cells = [mean_se(right(rows, task, kind).values(), 1) for kind in there]
        marks = ["*" if above_chance(rows, task, kind) else "" for kind in there]
        lines.append([task, first[f"{task} of"], first[f"{task} by chance"],
                      *(cell + mark for cell, mark in zip(cells, marks, strict=True))])  # fmt: skip
    text = (
        f"Right answers in percent, by the models of `sizes` at {size_name(tuple(LARGE.items()))}; no examples in the "
        "prompt. *: above chance, by more than two standard errors of seeds and of items together."
    )
    return text + "\n\n" + table(["task", "items", "by chance", *map(name_of, there)], lines), None


# -- 6.7 % -------------------------------------------------------------------------------------------------------------


def overhead(rows):
    """What each form adds to the baseline's time: measured on this CPU, and reckoned for a GPU that was not there."""
    timed, on_paper = ([r for r in rows.values() if r.get(k)] for k in ("width", "predicted"))
    forms = [k for k in next(iter(rows.values())) if f"{k} ±" in next(iter(rows.values()))]
    shown = ("width", "blocks", "threads", "rounds", "baseline_ms")
    lines = [[*(r[k] for k in shown), *(f"{r[f]} ± {r[f'{f} ±']}" if r[f] else "–" for f in forms)] for r in timed]
    text = (
        "Percent added to the baseline's time, forward and backward, n = 4, fp32: medians of rounds in which each form "
        "takes its turn, ± half the quartile range. Width 64 is a training step of the demo's shape."
    )
    parts = [text, table(["width", "blocks", "threads", "rounds", "baseline, ms", *forms], lines)]
    return "\n\n".join(parts + predicted(on_paper)), None


def predicted(rows):
    """The lines of `overhead` that are a reckoning."""
    if not rows:
        return []
    names = [k for k in rows[0] if f"{k}, at the peaks" in rows[0]]
    lines = [[r["config"], r["predicted"], *(f"{r[n]} ({r[f'{n}, at the peaks']})" for n in names)] for r in rows]
    share = (
        f"{float(rows[0]['mfu']):.0%} of the card's FLOP/s and {float(rows[0]['memory_share']):.0%} of its bandwidth"
    )
    text = f"A prediction, nothing of it ran: a micro-batch reckoned at {share} (in brackets, at all of both)."
    return [text, table(["", "card", *names], lines)]


# -- Table 3 -----------------------------------------------------------------------------------------------------------


def memory(rows):
    """Each depth's peaks by L_r, and where the measured one is smallest."""
    lines, best = [], []
    for L in dict.fromkeys(int(r["sublayers"]) for r in rows.values()):
        some = [r for r in rows.values() if r["sublayers"] == str(L)]
        lines += [[L, r["recompute"], r["L_r"], r["saved"], r["peak"], r["table_3"]] for r in some]
        if cut := [r for r in some if r["recompute"] == "mhc"]:
            least = min(cut, key=lambda r: float(r["peak"]))
            best.append(f"- {L} sublayers: the smallest measured peak is at L_r = {least['L_r']}, Eq 20's L_r* is "
                        f"{least['best_L_r']}.")  # fmt: skip
    header = ["sublayers", "recompute", "L_r", "kept", "peak", "n ceil(L/L_r) + (n+2) L_r"]
    text = (
        "In units of C numbers a token, F's own activations made small (C = 128, n = 4); Table 3 leaves out F's output."
    )
    return "\n\n".join((text, table(header, lines), "\n".join(best))), None


SECTIONS = {
    f.__name__: f for f in (tune, sizes, decides, depth, ablation, choices, upcycling, downstream, overhead, memory)
}
