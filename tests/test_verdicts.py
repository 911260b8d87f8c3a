"""tools/verdicts.py: a claim's verdict turns with invented rows, both ways, and waits for five seeds."""

import pytest

import experiments
from tests.test_report import asked, rows_of
from tools import verdicts


@pytest.fixture
def judge(tmp_path):
    """judge(name, rows) -> {claim up to its bracket: (ours, time, verdict)}, by way of a CSV file."""

    def judged(name, rows):
        path = str(tmp_path / f"{name}.csv")
        experiments.write_rows(path, rows)
        lines = verdicts.verdicts(lambda other: experiments.read_rows(path) if other == name else {})
        return {what.split(" (")[0]: (ours, time, found) for what, _, ours, _, time, found in lines}

    return judged


def sized(gaps, seeds=(2, 3, 4, 5, 6)):
    """Rows of `sizes`: gaps[kind][size] is what is taken from the baseline's loss; the noise is the seed's, shared."""
    cells = [size | kind | {"lr": 3e-3, "seed": seed} for size in experiments.SIZES for kind in experiments.KINDS[:3]
             for seed in seeds]  # fmt: skip
    base = lambda c: 5 + 0.1 * c["seed"]  # noqa: E731
    gap = lambda c: gaps.get(c["residual"], [0, 0, 0])[[4, 6, 8].index(c["n_layer"])]  # noqa: E731
    return rows_of(cells, lambda c: base(c) - gap(c) * (1 + 0.01 * c["seed"]), seconds=36)


AHEAD = "mHC beats the baseline at three sizes, each at its best rate"
ORDER = "mHC beats HC at three sizes, each at its best rate"
FIG_6 = "the gap persists with compute"
CONTINUED = "a trained baseline is better continued as mHC"


def test_sizes_judge_the_order_at_each_size_and_the_gap_at_the_largest(judge):
    found = judge("sizes", sized({"hc": [0.1, 0.2, 0.2], "mhc": [0.2, 0.3, 0.3]}))
    assert found[AHEAD] == (
        "4 layers of 32: −0.208 ± 0.001; 6 layers of 48: −0.312 ± 0.002; 8 layers of 64: −0.312 ± 0.002",
        "0.5 core-hours", "reproduced, at toy size",
    )  # fmt: skip
    assert found[ORDER][2] == "reproduced, at toy size" and "8 layers of 64: −0.104 ± 0.001" in found[ORDER][0]
    assert found[FIG_6][2] == "reproduced, at toy size" and "largest less smallest −1.93 ± 0.01" in found[FIG_6][0]
    assert judge("sizes", sized({"hc": [0.3, 0.2, 0.3], "mhc": [0.2] * 3}))[ORDER][2] == "not reproduced, at toy size"
    assert judge("sizes", sized({"hc": [0.3, 0.1, 0.3], "mhc": [0.2] * 3}))[ORDER][2] == "in part, at toy size"
    assert judge("sizes", sized({"mhc": [0.3, 0.2, 0.16]}))[FIG_6][2] == "in part: it shrinks, at toy size"
    assert judge("sizes", sized({"mhc": [0.3, 0.2, 0.28]}))[FIG_6][2] == "reproduced, at toy size"
    worse = judge("sizes", sized({"mhc": [0.3, 0.2, -0.1]}))
    assert worse[FIG_6][2] == "not reproduced, at toy size" and worse[AHEAD][2] == "in part, at toy size"


def test_a_fifth_seed_that_is_missing_anywhere_leaves_a_claim_open(judge):
    rows = sized({"hc": [0.1] * 3, "mhc": [0.2] * 3})
    lost = next(name for name, row in rows.items() if row["n_layer"] == 6 and row["residual"] == "mhc")
    found = judge("sizes", {name: row for name, row in rows.items() if name != lost})
    assert {found[claim][2] for claim in (AHEAD, ORDER, FIG_6)} == {"open: 4 of 5 seeds"}
    two = {name: row for name, row in sized({"mhc": [0.2] * 3}).items() if row["n_layer"] != 8}
    assert judge("sizes", two)[AHEAD][2] == judge("sizes", two)[FIG_6][2] == "reproduced, at toy size; 2 of 3 sizes"
    one = {name: row for name, row in two.items() if row["n_layer"] == 4}
    assert judge("sizes", one)[FIG_6][2] == "open: two sizes are wanted; 1 of 3 sizes"
    assert judge("sizes", sized({}, seeds=(2,)))[AHEAD][0].startswith("4 layers of 32: 0.000 (one seed)")
    assert judge("sizes", {})[AHEAD] == ("not run yet", "–", "open")


def test_the_part_of_H_res_is_judged_by_half_of_what_all_maps_bring(judge):
    def ablated(res, both, every):
        gaps = {"res": res, "pre,res": both, "pre,post,res": every}
        one = lambda c: 1 + 0.01 * (c["seed"] % 10)  # noqa: E731
        loss = lambda c: 5 * one(c) - gaps.get(c.get("learned_maps"), 0) * one(c)  # noqa: E731
        other = lambda c: loss(c) + (c.get("maps_lr_scale") == 100 or c["residual"] == "mhc") * 9  # noqa: E731
        ours, _, found = judge("ablation", rows_of(experiments.ablation(), other))["H_res brings most of the gain"]
        return ours, found

    ours, found = ablated(0.22, 0.25, 0.27)
    assert found == "reproduced, at toy size" and ours.startswith("× 1: res −0.")
    assert ours.count("±") == 3 and "pre+post+res −0." in ours
    assert ablated(0.10, 0.25, 0.27)[1] == "in part, at toy size"
    assert ablated(-0.01, 0.25, 0.27)[1] == "not reproduced, at toy size"


