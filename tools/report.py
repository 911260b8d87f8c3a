"""REPORT.md and its figures from results/*.csv: nothing is trained here.

    make report                        # or: python tools/report.py
    python tools/report.py --out=/tmp/REPORT.md --assets=/tmp/assets

Every number of REPORT.md is computed here from rows that experiments.py has written; what has no rows is said not to
have been run, with the command that would. Differences are paired by seed. A mean has its standard error behind it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules in the root
import program

if __name__ == "__main__":
    program.begin()  # before torch, and before anything that takes long to import

import csv
import math
import os
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import owned
from configurator import configure, fail, read_file
from experiments import DEMO, ELSEWHERE, EXPERIMENTS, read_rows, results
from records import read_bytes
from tools import sections
from tools.rows import behind, floats, is_below, mean_se, paired, pick, span, table, values

out = "REPORT.md"
assets = "assets"  # folder of the pictures

BASELINE, HC = {"residual": "baseline"}, {"residual": "hc"}
HOME, PAPER = ({"residual": "mhc", "maps_init": init} for init in ("home", "paper"))
COLORS = {"baseline": "#777777", "hc": "#d55e00", "home": "#0072b2", "paper": "#56b4e9"}
NAMES = {"baseline": "baseline", "hc": "HC", "home": "mHC, 'home'", "paper": "mHC, 'paper'"}
KINDS = {"baseline": BASELINE, "hc": HC, "home": HOME, "paper": PAPER}
SCALES = (1, 10, 30, 100, 300)
BROKEN = 1e6  # a gain beyond which the maps are called broken


def command_of(name):
    return f"`{ELSEWHERE.get(name) or f'python experiments.py {name}'}`"


def not_run(name):
    return f"Not run yet: {command_of(name)}."


# -- rates ------------------------------------------------------------------------------------------------------------


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


def rates_section(rows):
    if not rows:
        return not_run("rates")
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
    return text + table(header, lines) + f"\n\n{rates_findings(rows)}\n\n![rates]({os.path.join(assets, 'rates.png')})"


def rates_findings(rows):
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


def draw_rates(rows):
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
        ax.grid(alpha=0.25, linewidth=0.5)
        ax.legend(frameon=False, fontsize=8)
    right.set_yscale("log")
    save(fig, "rates")


# -- the demo ---------------------------------------------------------------------------------------------------------


def demo_rows(rows):
    """{kind: {seed: row}} of the demo's settings."""
    scale = read_file(DEMO).get("maps_lr_scale", 1)
    found = {kind: pick(rows, **KINDS[kind], maps_lr_scale=f"{scale:g}") for kind in ("hc", "home")}
    return {"baseline": pick(rows, **BASELINE)} | found


def demo_done(rows):
    """Whether all five seeds are there: README shows the demo's table and picture."""
    return all(len(some) >= 5 for some in demo_rows(rows).values())


def demo_table(rows):
    """README's table."""
    kinds, lines = demo_rows(rows), []
    base = values(kinds["baseline"], "val_loss")
    for kind, some in kinds.items():
        if not some:
            continue
        loss, params = values(some, "val_loss"), int(next(iter(some.values()))["params"])
        gains = (
            ["–", "–"] if kind == "baseline" else [span(values(some, f"gain_{w}_max").values()) for w in ("fwd", "bwd")]
        )
        less = "–" if kind == "baseline" else paired(loss, base)
        name = "mHC" if kind == "home" else NAMES[kind]
        lines.append([name, f"{params:,}", *gains, mean_se(loss.values()), less, len(some)])
    header = ["", "parameters", "gain forward", "gain backward", "val. loss", "less the baseline's", "seeds"]
    return table(header, lines)


def demo_section(rows):
    if not demo_done(rows):
        return not_run("demo")
    return f"{demo_table(rows)}\n\n![demo]({os.path.join(assets, 'demo.png')})"


def band(ax, x, curves, kind, label):
    """Each seed thin, their geometric or plain mean thick."""
    log = ax.get_yscale() == "log"
    for curve in curves:
        ax.plot(x, curve, color=COLORS[kind], linewidth=0.5, alpha=0.5)
    mean = np.exp(np.log(curves).mean(0)) if log else curves.mean(0)
    ax.plot(x, mean, color=COLORS[kind], linewidth=1.6, label=label)


def draw_demo(rows):
    """Gains over depth first, then the loss: each seed, and the mean."""
    kinds = demo_rows(rows)
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for ax, way, title in zip(axes, ("fwd", "bwd"), ("forward (row sums)", "backward (column sums)"), strict=False):
        ax.set_yscale("log")
        for kind in ("hc", "home"):
            if kinds[kind]:
                curves = np.stack([floats(r, f"{way}_max") for r in kinds[kind].values()])
                band(ax, np.arange(1, curves.shape[1] + 1), curves, kind, "mHC" if kind == "home" else "HC")
        ax.axhline(1, color="black", linewidth=0.5)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(title=f"composite gain, {title}", xlabel="sublayer l", ylabel="Amax gain magnitude")
    base = kinds["baseline"]
    for kind in ("hc", "home"):
        seeds = sorted(kinds[kind].keys() & base.keys())
        if seeds:
            curves = np.stack([floats(kinds[kind][s], "loss_curve") - floats(base[s], "loss_curve") for s in seeds])
            band(axes[2], floats(base[seeds[0]], "at_step"), curves, kind, "mHC" if kind == "home" else "HC")
    axes[2].axhline(0, color=COLORS["baseline"], linewidth=1, label="baseline")
    axes[2].set(title="training loss less the baseline's, same seed", xlabel="step", ylabel="nats per token")
    for ax in axes:
        ax.grid(alpha=0.25, linewidth=0.5)
        ax.legend(frameon=False, fontsize=8)
    save(fig, "demo")


