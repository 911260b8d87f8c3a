"""Draw what the paper draws, from run folders, finished or still going on; nothing is trained here.

    python figures.py out/demo/baseline out/demo/hc out/demo/mhc --out=out/demo/report.png
    python figures.py out/a out/b --figure=loss --out=loss.png          # Figs 2 and 5: loss gap and gradient norm
    python figures.py out/hc out/mhc --figure=gains --out=gains.png     # Figs 3 and 7: single and composite gains
    python figures.py out/mhc --figure=maps --out=maps.png              # Fig 8: H_res with its row and column sums
    python figures.py gpu.json --figure=roofline --out=roofline.png     # a boundary's times, of `make gpu`

Prints one table of the runs. 'report' is all of it on one page.
The loss gap is to the run whose residual is 'baseline'.
"""

import program

if __name__ == "__main__":
    program.begin()  # before anything that takes long to import

import os
import sys
import zipfile
import zlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import owned
from configurator import between, configure, fail, one_of, some
from owned import NotOurs
from records import (
    GPU_REPORT,
    METRIC,
    Missing,
    RecordError,
    Unreadable,
    check,
    number,
    open_file,
    read_bytes,
    read_json,
    read_lines,
    string,
)
from records import one_of as same

figure = "report"  # 'report' | 'loss' | 'gains' | 'maps'; 'roofline': of the gpu.json that `make gpu` leaves
out = "report.png"  # where the picture goes; the ending chooses the format
smooth = 0.02  # the loss gap is a running mean over this fraction of the steps

COLORS = {"baseline": "#777777", "hc": "#d55e00", "mhc": "#0072b2"}
OTHER_COLORS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of residual connections that are not named here
STYLES = ["-", "--", ":", "-."]  # runs with the same residual


CONFIG = {"settings": {"residual": string(1, 50)}}
MARK = b"mHC figures.py"  # inside a picture: ours, and so ours to replace
ABOUT = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}  # where these formats have a place for it


def printable(name):
    """A folder's name as a label: no half characters, and no $, between which matplotlib reads TeX."""
    return name.encode(errors="replace").decode().replace("$", r"\$")


def is_ours(path):
    return MARK in read_bytes(path)


def read_maps(path):
    """{title: H_res (n, n)} of maps.npz; none if there is none. Ends the program for a file that is not train.py's."""
    try:
        with open_file(path) as f, np.load(f) as found:
            large = [i.filename for i in found.zip.infolist() if i.file_size > 1 << 20]
            if large or len(found.files) > 64:
                raise ValueError(f"{(large or ['it'])[0]} is too large for what train.py leaves")
            maps = {printable(title): found[title] for title in found.files}
        for title, M in maps.items():
            if M.ndim != 2 or M.shape[0] != M.shape[1] or not 0 < len(M) <= 64 or M.dtype.kind != "f":
                raise ValueError(f"{title}: wanted a square matrix of floats, got {M.dtype} {M.shape}")
    except Missing:
        return {}
    except (
        RecordError,
        OSError,
        ValueError,
        EOFError,
        LookupError,
        TypeError,
        AttributeError,
        zlib.error,
        zipfile.BadZipFile,
    ) as e:
        fail(f"{path}: not the heat maps of train.py ({' '.join(str(e).split())})")
    return maps


class Run:
    """One run folder: its name, settings, records of steps and of evaluations, and heat maps."""

    def __init__(self, folder):
        self.name = printable(os.path.basename(os.path.abspath(folder)))
        try:
            self.settings = read_json(os.path.join(folder, "config.json"), CONFIG)["settings"]
            metrics = os.path.join(folder, "metrics.jsonl")
            records = list(read_lines(metrics, METRIC, going_on=True))  # a run may be writing its last line
        except (Missing, Unreadable) as e:
            fail(f"{folder}: not a run folder of train.py: {e}")
        except RecordError as e:
            fail(str(e))
        self.steps = [r for r in records if r.get("loss") is not None]
        self.evals = [r for r in records if "val_loss" in r]
        self.residual = self.settings["residual"]
        self.maps = read_maps(os.path.join(folder, "maps.npz"))
        if not self.evals:
            fail(f"{folder}: no evaluation in metrics.jsonl yet; wait for the first")

    def series(self, key):
        """Two arrays: the steps at which `key` was recorded, and its values."""
        pairs = [(r["step"], r[key]) for r in self.steps if r.get(key) is not None]
        return np.array(pairs).reshape(-1, 2).T