GAINS, LIVES = "gains over 8 to 96 sublayers", "mHC lives where HC dies, over depth"


def deep(hc, mhc, behind=(True, True), cells=None):
    """Rows of `depth`: hc[scale] and mhc are gains at the deepest; behind: HC behind mHC in even seeds, in odd ones."""
    gain = lambda c: hc[c["maps_lr_scale"]] ** (c["n_layer"] / 48) if c["residual"] == "hc" else mhc  # noqa: E731
    loss = lambda c: 5 + 0.1 * c["seed"] + (c["residual"] == "hc") * (1 if behind[c["seed"] % 2] else -1)  # noqa: E731
    return rows_of(cells or experiments.depth(), loss, gain_peak=gain)


def test_gains_over_depth_are_judged_at_the_common_rate_first(judge):
    ours, _, found = judge("depth", deep({1: 1e4, 100: 1e12}, 1.5))[GAINS]
    assert found == "reproduced, at toy size"
    assert ours == "× 1: HC at 96 1e+04, mHC at most 1.5; × 100: HC at 96 1e+12, mHC at most 1.5"
    assert judge("depth", deep({1: 100, 100: 1e12}, 1.5))[GAINS][2].startswith("in part: with the rate raised")
    assert judge("depth", deep({1: 1e4, 100: 1e12}, 9))[GAINS][2] == "not reproduced, at toy size"
    assert judge("depth", deep({1: 100, 100: 100}, 1))[GAINS][2] == "not reproduced, at toy size"
    some = [c for c in experiments.depth() if c["n_layer"] < 48]
    assert judge("depth", deep({1: 1e4, 100: 1e12}, 1.5, cells=some))[GAINS][2] == "open: depths are missing"


def test_mHC_lives_where_HC_dies_if_a_broken_gain_costs_HC_its_lead_in_every_seed(judge):
    ours, _, found = judge("depth", deep({1: 100, 100: 1e11}, 1))[LIVES]
    assert found.startswith("reproduced") and ours.endswith(
        "by sublayers: 8: 0 of 5, 24: 0 of 5, 48: 0 of 5, 96: 5 of 5"
    )
    assert judge("depth", deep({1: 100, 100: 1e12}, 1, (True, False)))[LIVES][2].startswith("in part")
    assert judge("depth", deep({1: 100, 100: 1e5}, 1))[LIVES][2].startswith("not reproduced")
    ended = deep({1: 100, 100: 1e5}, 1)
    for row in ended.values():
        row["val_loss"] = "" if row["residual"] == "hc" and row["n_layer"] == 48 else row["val_loss"]
    assert judge("depth", ended)[LIVES][2].startswith("reproduced")
    four = [c for c in experiments.depth() if c["seed"] != 5]
    assert judge("depth", deep({1: 1, 100: 1e12}, 1, cells=four))[LIVES][2] == "open: 4 of 5 seeds"


def test_upcycling_says_who_is_ahead_where_all_started_at_one_loss(judge):
    def judged(gap, apart=0.001):
        loss = lambda c: 5 + 0.01 * (c["seed"] % 10) - (c["residual"] == "mhc") * gap * (1 + 0.01 * (c["seed"] % 10))  # noqa: E731
        curve = lambda c: f"{6.1 + (c['residual'] == 'mhc') * apart:.3f} 5.5"  # noqa: E731
        return judge("upcycling", rows_of(experiments.upcycling(), loss, val_curve=curve))[CONTINUED]

    ours, time, found = judged(0.2)
    assert found == "ahead of the baseline, at toy size" and time == "0.4 core-minutes"
    assert ours.startswith("less the continued baseline: mHC × 100 −0.208 ± 0.002, mHC × 1 −0.208")
    assert "HC × 10 0.000 ± 0.000; starts at most 1e-03 apart" in ours
    assert judged(-0.2)[2] == "behind the baseline, at toy size" and judged(0)[2].startswith("level with")
    assert judged(0.2, apart=0.1)[2] == "open: starts differ"


BENCHMARKS = "benchmarks"


def test_benchmarks_judge_mHC_against_HC_where_either_is_better_than_chance(judge):
    ours, _, found = judge("downstream", asked(60, 62))[BENCHMARKS]
    assert found == "reproduced, at toy size" and ours.startswith("blimp: mHC less HC 2.0 ± 0.0 %; hellaswag: ")
    assert judge("downstream", asked(62, 60))[BENCHMARKS][2] == "not reproduced, at toy size"
    assert judge("downstream", asked(50, 53))[BENCHMARKS][2] == "out of reach here: both at chance"
    assert judge("downstream", asked(50, 53, n=10000))[BENCHMARKS][2] == "reproduced, at toy size"
    assert judge("downstream", {})[BENCHMARKS] == ("not run yet", "–", "open")