# -- the other experiments ---------------------------------------------------------------------------------------------


def section(name):
    """An experiment's title, and what its rows say (tools/sections.py), or that it has none; its figure is drawn."""
    title, rows = f"## {name}: {EXPERIMENTS[name].question}", read_rows(os.path.join(results, f"{name}.csv"))
    if not rows:
        return f"{title}\n\n{not_run(name)}"
    text, fig = sections.SECTIONS[name](rows)
    done = f"{len(rows)} of {len(EXPERIMENTS[name].cells())} cells."
    if fig:
        save(fig, name)
        text += f"\n\n![{name}]({os.path.join(assets, f'{name}.png')})"
    return f"{title}\n\n{done}\n\n{text}"


# -- the first page ---------------------------------------------------------------------------------------------------


def verdicts(rows):
    """(claim, the paper's number, ours, command, seconds of training, verdict) of each claim."""
    seconds = sum(float(r["seconds"]) for r in rows.values())
    run = ("`python experiments.py rates`", f"{seconds / 3600:.1f} core-hours")
    lines = []

    def claim(what, paper, ours, verdict, by=run):
        lines.append([what, paper, ours, *by, verdict])

    def waiting(what, paper, name, ours="not run yet", verdict="open"):
        claim(what, paper, ours, verdict, (command_of(name), "–"))

    if gain(rows, "hc", 100) and gain(rows, "home", 100):
        claims_of_rates(rows, claim)
    else:
        waiting("HC's gain explodes over depth, mHC's does not; mHC trains on where HC breaks", "3000 / 1.6", "rates")
    waiting("the order of losses, each at its best rate, at three sizes (Fig 5)", "mHC −0.021 (27B)", "sizes")
    waiting("H_res brings most of the gain (Table 1, HC)", "−0.022 of −0.027", "ablation")
    waiting("gains over 8 to 96 sublayers (Figs 3, 7)", "3000 / 1.6", "depth")
    elsewhere = {"ours": "README, 'Sample, evaluate, measure'", "verdict": "on CPUs alone"}
    waiting("added step time", "6.7 % (their cluster)", "overhead", **elsewhere)
    claim_of_memory(waiting)
    waiting("a trained baseline goes on as mHC", "–", "upcycling")
    waiting("the gap persists with compute (Fig 6)", "attenuates slightly", "sizes")
    waiting("benchmarks (Table 4)", "mHC ahead of HC in 7 of 8 (27B)", "downstream", verdict="out of reach here")
    return lines


def claim_of_memory(waiting):
    rows = read_rows(os.path.join(results, "memory.csv"))
    cut = [r for r in rows.values() if r["sublayers"] == "60" and r["recompute"] == "mhc"]
    least = min(cut, key=lambda r: float(r["peak"]), default=None)
    seen = {"ours": f"60 sublayers: L_r = {least['L_r']}, counted", "verdict": "reproduced"} if least else {}
    if least and abs(int(least["L_r"]) - int(least["best_L_r"])) > 1:
        seen["verdict"] = "not reproduced"
    waiting("memory of recomputation is smallest near L_r* (Table 3, Eq 20)", "L_r* ≈ 6.3", "memory", **seen)


def claims_of_rates(rows, claim):
    """The claims that `rates` speaks to, at toy size. Fewer than five seeds are no verdict."""
    base, hc, home = losses(rows, "baseline", 1), losses(rows, "hc", 100), losses(rows, "home", 100)
    gains = [(s, gain(rows, "hc", s), gain(rows, "home", s)) for s in (1, 100)]
    seen = [f"× {s}: HC {span(a.values())}, mHC {span(b.values())}" for s, a, b in gains if a and b]
    broken = sum(not g < BROKEN for g in gains[-1][1].values())
    all_break = broken == len(hc) and all(hc[s] > base[s] for s in hc.keys() & base.keys())
    claim("HC's gain explodes over depth, mHC's does not (Figs 3, 7)", "3000 / 1.6 (27B)", "; ".join(seen),
          verdict("reproduced, at toy size", hc, home))  # fmt: skip
    claim(
        "mHC trains on where HC breaks (Fig 2)",
        "HC's loss surges at step 12k of 50k",
        f"× 100: HC's gain passes {BROKEN:.0e} in {broken} of {len(hc)}; HC less mHC {paired(hc, home)}, "
        f"behind it in {behind(hc, home)}, behind the baseline in {behind(hc, base)}",
        verdict(f"{'reproduced' if all_break else 'in part'}, with the rate of α and b raised", hc, home),
    )
    claim("mHC beats the baseline (Fig 5)", "−0.021 (27B)", f"× 100: {paired(home, base)}",
          verdict("reproduced, at toy size" if is_below(home, base) else "not reproduced", home, base))  # fmt: skip
    a, b = (tried(rows, kind) for kind in ("hc", "home"))
    if min(len(a), len(b)) < 3:
        seen = f"rates tried with all seeds: HC {words(a)}, mHC {words(b)}"
        return claim(
            "mHC beats HC, each at its best rate (Table 4)", "7 of 8 benchmarks", seen, "open: three are wanted"
        )
    hc, home = losses(rows, "hc", best_scale(rows, "hc")), losses(rows, "home", best_scale(rows, "home"))
    claim("mHC beats HC, each at its best rate (Table 4)", "7 of 8 benchmarks", f"mHC less HC {paired(home, hc)}",
          "reproduced, at toy size" if is_below(home, hc) else "not reproduced here")  # fmt: skip


