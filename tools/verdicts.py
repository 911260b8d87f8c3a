"""REPORT.md's first page: each claim, the paper's number, ours, and whether it is reproduced; all of it from rows.

`read(name)` gives an experiment's rows. Fewer than five seeds are no verdict ('open'). A loss is ahead of another where
it is lower by more than two standard errors of the difference paired by seed.
"""

import math
import statistics

from experiments import ASKED, SIZES
from tools import sections
from tools.rates import BASELINE, BROKEN, HC, HOME, best_scale, gain, losses, tried
from tools.rows import behind, differences, exactly, is_below, loss_of, mean_se, paired, span, standing, values
from tools.sections import at_size, size_name

SEEDS = 5  # for a verdict
MHC = {"residual": "mhc"}
SAME = 2e-3  # losses that are equal but for rounding: rows keep four digits
BOUNDED, LARGE = 3, 1000  # gains: the paper's are 1.6 and 3000


def command_of(*names):
    return f"`python experiments.py {' '.join(names)}`"


def not_run(name):
    return f"Not run yet: {command_of(name)}."


def time_of(*tables):
    """The training time that is in the rows."""
    seconds = sum(float(r.get("seconds") or 0) for rows in tables for r in rows.values())
    if not seconds:
        return "–"
    return f"{seconds / 3600:.1f} core-hours" if seconds >= 360 else f"{seconds / 60:.1f} core-minutes"


def verdict(words, *losses):
    """words, if each of these {seed: number} has at least five seeds."""
    fewest = min(map(len, losses))
    return words if fewest >= SEEDS else f"open: {fewest} of {SEEDS} seeds"


def share_of(found):
    """'reproduced', 'in part' or 'not reproduced', at toy size, of a list of truths."""
    words = "reproduced" if all(found) else "in part" if any(found) else "not reproduced"
    return f"{words}, at toy size"


def verdicts(read):
    """[claim, the paper's number, ours, command, training time, verdict] of each claim."""
    lines = []
    for names, claims, waiting in CLAIMS:
        tables = [read(name) for name in names]
        by = [command_of(*names), time_of(*tables)]
        found = claims(tables[-1]) if tables[-1] else []
        found = found or [claim if len(claim) == 4 else (*claim, "not run yet", "open") for claim in waiting]
        lines += [[what, paper, ours, *by, verdict] for what, paper, ours, verdict in found]
    return lines


# -- rates -------------------------------------------------------------------------------------------------------------


def of_rates(rows):
    """The claims that `rates` speaks to."""
    base, hc, home = losses(rows, "baseline", 1), losses(rows, "hc", 100), losses(rows, "home", 100)
    if not (hc and home):
        return []
    gains = [(s, gain(rows, "hc", s), gain(rows, "home", s)) for s in (1, 100)]
    seen = [f"× {s}: HC {span(a.values())}, mHC {span(b.values())}" for s, a, b in gains if a and b]
    broken = sum(not g < BROKEN for g in gains[-1][1].values())
    all_break = broken == len(hc) and all(hc[s] > base[s] for s in hc.keys() & base.keys())
    return [
        ("HC's gain explodes over depth, mHC's does not (Figs 3, 7)", "3000 / 1.6 (27B)", "; ".join(seen),
         verdict("reproduced, at toy size", hc, home)),
        ("mHC trains on where HC breaks (Fig 2)", "HC's loss surges at step 12k of 50k",
         f"× 100: HC's gain passes {BROKEN:.0e} in {broken} of {len(hc)}; HC less mHC {paired(hc, home)}, "
         f"behind it in {behind(hc, home)}, behind the baseline in {behind(hc, base)}",
         verdict(f"{'reproduced' if all_break else 'in part'}, with the rate of α and b raised", hc, home)),
        ("mHC beats the baseline (Fig 5)", "−0.021 (27B)", f"× 100: {paired(home, base)}",
         verdict("reproduced, at toy size" if is_below(home, base) else "not reproduced", home, base)),
        best_rates(rows),
    ]  # fmt: skip


def best_rates(rows):
    claim = ("mHC beats HC, each at its best rate (Table 4)", "7 of 8 benchmarks")
    a, b = (tried(rows, kind) for kind in ("hc", "home"))
    if min(len(a), len(b)) < 3:
        return *claim, f"rates tried with all seeds: HC {words(a)}, mHC {words(b)}", "open: three are wanted"
    hc, home = (losses(rows, kind, best_scale(rows, kind)) for kind in ("hc", "home"))
    found = "reproduced, at toy size" if is_below(home, hc) else "not reproduced here"
    return *claim, f"mHC less HC {paired(home, hc)}", found


def words(scales):
    return ", ".join(f"× {s}" for s in scales) or "none"


# -- sizes -------------------------------------------------------------------------------------------------------------

AHEAD = ("mHC beats the baseline at three sizes, each at its best rate (Fig 5)", "−0.021 (27B)")
ORDER = ("mHC beats HC at three sizes, each at its best rate (Table 4)", "7 of 8 benchmarks (27B)")
SCALING = ("the gap persists with compute (Fig 6)", "attenuates slightly")


