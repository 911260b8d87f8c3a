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
from experiments import DEMO, EXPERIMENTS, read_rows, results
from records import read_bytes
from tools import rates, sections
from tools.rates import COLORS, KINDS, NAMES, SCALES, finish, losses
from tools.rows import floats, mean_se, paired, pick, shared, span, table, values
from tools.verdicts import not_run, verdicts

out = "REPORT.md"
assets = "assets"  # folder of the pictures


# -- the demo ---------------------------------------------------------------------------------------------------------


def demo_rows(rows):
    """{kind: {seed: row}} of the demo's settings."""
    scale = read_file(DEMO).get("maps_lr_scale", 1)
    found = {kind: pick(rows, **KINDS[kind], maps_lr_scale=f"{scale:g}") for kind in ("hc", "home")}
    return {"baseline": pick(rows, **KINDS["baseline"])} | found


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
    finish(axes)
    save(fig, "demo")


def read(name):
    """An experiment's rows."""
    return read_rows(os.path.join(results, f"{name}.csv"))


# -- the other experiments ---------------------------------------------------------------------------------------------


def section(name):
    """An experiment's title, and what its rows say (tools/sections.py), or that it has none; its figure is drawn."""
    title, rows = f"## {name}: {EXPERIMENTS[name].question}", read(name)
    if not rows:
        return f"{title}\n\n{not_run(name)}"
    text, fig = sections.SECTIONS[name](rows)
    done = f"{len(rows)} of {len(EXPERIMENTS[name].cells())} cells."
    if all_have := shared(rows):
        done += f" All: {all_have}."
    if fig:
        save(fig, name)
        text += f"\n\n![{name}]({os.path.join(assets, f'{name}.png')})"
    return f"{title}\n\n{done}\n\n{text}"


# -- the leaderboard -------------------------------------------------------------------------------------------------


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


def rates_section(rows):
    return rates.section(rows, os.path.join(assets, "rates.png")) if rows else not_run("rates")


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
        table(["claim", "the paper's", "ours", "command", "training time", "verdict"], verdicts(read)),
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
    rows = read("rates")
    if losses(rows, "baseline", 1):
        save(rates.draw(rows), "rates")
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