def running_mean(values, window):
    """Mean over the last `window` values, or as many as there are."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - window, 0)
    return (sums[last] - sums[first]) / (last - first)


def print_table(runs):
    """One row a run, from its last evaluation. The gains are the largest over the depth of the composite's."""
    print(
        f"{'variant':<12} {'params':>12} {'val_loss':>9} {'bits_per_byte':>13} {'step_ms':>8} {'peak_MB':>8} "
        f"{'gain_fwd':>9} {'gain_bwd':>9}"
    )
    for run in runs:
        last = run.evals[-1]
        gains = (last.get(f"composite_{way}_max") for way in ("fwd", "bwd"))  # the baseline has none
        forward, backward = (shown(max((v for v in g or () if v is not None), default=None), ".3g") for g in gains)
        params, loss, bits, ms, peak = (
            shown(last.get(name), form)
            for name, form in (("params", ",.0f"), ("val_loss", ".4f"), ("bits_per_byte", ".4f"), ("step_ms", ".0f"),
                               ("peak_MB", ".0f"))
        )  # fmt: skip
        print(f"{run.name:<12} {params:>12} {loss:>9} {bits:>13} {ms:>8} {peak:>8} {forward:>9} {backward:>9}")


def shown(value, form):
    """A number of the table; '-' where there is none: not finite, not there, or unknown before the first step."""
    return "-" if value is None else format(value, form)


def look(runs):
    """{run: colour and line style}: colour by residual, line style by the run's index among those of its residual."""
    others = sorted({run.residual for run in runs} - set(COLORS))
    colors = COLORS | {name: OTHER_COLORS[i % len(OTHER_COLORS)] for i, name in enumerate(others)}
    seen, looks = {}, {}
    for run in runs:
        k = seen[run.residual] = seen.get(run.residual, -1) + 1
        looks[run] = {"color": colors[run.residual], "linestyle": STYLES[k % len(STYLES)], "label": run.name}
    return looks


def label(ax, title, x, y):
    ax.set(title=title, xlabel=x, ylabel=y)
    ax.grid(alpha=0.25, linewidth=0.5)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=8)


def draw_loss(ax, runs):
    """Loss gap to the baseline (Figs 2a, 5a), or the loss itself where no run is a baseline."""
    base = next((run for run in runs if run.residual == "baseline"), None)
    for run in runs:
        steps, loss = run.series("loss")
        window = max(1, int(smooth * len(steps)))
        if base is not None:
            at, base_loss = base.series("loss")
            steps, here, there = np.intersect1d(steps, at, return_indices=True)
            loss = loss[here] - base_loss[there]
        ax.plot(steps, running_mean(loss, window), **look(runs)[run], linewidth=1)
    gap = f"training loss gap to {base.name}" if base else "training loss"
    label(ax, f"{gap} (running mean over {smooth:.0%} of the steps)", "step", "nats per token")


def draw_gradient_norm(ax, runs):
    """Gradient norm before clipping (Figs 2b, 5b)."""
    for run in runs:
        ax.plot(*run.series("grad_norm"), **look(runs)[run], linewidth=0.7)
    if any((run.series("grad_norm")[1] > 0).any() for run in runs):
        ax.set_yscale("log")
    label(ax, "gradient norm", "step", "")


def nan_for_null(values):
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def draw_gain(ax, runs, kind, way):
    """Amax gain magnitude by depth (Figs 3, 7): the line is the maximum, the band reaches down to the minimum."""
    highest = 0.0
    for run in (r for r in runs if f"{kind}_{way}_max" in r.evals[-1]):  # one that has maps
        last = run.evals[-1]
        high, low = (nan_for_null(last.get(f"{kind}_{way}_{m}", ())) for m in ("max", "min"))
        high, low = high[: len(low)], low[: len(high)]
        depth, style = np.arange(1, len(high) + 1), look(runs)[run]
        ax.plot(depth, high, **style, linewidth=1.2)
        ax.fill_between(depth, low, high, color=style["color"], alpha=0.12, linewidth=0)
        highest = max(highest, np.nanmax(high, initial=0))
    if highest > 2:
        ax.set_yscale("log")  # Fig 3
    else:
        ax.set_ylim(0, 2)  # Fig 7
    ax.axhline(1, color="black", linewidth=0.5)
    what = {"fwd": "forward (row sums)", "bwd": "backward (column sums)"}[way]
    ax.xaxis.get_major_locator().set_params(integer=True)
    label(ax, f"{kind} mapping, {what}", "sublayer l", "Amax gain magnitude")