def of_sizes(rows):
    """At seeds that did not choose the rates: whether mHC is ahead at each size, and what becomes of its gap."""
    there = [size for size in SIZES if at_size(rows, size, MHC)]
    base, hc, mhc = ([values(at_size(rows, size, kind), "val_loss") for size in there] for kind in (BASELINE, HC, MHC))
    names = [size_name(tuple(size.items())) for size in there]
    if not there:
        return []
    lines = []
    for claim, other in ((AHEAD, base), (ORDER, hc)):
        seen = [f"{name}: {paired(a, b)}" for name, a, b in zip(names, mhc, other, strict=True)]
        found = share_of([is_below(a, b) for a, b in zip(mhc, other, strict=True)])
        lines.append((*claim, "; ".join(seen), at_sizes(there, found, *mhc, *other)))
    return [*lines, persists(mhc, base, names, there)]


def at_sizes(there, words, *losses):
    """The verdict, and how many sizes it speaks of if not of all."""
    found = verdict(words, *losses)
    return found if len(there) == len(SIZES) else f"{found}; {len(there)} of {len(SIZES)} sizes"


def persists(mhc, base, names, there):
    """Relative to the baseline's loss, like Fig 6; a gap that loses more than a quarter is 'in part'."""
    gaps = [{s: 100 * d / b[s] for s, d in differences(a, b).items()} for a, b in zip(mhc, base, strict=True)]
    seen = "; ".join(f"{name}: {mean_se(gap.values(), 2)} %" for name, gap in zip(names, gaps, strict=True))
    if min(map(len, gaps)) < SEEDS or len(there) < 2:
        return *SCALING, seen, at_sizes(there, "open: two sizes are wanted", *gaps)
    shrunk = statistics.mean(gaps[-1].values()) > statistics.mean(gaps[0].values()) * 3 / 4  # both are negative
    found = ("in part: it shrinks" if shrunk else "reproduced") if is_below(mhc[-1], base[-1]) else "not reproduced"
    change = f"largest less smallest {paired(gaps[-1], gaps[0], 2)}"
    ours = f"mHC's loss against the baseline's: {seen}; {change}"
    return *SCALING, ours, at_sizes(there, f"{found}, at toy size", *gaps)


# -- ablation, depth ---------------------------------------------------------------------------------------------------

TABLE_1 = ("H_res brings most of the gain (Table 1, HC)", "−0.022 of −0.027")


def of_ablation(rows):
    """'Most': res alone brings more than half of what all three bring, by two standard errors of that difference."""
    base = loss_of(rows, **BASELINE)
    kinds = ("res", "pre,res", "pre,post,res")
    some = [loss_of(rows, **HC, learned_maps=maps, maps_lr_scale=1) for maps in kinds]
    seen = [f"{maps.replace(',', '+')} {paired(loss, base)}" for maps, loss in zip(kinds, some, strict=True)]
    half = {s: (base[s] + some[-1][s]) / 2 for s in base.keys() & some[-1].keys()}
    found = share_of([is_below(some[0], base), is_below(some[0], half)])
    return [(*TABLE_1, f"× 1: {', '.join(seen)}", verdict(found, base, *some))]


GAINS = ("gains over 8 to 96 sublayers (Figs 3, 7)", "3000 / 1.6")
LIVES = ("mHC lives where HC dies, over depth (Fig 2)", "HC's loss surges at step 12k of 50k")


def at_depth(rows, kind, scale, column):
    """{sublayers: {seed: number}} of `depth`."""
    layers = sorted({int(r["n_layer"]) for r in rows.values()})
    found = {2 * n: exactly(rows, n_layer=n, maps_lr_scale=scale, **kind) for n in layers}
    return {n: values(some, column) for n, some in found.items() if some}


def of_depth(rows):
    return [gains_over_depth(rows), lives_where_hc_dies(rows)]


def gains_over_depth(rows):
    """Reproduced at the common rate, in part where only the raised rate shows it."""
    seen, shows, least = [], [], []
    for scale in (1, 100):
        hc, home = (at_depth(rows, kind, scale, "gain_peak") for kind in (HC, HOME))
        if not (hc and home):
            continue
        deepest = max(hc)
        highest = max(v for some in home.values() for v in some.values())
        seen.append(f"× {scale}: HC at {deepest} {span(hc[deepest].values())}, mHC at most {highest:.2g}")
        shows.append(min(hc[deepest].values()) > LARGE and highest < BOUNDED)
        least += [*hc.values(), *home.values()]
    if not seen:
        return *GAINS, "neither HC nor mHC 'home' has rows", "open"
    found = "not reproduced" if not any(shows) else "reproduced" if shows[0] else "in part: with the rate raised"
    whole = len(seen) == 2 and len(least) == 16
    return *GAINS, "; ".join(seen), verdict(f"{found}, at toy size", *least) if whole else "open: depths are missing"


