"""REPORT.md's sections of the experiments after `rates`: each takes its rows, and gives a text and a figure or None."""

import math
import statistics
from functools import cache

import matplotlib.pyplot as plt
import numpy as np

from configurator import read_file
from experiments import DEMO, KINDS, MIDDLE, SIZES
from model import GPTConfig
from tools.rows import differences, floats, mean_se, paired, pick, power_law, span, table, values

VARYING = (
    "n_layer n_embd max_steps residual manifold single_pass maps_init learned_maps lr maps_lr_scale alpha_init "
    "collapse n_streams sinkhorn_iters"
).split()
BASELINE = {"residual": "baseline"}
COLORS = ("#777777", "#d55e00", "#0072b2", "#009e73", "#cc79a7")


def varying(rows):
    """The settings that are not the same in all rows."""
    return [k for k in VARYING if len({row.get(k) or "" for row in rows.values()}) > 1]


def groups(rows):
    """{settings that vary, without the seed, as a tuple of pairs: {seed: row}}, in the order of the rows."""
    found, names = {}, varying(rows)
    for row in rows.values():
        found.setdefault(tuple((k, row[k]) for k in names if row.get(k)), {})[int(row["seed"])] = row
    return found


def grid_table(rows, more=()):
    """One line for each combination of settings, over its seeds. more: (header, function of {seed: row}) pairs."""
    found, columns, lines = groups(rows), varying(rows), []
    for group, some in found.items():
        gains = [float(r["gain_peak"] or "nan") for r in some.values()]
        peak = "–" if any(map(math.isnan, gains)) else span(gains)
        extra = [f(some) for _, f in more]
        loss = values(some, "val_loss").values()
        lines.append([*(dict(group).get(k, "") for k in columns), len(some), mean_se(loss), *extra, peak])
    return table([*columns, "seeds", "val. loss", *(name for name, _ in more), "peak gain"], lines)


def exactly(rows, **settings):
    """{seed: row} of the rows that have these settings, and of those that vary no others."""
    return pick(rows, **dict.fromkeys(varying(rows), "") | settings)


def loss_of(rows, **settings):
    return values(exactly(rows, **settings), "val_loss")


def chart(n, width=5.5):
    fig, axes = plt.subplots(1, n, figsize=(width * n, 3.8), layout="constrained")
    return fig, axes if n > 1 else [axes]


def finish(axes):
    for ax in axes:
        ax.grid(alpha=0.25, linewidth=0.5)
        ax.legend(frameon=False, fontsize=8)


def tune(rows):
    """Which of its rates is best for each kind and size."""
    return grid_table(rows), None


# -- sizes: Figs 5 and 6 -----------------------------------------------------------------------------------------------


def name_of(kind):
    if kind["residual"] != "mhc":
        return {"baseline": "baseline", "hc": "HC"}[kind["residual"]]
    return "mHC" + ("" if len(kind) == 1 else ", single-pass" if "single_pass" in kind else ", H_res = I")


def at_size(rows, size, kind):
    """{seed: row}, whatever the rates that `tune` has chosen."""
    wanted = dict.fromkeys(("n_layer", "n_embd", "max_steps", "manifold", "single_pass"), "") | size | kind
    return pick(rows, **wanted)


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
    return f"{table(header, lines)}\n\n{laws(found)}", draw_sizes(rows, found)


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
    """Losses less the baseline's over the largest size's training; losses against FLOPs."""
    fig, (left, right) = chart(2)
    base = at_size(rows, SIZES[-1], BASELINE)
    for kind, color in zip(KINDS, COLORS, strict=True):
        some = at_size(rows, SIZES[-1], kind)
        if kind != BASELINE and (seeds := sorted(some.keys() & base.keys())):
            curves = [floats(some[s], "loss_curve") - floats(base[s], "loss_curve") for s in seeds]
            left.plot(floats(some[seeds[0]], "at_step"), np.mean(curves, 0), color=color, label=name_of(kind))
        if points := found.get(name_of(kind)):
            means = [statistics.mean(loss.values()) for _, loss in points]
            right.plot([flops for flops, _ in points], means, color=color, marker="o", label=name_of(kind))
    left.axhline(0, color=COLORS[0], linewidth=1, label="baseline")
    left.set(title="training loss less the baseline's (Fig 5)", xlabel="step", ylabel="nats per token")
    right.set(xscale="log", yscale="log", title="validation loss (Fig 6)", xlabel="training FLOPs")
    finish((left, right))
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


# -- depth: Figs 2, 3, 7, 8 --------------------------------------------------------------------------------------------


def from_uniform(some):
    """How far the map of the whole depth is from 1/n in each entry, at the end of training."""
    maps = [floats(r, "composite") for r in some.values() if r.get("composite")]
    return span([abs(m - 1 / math.isqrt(len(m))).max() for m in maps]) if maps else "–"


def depth(rows):
    fig, (left, right) = chart(2)
    styles = {"1": ":", "100": "-"}
    for (name, kind), color in zip(PAIRS, COLORS[1:], strict=False):
        for scale, style in styles.items():
            points = sorted((2 * int(dict(g)["n_layer"]), some) for g, some in groups(rows).items()
                            if dict(g).items() >= {**kind, "maps_lr_scale": scale}.items())  # fmt: skip
            if not points:
                continue
            look = {"color": color, "linestyle": style, "label": f"{name} × {scale}", "marker": "o", "markersize": 3}
            x = [sublayers for sublayers, _ in points]
            left.plot(x, [statistics.median(values(s, "gain_peak").values()) for _, s in points], **look)
            right.plot(x, [statistics.mean(values(s, "val_loss").values()) for _, s in points], **look)
    left.set(xscale="log", yscale="log", xlabel="sublayers", title="peak composite gain (median over seeds)")
    right.set(xscale="log", xlabel="sublayers", title="validation loss (mean)")
    finish((left, right))
    return grid_table(rows, [("composite from 1/n", from_uniform)]), fig


# -- which map brings the gain; what the paper leaves open -------------------------------------------------------------


def ablation(rows):
    base = loss_of(rows, **BASELINE)
    return grid_table(rows, [("less the baseline's", lambda some: paired(values(some, "val_loss"), base))]), None


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
        f"A baseline ({size_name(tuple(MIDDLE.items()))}, {MIDDLE['max_steps']} steps), and as many steps again from "
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


SECTIONS = {f.__name__: f for f in (tune, sizes, decides, depth, ablation, choices, upcycling, memory)}