def words(scales):
    return ", ".join(f"× {s}" for s in scales) or "none"


def verdict(words, *losses):
    """words, if each of these {seed: number} has at least five seeds."""
    fewest = min(map(len, losses))
    return words if fewest >= 5 else f"open: {fewest} of 5 seeds"


def leaderboard(rows):
    """Our means at the demo's settings, then the lines of results/leaderboard.csv, best loss first."""
    lines = []
    for kind in KINDS:
        for scale in (1,) if kind == "baseline" else SCALES:
            some = pick(rows, **KINDS[kind], **({} if kind == "baseline" else {"maps_lr_scale": scale}))
            loss = list(values(some, "val_loss").values())
            if len(loss) > 1 and all(map(math.isfinite, loss)):
                row = next(iter(some.values()))
                name = NAMES[kind] + ("" if kind == "baseline" else f", maps_lr_scale={scale}")
                flags = row["cell"].rsplit(",seed=", 1)[0].replace(",", " --")
                command = f"`python train.py config/demo.py --{flags}`"
                lines.append(
                    (statistics.mean(loss), ["demo.py", name, mean_se(loss), row["tokens"], command, row["commit"]])
                )
    path = os.path.join(results, "leaderboard.csv")
    if os.path.exists(path):
        with open(path, newline="") as f:
            for row in csv.reader(f):
                if row and row[0] != "config":
                    lines.append((float(row[2].split()[0]), row))
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


# -- the page ---------------------------------------------------------------------------------------------------------


def page(rows):
    n = len(EXPERIMENTS["rates"].cells())
    parts = [
        "# What of the paper can be seen on a CPU",
        f"<!-- {MARK.decode()} -->",
        "Written by `make report` from `results/*.csv`, which `python experiments.py NAME` fills; no number is typed "
        "in by hand. Losses are validation losses in nats a token, means ± standard errors over seeds; differences are "
        "paired by seed, which fixes weights and data alike. 1.2M parameters say nothing about the losses at 27B; what "
        "may carry over is the mechanism, the gain.",
        table(["claim", "the paper's", "ours", "command", "training time", "verdict"], verdicts(rows)),
        f"## The rate of the maps ({len(rows)} of {n} cells)\n\n{rates_section(rows)}",
        f"## The demo over five seeds\n\n{demo_section(rows)}",
        *map(section, sections.SECTIONS),
        "## Leaderboard\n\nA line is a mean over seeds. To add one, append `config,variant,loss,tokens,command,commit` "
        "to `results/leaderboard.csv` and run `make report`.\n\n"
        + table(["config", "variant", "val. loss", "tokens", "command", "commit"], leaderboard(rows)),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


MARK = b"mHC tools/report.py"  # inside a picture or a page: ours, and so ours to replace
HERE = Path(__file__).resolve().parent.parent


def is_ours(path):
    """Whether a file is one that this program has made: it bears the mark, or is in its place in this repository."""
    return Path(path).absolute() in (HERE / "REPORT.md", HERE / "assets" / Path(path).name) or MARK in read_bytes(path)


def save(fig, name):
    path = os.path.join(assets, f"{name}.png")
    try:
        os.makedirs(assets, exist_ok=True)
        with owned.whole_file(path, is_ours, binary=True) as f:
            fig.savefig(f, dpi=130, format="png", metadata={"Software": MARK.decode()})
    except OSError as e:
        fail(f"assets={assets!r}: {path} cannot be drawn: {e.strerror}")
    plt.close(fig)


def main():
    configure(globals())
    rows = read_rows(os.path.join(results, "rates.csv"))
    if losses(rows, "baseline", 1):
        draw_rates(rows)
    if demo_done(rows):
        draw_demo(rows)
    try:
        with owned.whole_file(out, is_ours) as f:
            f.write(page(rows))
    except OSError as e:
        fail(f"out={out!r}: cannot be written: {e.strerror}")
    print(f"{out}: {len(rows)} cells of rates")


if __name__ == "__main__":
    program.run(main, owned.NotOurs)