def lives_where_hc_dies(rows):
    """At the raised rate, the deepest model: HC's gain is broken, or its loss is no number any more before one was
    looked at, and its loss is behind mHC's in each seed."""
    seen, died = [], 0
    gains = at_depth(rows, HC, 100, "gain_peak")
    hc, home = (at_depth(rows, kind, 100, "val_loss") for kind in (HC, HOME))
    both = [n for n in hc if n in home]
    for n in both:
        seeds = hc[n].keys() & home[n].keys()
        broken = {s for s in seeds if not gains[n][s] < BROKEN or not math.isfinite(hc[n][s])}
        died = sum(hc[n][s] > home[n][s] and math.isfinite(home[n][s]) for s in broken)
        seen.append(f"{n}: {died} of {len(seeds)}")
    if not both:
        return *LIVES, "neither HC nor mHC 'home' has rows", "open"
    deepest = both[-1]
    found = share_of([died >= 1, died == len(hc[deepest])])
    what = f"HC's gain passes {BROKEN:.0e}, or its loss is no number any more, and it is behind mHC"
    ours = f"× 100: {what}, by sublayers: {', '.join(seen)}"
    return *LIVES, ours, verdict(f"{found}, with the rate of α and b raised", hc[deepest], home[deepest])


# -- upcycling ---------------------------------------------------------------------------------------------------------

UPCYCLING = ("a trained baseline is better continued as mHC", "–")


def of_upcycling(rows):
    """The paper says nothing of it: ahead, level or behind, and nothing unless all of a seed started at one loss."""
    found = {name: values(some, "val_loss") for name, some in sections.continued(rows).items()}
    base, mhc = found.get("baseline", {}), found.get("mHC × 100", {})
    seen = [f"{name} {paired(loss, base)}" for name, loss in found.items() if name != "baseline"]
    apart = sections.apart_at_start(rows)
    ours = f"less the continued baseline: {', '.join(seen)}; starts at most {apart:.0e} apart"
    words = f"{standing(mhc, base)} the baseline, at toy size" if apart <= SAME else "open: starts differ"
    return [(*UPCYCLING, ours, verdict(words, mhc, base))]


# -- those without a loss ----------------------------------------------------------------------------------------------

TABLE_3 = ("memory of recomputation is smallest near L_r* (Table 3, Eq 20)", "L_r* ≈ 6.3")


def of_memory(rows):
    cut = [r for r in rows.values() if r["sublayers"] == "60" and r["recompute"] == "mhc"]
    if not cut:
        return []
    least = min(cut, key=lambda r: float(r["peak"]))
    near = abs(int(least["L_r"]) - int(least["best_L_r"])) <= 1
    return [(*TABLE_3, f"60 sublayers: L_r = {least['L_r']}, counted", "reproduced" if near else "not reproduced")]


def of_overhead(rows):
    """Measured at the widest block; no verdict, since the paper's is a cluster's."""
    timed = [r for r in rows.values() if r.get("width")]
    if not timed:
        return []
    r = max(timed, key=lambda r: (int(r["width"]), int(r["blocks"])))
    ours = f"C = {r['width']}: mHC {r['mHC eager']} ± {r['mHC eager ±']} %, HC {r['HC']} ± {r['HC ±']} %"
    return [(*OVERHEAD, ours, "on CPUs alone")]


AT_CHANCE = "out of reach here: both at chance"


def of_downstream(rows):
    """mHC against HC in the tasks at which either of them is better than chance."""
    hc, mhc = ({task: sections.right(rows, task, kind) for task in ASKED} for kind in (HC, MHC))
    seen = [f"{task}: mHC less HC {paired(mhc[task], hc[task], 1)} %" for task in ASKED]
    known = [task for task in ASKED if any(sections.above_chance(rows, task, kind) for kind in (HC, MHC))]
    words = share_of([is_below(hc[task], mhc[task]) for task in known]) if known else AT_CHANCE
    return [(*TABLE_4, "; ".join(seen), verdict(words, *hc.values(), *mhc.values()))]


OVERHEAD, TABLE_4 = (
    ("added step time", "6.7 % (their cluster)"),
    ("benchmarks (Table 4)", "mHC ahead of HC in 7 of 8 (27B)"),
)
CLAIMS = [  # the experiments (the last has the rows), what they say, and the claims that wait for them
    (
        ("rates",),
        of_rates,
        [("HC's gain explodes over depth, mHC's does not; mHC trains on where HC breaks", "3000 / 1.6")],
    ),
    (("tune", "sizes"), of_sizes, [AHEAD, ORDER, SCALING]),
    (("ablation",), of_ablation, [TABLE_1]),
    (("depth",), of_depth, [GAINS, LIVES]),
    (("overhead",), of_overhead, [(*OVERHEAD, "README, 'Sample, evaluate, measure'", "on CPUs alone")]),
    (("memory",), of_memory, [TABLE_3]),
    (("upcycling",), of_upcycling, [UPCYCLING]),
    (("sizes", "downstream"), of_downstream, [TABLE_4]),
]
