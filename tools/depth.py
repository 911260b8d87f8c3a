"""REPORT.md's section on `depth`: the paper's Figs 2, 3, 7, 8 at toy size, from 8 to 96 sublayers."""

import math
import statistics

import matplotlib.pyplot as plt
import numpy as np

from tools.rates import COLORS, KINDS, NAMES, finish
from tools.rows import exactly, floats, grid_table, span, values

MAPPED = ("hc", "home", "paper")  # of KINDS: those that have maps
UNIFORM = 0.05  # a composite map is called uniform if no entry is further from 1/n
APART = 0.3  # nats by which a training loss has left another


def depth(rows):
    table = grid_table(rows, [("composite from 1/n", lambda some: span(off_uniform(some)) if some else "–")])
    return f"{table}\n\n{findings(rows)}", draw(rows)


def layers_of(rows):
    return sorted({int(r["n_layer"]) for r in rows.values()})


def runs(rows, kind, layers, scale):
    """{seed: row}"""
    return exactly(rows, n_layer=layers, maps_lr_scale=scale, **KINDS[kind])


def off_uniform(some):
    """[how far an entry of the whole depth's composite map is from 1/n, at most], of each seed, after training."""
    maps = [floats(r, "composite") for r in some.values() if r.get("composite")]
    return [abs(m - 1 / math.isqrt(len(m))).max() for m in maps] or [math.nan]


# -- what the numbers say ----------------------------------------------------------------------------------------------


def findings(rows):
    """The deepest model's gains and composites at each rate, and where HC falls behind mHC."""
    lines, most = [], layers_of(rows)[-1]
    for scale in (1, 100):
        for kind in MAPPED:
            if some := runs(rows, kind, most, scale):
                lines.append(f"- {2 * most} sublayers, {NAMES[kind]} × {scale}: {gains_said(some)}.")
    for kind in MAPPED[1:]:
        for scale in (1, 100):
            found = [(2 * n, off_uniform(some)) for n in layers_of(rows) if (some := runs(rows, kind, n, scale))]
            said = [f"{sum(d < UNIFORM for d in off)} of {len(off)} at {sublayers}" for sublayers, off in found]
            if said:
                what = f"Composites of the whole depth within {UNIFORM} of 1/n, {NAMES[kind]} × {scale}"
                lines.append(f"- {what}: {', '.join(said)} sublayers.")
    return "\n".join([*lines, *breaks_said(rows, most)])


def gains_said(some):
    """Ranges over seeds: of what single maps do, of what the composites do at most and at least."""
    single = [max(floats(r, f"single_{way}_max").max() for way in ("fwd", "bwd")) for r in some.values()]
    least = [float(r[f"gain_{way}_min"]) for r in some.values() for way in ("fwd", "bwd")]
    peak = span(values(some, "gain_peak").values())
    return f"a single gain is at most {span(single)}, a composite one {peak}, and at least {span(least)} at the end"


def breaks_said(rows, layers):
    """Fig 2: from which step on HC's training loss is above mHC's of the same seed, and what its gradients did."""
    hc, mhc = (runs(rows, kind, layers, 100) for kind in ("hc", "home"))
    steps = [left_at(hc[seed], mhc[seed]) for seed in sorted(hc.keys() & mhc.keys())]
    if not steps:
        return []
    norms = [span(values(some, "grad_norm_max").values()) for some in (hc, mhc)]
    what = f"- {2 * layers} sublayers × 100: HC's training loss is first {APART} above that of mHC, 'home'"
    return [f"{what}, at step {', '.join(steps)} (by seed); its largest gradient norm is {norms[0]}, mHC's {norms[1]}."]


def left_at(a, b):
    """The step at which run a's training loss is first APART above b's; no number counts as above."""
    x, y = (np.nan_to_num(floats(r, "loss_curve"), nan=math.inf) for r in (a, b))
    n = min(len(x), len(y))
    above = x[:n] > y[:n] + APART
    return f"{floats(a, 'at_step')[:n][above][0]:.0f}" if above.any() else "never"


# -- the figure --------------------------------------------------------------------------------------------------------


def draw(rows):
    """Above: over the number of sublayers, and over training. Below: within the deepest model, at the raised rate."""
    fig, axes = plt.subplots(2, 4, figsize=(20, 7.6), layout="constrained")
    (gains, losses, uniform, training), (single, forward, backward, breaks) = axes
    draw_over_depths(rows, gains, losses, uniform)
    most = layers_of(rows)[-1]
    for kind in MAPPED:
        some, name = runs(rows, kind, most, 100), NAMES[kind]
        curves(single, some, "single_fwd_max", kind, f"{name}, forward")
        curves(single, some, "single_bwd_max", kind, f"{name}, backward", "--")
        for ax, way in ((forward, "fwd"), (backward, "bwd")):
            curves(ax, some, f"{way}_max", kind, f"{name}, most")
            curves(ax, some, f"{way}_min", kind, f"{name}, least", "--")
        curves(breaks, some, "loss_curve", kind, f"{name}: loss", x="at_step")
        curves(breaks, some, "grad_norm_curve", kind, f"{name}: gradient norm", ":", x="at_step")
        for scale, style in ((100, "-"), (1, ":")):
            curves(training, runs(rows, kind, most, scale), "gain_curve", kind, f"{name} × {scale}", style, "eval_step")
    where = f"{2 * most} sublayers"
    for ax, what in ((single, "gain of single maps"), (forward, "composite gain, forward"),
                     (backward, "composite gain, backward")):  # fmt: skip
        ax.set(yscale="log", title=f"{what}; {where}, × 100", xlabel="sublayer l")
    training.set(yscale="log", title=f"peak composite gain; {where}", xlabel="step")
    breaks.set(yscale="log", title=f"training loss, gradient norm; {where}, × 100", xlabel="step")
    finish(axes.flat)
    return fig


def curves(ax, some, column, kind, label, style="-", x=None):
    """A thin line for each seed, over depth, or over the steps in column x."""
    for i, row in enumerate(some.values()):
        y = floats(row, column)
        at = floats(row, x) if x else np.arange(1, len(y) + 1)
        label = label if i == 0 else None
        ax.plot(at, y, color=COLORS[kind], linestyle=style, linewidth=0.7, alpha=0.8, label=label)


def draw_over_depths(rows, gains, losses, uniform):
    for kind in MAPPED:
        for scale, style in ((1, ":"), (100, "-")):
            found = {2 * n: some for n in layers_of(rows) if (some := runs(rows, kind, n, scale))}
            look = {"color": COLORS[kind], "linestyle": style, "marker": "o", "markersize": 3}
            x, look["label"] = list(found), f"{NAMES[kind]} × {scale}"
            gains.plot(x, [statistics.median(values(s, "gain_peak").values()) for s in found.values()], **look)
            losses.plot(x, [statistics.mean(values(s, "val_loss").values()) for s in found.values()], **look)
            if kind != "hc":
                uniform.plot(x, [statistics.median(off_uniform(s)) for s in found.values()], **look)
    gains.set(yscale="log", title="peak composite gain (median over seeds)")
    losses.set(title="validation loss (mean)")
    uniform.set(yscale="log", title="whole depth's composite map: an entry's\nlargest distance from 1/n (median)")
    for ax in (gains, losses, uniform):
        ax.set(xscale="log", xlabel="sublayers")