def draw_map(ax, title, M):
    """One H_res, averaged over tokens, with its row sums at the right and column sums below (Fig 8)."""
    n = len(M)
    ax.imshow(M, cmap="RdBu_r", vmin=-1, vmax=1)
    size = 7 if n <= 4 else 5
    for i in range(n):
        ax.text(n - 0.35, i, f"{M[i].sum():.3g}", fontsize=size, va="center", color="#0072b2")
        ax.text(i, n - 0.25, f"{M[:, i].sum():.3g}", fontsize=size, ha="center", va="center", color="#d55e00")
        for j in range(n):
            ax.text(
                j,
                i,
                f"{M[i, j]:.2g}",
                fontsize=size - 1,
                ha="center",
                va="center",
                color="white" if abs(M[i, j]) > 0.6 else "black",
            )
    ax.set_title(title, fontsize=8)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def draw_maps(fig, runs):
    """A row of heat maps for each run that has them."""
    runs = [run for run in runs if run.maps]
    if not runs:
        fail("no run here has heat maps (maps.npz): train.py leaves them where the residual connection has maps")
    axes = fig.subplots(len(runs), max(len(run.maps) for run in runs), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for row, run in zip(axes, runs, strict=True):
        for ax, (title, M) in zip(row, run.maps.items(), strict=False):
            ax.set_axis_on()
            draw_map(ax, f"{run.name}: {title}", M)
    fig.suptitle("H_res averaged over tokens; blue: row sums (forward), orange: column sums (backward)", fontsize=9)


def draw(runs):
    """The figure asked for."""
    n_maps = sum(bool(run.maps) for run in runs)
    if figure == "maps":
        fig = plt.figure(figsize=(12, 2.4 * max(1, n_maps)), layout="constrained")
        draw_maps(fig, runs)
        return fig
    rows = {"loss": 1, "gains": 2, "report": 2}[figure]
    height = 3.2 * rows + (2.3 * n_maps if figure == "report" else 0)
    fig = plt.figure(figsize=(12, height), layout="constrained")
    report = figure == "report" and n_maps
    top, bottom = fig.subfigures(2, 1, height_ratios=(3.2 * rows, 2.3 * n_maps)) if report else (fig, None)
    axes = iter(top.subplots(rows, 2).flat)
    if figure != "gains":
        draw_loss(next(axes), runs)
        draw_gradient_norm(next(axes), runs)
    for kind in {"loss": (), "gains": ("single", "composite"), "report": ("composite",)}[figure]:
        for way in ("fwd", "bwd"):
            draw_gain(next(axes), runs, kind, way)
    if bottom:
        draw_maps(bottom, runs)
    return fig


def draw_runs(folders):
    if figure == "roofline":
        fail(f"figure='roofline': wanted one gpu.json, got {len(folders)} files or folders")
    runs = [Run(folder) for folder in folders]
    print_table(runs)
    return draw(runs)


# -- what `make gpu` has measured --------------------------------------------------------------------------------------

BOUNDARY = {"what": string(), "way": string(), "tokens": number(1), "ms": number(0), "GB_s": number(1e-9),
            "TFLOP_s": number(1e-9)}  # fmt: skip
WAYS = {"forward": "o", "forward + backward": "s"}  # and their markers


def of_kind(records, kind):
    """Those of a stage's records that have these fields."""
    for record in records:
        try:
            yield check(record, kind, "")
        except RecordError:
            continue


def read_gpu(path):
    """gpu.json -> the card, the measured roofs (GB/s, TFLOP/s), the timed boundaries. Ends the program without them."""
    try:
        stages = read_json(path, GPU_REPORT)["stages"]
    except RecordError as e:
        fail(f"{e}; wanted the gpu.json that `make gpu` leaves")
    records = {name: stage["records"] for name, stage in stages.items()}
    roofs = records.get("ceilings", [])
    copies = [r["GB_s"] for r in of_kind(roofs, {"what": same("copy"), "GB_s": number(1e-9)})]
    products = [r["TFLOP_s"] for r in of_kind(roofs, {"what": same("GEMM"), "TFLOP_s": number(1e-9)})]
    timed = list(of_kind(records.get("kernels", []), BOUNDARY))
    if not (copies and products and timed):
        fail(f"{path}: wanted numbers of the stages ceilings and kernels, which are not in it: run `make gpu` again")
    card = next((r["card"] for r in of_kind(records.get("versions", []), {"card": string()})), "unknown card")
    return printable(card), max(copies), max(products), timed


def draw_roofline(path):
    """A boundary under the roofs that were measured beside it, and its share of the bandwidth by tokens."""
    card, bandwidth, peak, timed = read_gpu(path)
    names = list(dict.fromkeys(r["what"] for r in timed))
    fixed = {"mHC": COLORS["mhc"], "HC": COLORS["hc"]}
    others = [name for name in names if name not in fixed]
    colors = fixed | {name: OTHER_COLORS[i % len(OTHER_COLORS)] for i, name in enumerate(others)}
    fig = plt.figure(figsize=(12, 4.4), layout="constrained")
    roof, share = fig.subplots(1, 2)
    draw_roofs(roof, bandwidth, peak)
    for name in names:
        for way, marker in WAYS.items():
            mine = sorted((r for r in timed if (r["what"], r["way"]) == (name, way)), key=lambda r: r["tokens"])
            if not mine:
                continue
            style = {"color": colors[name], "marker": marker, "label": printable(f"{name}, {way}"), "markersize": 4}
            speed = [r["TFLOP_s"] for r in mine]
            roof.plot([1e3 * r["TFLOP_s"] / r["GB_s"] for r in mine], speed, linestyle="", **style)
            style["linestyle"] = "-" if way == "forward" else "--"
            share.plot([r["tokens"] for r in mine], [r["GB_s"] / bandwidth for r in mine], linewidth=1, **style)
    label(roof, f"{card}: a boundary under the measured roofs", "FLOP per byte", "TFLOP/s")
    share.set_xscale("log", base=2)
    share.set_ylim(bottom=0)
    label(share, "bandwidth, as a share of a copy's (all: of our kernels' bytes)", "tokens", "")
    print(f"{card}: a copy {bandwidth:.0f} GB/s, products {peak:.0f} TFLOP/s, {len(timed)} times of a boundary")
    return fig


def draw_roofs(ax, bandwidth, peak):
    """min(bandwidth * intensity, peak), on both sides of the ridge. bandwidth in GB/s, peak in TFLOP/s."""
    ridge = 1e3 * peak / bandwidth  # FLOP per byte
    intensity = np.array([1, ridge, 10 * ridge])
    ax.plot(intensity, np.minimum(bandwidth * intensity / 1e3, peak), color="black", linewidth=1)
    ax.annotate(f"copy {bandwidth:.0f} GB/s", (1, bandwidth / 1e3), fontsize=8, va="bottom")
    ax.annotate(f"bf16 products {peak:.0f} TFLOP/s", (ridge, peak), fontsize=8, va="bottom")
    ax.set(xscale="log", yscale="log")


def main():
    folders = [a for a in sys.argv[1:] if not a.startswith("-") and not a.endswith(".py")]
    configure(
        globals(),
        {
            "figure": one_of("report", "loss", "gains", "maps", "roofline"),
            "smooth": between(0, 1),
            "out": some("a file"),
        },
        [a for a in sys.argv[1:] if a not in folders],
    )
    if not folders:
        fail("wanted run folders: python figures.py out/demo/baseline out/demo/hc out/demo/mhc")
    ending = check_out()
    fig = draw_roofline(*folders) if figure == "roofline" and len(folders) == 1 else draw_runs(folders)
    about = {"metadata": {ABOUT[ending]: MARK.decode()}} if ending in ABOUT else {}
    try:
        with owned.whole_file(out, is_ours, binary=True) as f:
            fig.savefig(f, format=ending[1:], dpi=140, **about)
    except OSError as e:  # a full disk
        fail(f"out={out!r}: cannot be drawn there: {e}")
    print(f"drawn: {out}")


def check_out():
    """The ending of the picture's name, once it is known that it can be drawn there."""
    ending, known = os.path.splitext(out)[1].lower(), matplotlib.backend_bases.FigureCanvasBase.filetypes
    if ending[1:] not in known:
        fail(f"out={out!r}: wanted a name that ends in one of {', '.join('.' + k for k in sorted(known))}")
    if not os.path.isdir(folder := os.path.dirname(out) or "."):
        fail(f"out={out!r}: there is no folder {folder}")
    try:
        owned.check_place(out)
        owned.check_file(out, is_ours)
    except (NotOurs, RecordError) as e:
        fail(f"out={out!r}: {e}")
    return ending


if __name__ == "__main__":
    program.run(main)
