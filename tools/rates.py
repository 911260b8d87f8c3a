"""REPORT.md's part on `rates`, the demo's settings at several rates of the maps: look-ups, table, findings, figure."""

import statistics

import matplotlib.pyplot as plt

from tools.rows import behind, mean_se, paired, pick, span, table, values

BASELINE, HC = {"residual": "baseline"}, {"residual": "hc"}
HOME, PAPER = ({"residual": "mhc", "maps_init": init} for init in ("home", "paper"))
COLORS = {"baseline": "#777777", "hc": "#d55e00", "home": "#0072b2", "paper": "#56b4e9"}
NAMES = {"baseline": "baseline", "hc": "HC", "home": "mHC, 'home'", "paper": "mHC, 'paper'"}
KINDS = {"baseline": BASELINE, "hc": HC, "home": HOME, "paper": PAPER}
SCALES = (1, 10, 30, 100, 300)
BROKEN = 1e6  # a gain beyond which the maps are called broken


def losses(rows, kind, scale):
    """{seed: validation loss} of a kind in `rates`; the baseline has no scale."""
    return values(pick(rows, **KINDS[kind], **({} if kind == "baseline" else {"maps_lr_scale": scale})), "val_loss")


def gain(rows, kind, scale, column="gain_peak"):
    return values(pick(rows, **KINDS[kind], maps_lr_scale=scale), column)


def tried(rows, kind):
    """The scales that have five seeds."""
    return [scale for scale in SCALES if len(losses(rows, kind, scale)) >= 5]


def best_scale(rows, kind):
    """The scale with the lowest mean loss among those tried. -> None if there is none"""
    return min(tried(rows, kind), key=lambda s: statistics.mean(losses(rows, kind, s).values()), default=None)


def section(rows, picture):
    """The table of `rates` and what it says; picture: the path of its figure."""
    base = losses(rows, "baseline", 1)
    lines = []
    for kind in ("hc", "home", "paper"):
        for scale in SCALES:
            if loss := losses(rows, kind, scale):
                gains = gain(rows, kind, scale)
                broke = sum(not g < BROKEN for g in gains.values())
                row = [NAMES[kind], f"× {scale}", len(loss), mean_se(loss.values()), paired(loss, base)]
                lines.append([*row, span(gains.values()), f"{broke} of {len(gains)}"])
    header = ["", "rate of α, b", "seeds", "val. loss", "less the baseline's", "peak gain", f"gain above {BROKEN:.0e}"]
    text = (
        f"Baseline: {mean_se(base.values())} ({len(base)} seeds). `config/demo.py`: 1.2M parameters, 20 sublayers, 200 "
        "steps, 410k tokens. `maps_lr_scale` multiplies the rate of α and b of the maps and nothing else; the peak "
        "gain is the largest composite gain, forward or backward, at any depth at any of five looks over training.\n\n"
    )
    return text + table(header, lines) + f"\n\n{findings(rows)}\n\n![rates]({picture})"


def findings(rows):
    """What the table says, in numbers."""
    lines = []
    if min(len(tried(rows, kind)) for kind in ("hc", "home")) >= 3:
        hc, home = best_scale(rows, "hc"), best_scale(rows, "home")
        less = paired(losses(rows, "hc", hc), losses(rows, "home", home))
        lines.append(f"- Each at its best rate: HC × {hc} less mHC × {home}: {less}.")
    for scale in SCALES:
        a, b = losses(rows, "hc", scale), losses(rows, "home", scale)
        if both := a.keys() & b.keys():
            base = losses(rows, "baseline", 1)
            behinds = f"HC is behind mHC in {behind(a, b)}, behind the baseline in {behind(a, base)}"
            lines.append(f"- Both at × {scale}: HC less mHC {paired(a, b)} ({len(both)} of 5 seeds); {behinds}.")
    return "\n".join(lines)


def finish(axes):
    for ax in axes:
        ax.grid(alpha=0.25, linewidth=0.5)
        ax.legend(frameon=False, fontsize=8)


def draw(rows):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    base = list(losses(rows, "baseline", 1).values())
    left.axhline(statistics.mean(base), color=COLORS["baseline"], label="baseline")
    for kind in ("hc", "home", "paper"):
        points = [
            (s, list(v.values()), list(gain(rows, kind, s).values())) for s in SCALES if (v := losses(rows, kind, s))
        ]
        if not points:
            continue
        for ax, column in ((left, 1), (right, 2)):
            style = {"color": COLORS[kind], "label": NAMES[kind], "linewidth": 1.2, "marker": "o", "markersize": 3}
            middle = statistics.mean if column == 1 else statistics.median
            ax.plot([p[0] for p in points], [middle(p[column]) for p in points], **style)
            for p in points:
                ax.scatter([p[0]] * len(p[column]), p[column], color=COLORS[kind], s=6, alpha=0.5)
    for ax, title in ((left, "validation loss (mean; points: seeds)"), (right, "peak composite gain (median)")):
        ax.set(xscale="log", xlabel="maps_lr_scale", title=title)
    finish((left, right))
    right.set_yscale("log")
    return fig
