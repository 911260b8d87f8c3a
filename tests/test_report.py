"""tools/report.py: numbers, their errors and verdicts from rows; no number without rows."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

import experiments
from tools import rates, report, rows, verdicts
from tools.rows import power_law


def rows_with(losses, gains):
    """{cell: row} of `rates`: losses and gains by (kind, scale), one per seed."""
    rows = {}
    for (kind, scale), some in losses.items():
        for seed, loss in zip(experiments.SEEDS, some, strict=False):
            cell = {**report.KINDS[kind], "maps_lr_scale": scale, "seed": seed}
            row = {
                "cell": experiments.name_of(cell),
                **cell,
                "val_loss": loss,
                "seconds": 36,
                "tokens": 5,
                "commit": "c",
            }
            gain = gains.get((kind, scale), [""] * 5)[experiments.SEEDS.index(seed)]
            row |= {"gain_peak": gain, "gain_fwd_max": gain, "gain_bwd_max": gain, "fwd_max": "1 2", "bwd_max": "2 1"}
            rows[row["cell"]] = row | {"at_step": "1 2", "loss_curve": "5 4", "params": 1000}
    return rows


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "results", str(tmp_path / "results"))
    monkeypatch.setattr(experiments, "results", str(tmp_path / "results"))
    monkeypatch.setattr(report, "out", str(tmp_path / "REPORT.md"))
    monkeypatch.setattr(report, "assets", str(tmp_path / "assets"))
    monkeypatch.setattr(report, "configure", lambda settings: None)
    return tmp_path


LOSSES = {
    ("baseline", 1): [5.0, 4.9, 5.1, 4.8, 5.2], ("hc", 1): [4.6, 4.5, 4.7, 4.4, 4.8],
    ("hc", 100): [7.0, "", 6.0, 5.5, 5.0], ("home", 1): [4.8, 4.7, 4.9, 4.6, 5.0],
    ("home", 100): [4.5, 4.41, 4.58, 4.3, 4.71],
}  # fmt: skip
GAINS = {
    ("hc", 1): [100, 110, 120, 130, 140], ("hc", 100): ["1e9", "nan", "1e12", "1e8", "1e20"],
    ("home", 1): [1.1] * 5, ("home", 100): [1.0, 1.2, 1.1, 1.3, 1.4],
}  # fmt: skip


def test_means_and_paired_differences_have_their_standard_error():
    assert rows.mean_se([4.0, 5.0, 6.0]) == "5.000 ± 0.577"  # sd 1 over sqrt 3
    assert rows.mean_se([4.0]) == "4.000 (one seed)" and rows.mean_se([]) == "–"
    assert rows.mean_se([4.0, math.inf]) == "not finite in 1 of 2"
    a, b = {1: 5.0, 2: 7.0, 3: 1.0}, {1: 4.0, 2: 8.0, 4: 9.0}
    assert rows.paired(b, a) == "0.000 ± 1.000"  # seeds 1 and 2 alone: differences -1 and 1
    assert rows.paired({1: 1.0, 2: 1.5}, {1: 2.0, 2: 2.0}) == "−0.750 ± 0.250"


def test_a_page_from_rows(place):
    experiments.write_rows(str(place / "results" / "rates.csv"), rows_with(LOSSES, GAINS))
    (place / "results" / "leaderboard.csv").write_text(
        "config,variant,loss,tokens,command,commit\nx.py,mine,4.4,7,`do`,d\n"
    )
    report.main()
    page = (place / "REPORT.md").read_text()
    assert "| HC | × 100 | 5 | not finite in 1 of 5 | not finite in 1 of 5 | 1e+08 to inf | 5 of 5 |" in page
    assert "| mHC, 'home' | × 100 | 5 | 4.500 ± 0.070 | −0.500 ± 0.005 | 1 to 1.4 | 0 of 5 |" in page
    assert (
        "Both at × 1: HC less mHC −0.200 ± 0.000 (5 of 5 seeds); HC is behind mHC in 0 of 5" in page
        and "best rate: HC" not in page
    )
    claims = [line for line in page.splitlines() if line.startswith("| mHC ") or line.startswith("| HC's gain")]
    assert [line.rsplit(" | ", 1)[1] for line in claims[:4]] == [
        "reproduced, at toy size |", "in part, with the rate of α and b raised |", "reproduced, at toy size |",
        "open: three are wanted |",
    ]  # fmt: skip
    board = page[page.index("## Leaderboard") :]
    assert "HC is behind mHC in 5 of 5, behind the baseline in 4 of 5" in page  # a loss that is no number is behind
    assert board.index("mine") < board.index("maps_lr_scale=100") < board.index("| demo.py | HC, maps_lr_scale=1 ")
    assert all((place / "assets" / f"{name}.png").stat().st_size > 10_000 for name in ("rates", "demo"))
    assert page.count("Not run yet") == 10


def test_kinds_are_compared_at_their_best_rates_once_three_have_been_tried(place):
    def findings(losses):
        experiments.write_rows(str(place / "rates.csv"), rows_with(losses, GAINS))
        return rates.findings(experiments.read_rows(str(place / "rates.csv")))

    more = {("hc", 30): [v + 0.3 for v in LOSSES["hc", 1]], ("home", 30): [v - 0.2 for v in LOSSES["home", 1][:4]]}
    assert "best rate" not in findings(LOSSES | more)  # of HC three, of mHC two and one without its fifth seed
    assert "Each at its best rate: HC × 1 less mHC × 100: 0.100 ± 0.005" in findings(
        LOSSES | more | {("home", 30): LOSSES["home", 1]}
    )


def test_fewer_than_five_seeds_are_no_verdict_and_no_rows_no_number(place, monkeypatch):
    monkeypatch.setattr(report, "draw_demo", lambda rows: None)
    monkeypatch.setattr(rates, "draw", lambda rows: plt.figure())
    fewer = {k: v[:3] for k, v in LOSSES.items()}
    experiments.write_rows(str(place / "results" / "rates.csv"), rows_with(fewer, GAINS))
    report.main()
    page = (place / "REPORT.md").read_text()
    assert page.count("open: 3 of 5 seeds") == 3 and "reproduced" not in page
    (place / "results" / "rates.csv").unlink()
    report.main()
    assert "Not run yet: `python experiments.py rates`" in (place / "REPORT.md").read_text()


# -- the other experiments ---------------------------------------------------------------------------------------------


def rows_of(cells, loss, **more):
    """{cell: row}: loss(cell), and more(cell) or a value, of each."""
    shared = {
        "seconds": 1,
        "tokens": 5,
        "commit": "c",
        "params": 9,
        "gain_peak": 2,
        "at_step": "1 2",
        "loss_curve": "5 4",
    }
    rows = {}
    for cell in cells:
        row = {"cell": experiments.name_of(cell), **shared, **cell, "val_loss": loss(cell)}
        rows[row["cell"]] = row | {k: v(cell) if callable(v) else v for k, v in more.items()}
    return rows


def section(place, name, rows):
    experiments.write_rows(str(place / "results" / f"{name}.csv"), rows)
    return report.section(name)


def test_a_power_law_is_found_with_an_interval_that_narrows_with_the_noise():
    flops = np.array([1e12, 4e12, 3e13])
    exact = 40 * flops[:, None] ** -0.07 * np.ones(5)
    assert np.allclose(power_law(flops, exact), 0.07)
    noise = np.random.default_rng(1).normal(size=(3, 5))
    (b, low, high), (_, nearer, _) = (power_law(flops, exact + size * noise) for size in (0.05, 0.005))
    assert low < b < high and abs(b - 0.07) < 0.01 and abs(nearer - 0.07) < abs(low - 0.07)


def test_sizes_have_gaps_with_errors_exponents_and_the_trend_of_the_gap(place):
    flops = {4: 1e12, 6: 3e12, 8: 1e13}

    def loss(cell):
        F, seed = flops[cell["n_layer"]], cell["seed"]
        gap = {"baseline": 0, "hc": 0.1, "mhc": 0.2}[cell["residual"]] * F**0.01
        return 40 * F**-0.07 + 0.01 * seed - gap

    cells = [
        size | kind | {"lr": 3e-3, "maps_lr_scale": 30, "seed": s}
        for size in experiments.SIZES
        for kind in experiments.KINDS
        for s in (2, 3, 4, 5, 6)
    ]
    rows = rows_of(cells, loss, flops=lambda c: flops[c["n_layer"]])
    page = section(place, "sizes", rows)
    gap = f"{0.1 * 1e13**0.01:.3f}".replace("-", "−")
    assert (
        f"| 8 layers of 64 | 5 | HC | 0.003, × 30 | 5 | {loss(cells[55] | {'seed': 4}):.3f} ± 0.007 | −{gap} ± 0.000 |"
        in page
    )
    assert "- baseline: loss ∝ FLOPs^−0.0" in page and "- mHC, single-pass: loss ∝ FLOPs^−" in page
    wider = 0.1 * (1e13**0.01 - 1e12**0.01)
    assert f"- HC less the baseline, largest size less smallest: −{wider:.3f} ± 0.000." in page
    assert (place / "assets" / "sizes.png").stat().st_size > 10_000
    few = {name: row for name, row in rows.items() if row.get("n_layer") != 6}
    assert "Power laws want all sizes" in section(place, "sizes", few)
    narrow = f"{0.1 * 1e12**0.01:.3f} ± 0.000"
    equal = "level with mHC, H_res = I (0.000 ± 0.000), level with mHC, single-pass (0.000 ± 0.000)"
    ahead = f"ahead of baseline (−{0.2 * 1e12**0.01:.3f} ± 0.000), ahead of HC (−{narrow})"
    said = f"- 4 layers of 32: mHC is {ahead}, {equal}."
    assert said in page
    assert "mHC is" not in section(place, "sizes", {n: row for n, row in rows.items() if row["seed"] != 6})


def test_tune_names_the_best_rates_and_those_at_the_edge_of_what_was_tried(place):
    def loss(cell):  # HC's best is in the middle of both of its grids, mHC's best at the edge of both
        best = {"baseline": (6e-3, 1), "hc": (6e-3, 10), "mhc": (24e-3, 100)}[cell["residual"]]
        return 5 + abs(math.log(cell["lr"] / best[0])) + abs(math.log(cell["maps_lr_scale"] / best[1]))

    page = section(place, "tune", rows_of(experiments.tune(), loss))
    assert "- 8 layers of 64, HC: lr 0.006, maps × 10.\n" in page and "64, baseline: lr 0.006, maps × 1.\n" in page
    assert "4 layers of 32, mHC: lr 0.024, maps × 100; the last of those tried: lr and maps_lr_scale." in page
    beyond = {"n_layer": 4, "n_embd": 32, "max_steps": 60, "residual": "mhc", "seed": 1337}
    more = rows_of([*experiments.tune(), beyond | {"lr": 48e-3, "maps_lr_scale": 100}], loss)
    assert "4 layers of 32, mHC: lr 0.024, maps × 100; the last of those tried: maps_lr_scale." in section(
        place, "tune", more
    )
    gain = lambda c: 7 if loss(c) <= loss(c | {"residual": "baseline", "maps_lr_scale": 1}) else 9  # noqa: E731
    page = section(place, "tune", rows_of(experiments.tune(), loss, gain_peak=gain))
    assert (
        "- 4 layers of 32: HC against the baseline of the same lr is behind with gains of 9, ahead with gains of 7."
        in page
    )
    last = "8 layers of 64, mHC, single-pass: lr"
    assert last in page and last not in section(place, "tune", rows_of(experiments.tune()[:-1], loss))


def test_what_decides_ablation_and_choices_are_paired_by_seed(place):
    loss = lambda c: 5 + 0.1 * c["seed"] - {"hc": 0.3, "mhc": 0.2, "baseline": 0}[c["residual"]]  # noqa: E731
    cells = experiments.decides()
    page = section(place, "decides", rows_of(cells, loss, gain_peak=lambda c: 1e9 if c["residual"] == "hc" else 1))
    assert "| max_steps=240 | × 100 | 5 | −0.100 ± 0.000 | – | 1e+09 |" in page
    worth = {"res": 0.1, "pre": 0.02, "post": 0.03}
    fewer = lambda c: loss(c) - sum(v for k, v in worth.items() if k in c.get("learned_maps", ""))  # noqa: E731
    page = section(place, "ablation", rows_of(experiments.ablation(), fewer))
    assert "- HC × 1: res alone −0.400 ± 0.000, pre beside res −0.020 ± 0.000, post beside pre and res −0.030" in page
    assert "- mHC × 100: post alone −0.230 ± 0.000, res beside post −0.100 ± 0.000, pre beside post −0.020" in page
    page = section(place, "ablation", rows_of(experiments.ablation(), loss))
    assert "−0.300 ± 0.000" in page and "−0.200 ± 0.000" in page and "0.000 ± 0.000" in page
    worse = rows_of(experiments.choices(), lambda c: loss(c) + 0.05 * (c.get("manifold", "sinkhorn") != "sinkhorn"))
    assert section(place, "choices", worse).count("0.050 ± 0.000") == 5  # the other manifolds
    start = {"val_curve": "6.0 5.5"}
    page = section(place, "upcycling", rows_of(experiments.upcycling(), loss, **start))
    assert "| HC × 10 | 5 | 6.000 ± 0.000 | " in page and "starts are at most 0e+00 apart" in page
    assert "−0.300 ± 0.000" in page and (place / "assets" / "upcycling.png").stat().st_size > 10_000
    assert "lr" in section(place, "tune", rows_of(experiments.tune()[:4], loss))


def asked(hc, mhc, chance=50.0, n=1000):
    """Rows of `downstream`: right answers in percent in every task; the noise is the seed's, shared."""
    right = {"baseline": chance, "hc": hc, "mhc": mhc}
    cells = [experiments.LARGE | kind | {"seed": s} for kind in experiments.KINDS[:3] for s in (2, 3, 4, 5, 6)]
    each = lambda c, task: {task: right[c["residual"]] + 0.1 * c["seed"] % 0.3, f"{task} by chance": chance}  # noqa: E731
    row = lambda c, task: each(c, task) | {f"{task} of": n}  # noqa: E731
    rows = {experiments.name_of(c): c | {"cell": experiments.name_of(c), "commit": "c"} for c in cells}
    return {name: r | {k: v for task in experiments.ASKED for k, v in row(r, task).items()} for name, r in rows.items()}


def test_benchmarks_have_a_star_where_a_kind_is_above_chance(place):
    rows = asked(52, 60, n=800)  # guessing alone is 1.8 % off
    page = section(place, "downstream", rows)
    assert "15 of 0 cells. All: n_layer = 8, max_steps = 160." in page
    assert "| piqa | 800 | 50.0 | 50.1 ± 0.0 | 52.1 ± 0.0 | 60.1 ± 0.0* |" in page


def test_depth_draws_gains_over_depth_and_training_and_says_which_composites_are_uniform_and_where_HC_left(place):
    def curve(cell):
        breaks = cell["residual"] == "hc" and cell["n_layer"] == 48 and cell["seed"] != 5
        return "7 6 6.5 nan" if breaks else "7 6 5 4"

    def composite(cell):  # n = 2: a uniform entry is one half
        return "0.5 0.5 0.48 0.52" if cell.get("maps_init") == "home" and cell["n_layer"] > 4 else "0.9 0.1 0.1 0.9"

    over_depth = dict.fromkeys(("fwd_max", "bwd_max", "single_fwd_max"), "3 2") | {"single_bwd_max": "1 5"}
    over_depth |= {"fwd_min": "0.2 1", "bwd_min": "0.3 1", "gain_fwd_min": 0.2, "gain_bwd_min": 0.3}
    over_steps = {"at_step": "10 20 30 40", "loss_curve": curve, "grad_norm_curve": "1 2 3 4", "grad_norm_max": 4}
    over_steps |= {"eval_step": "0 40", "gain_curve": "1 7", "gain_peak": 7}
    rows = rows_of(experiments.depth(), lambda c: 5, composite=composite, **over_depth | over_steps)
    page = section(place, "depth", rows)
    said = "a single gain is at most 5, a composite one 7, and at least 0.2 to 0.3 at the end."
    assert f"- 96 sublayers, mHC, 'home' × 1: {said}" in page and f"- 96 sublayers, HC × 100: {said}" in page
    assert "1/n, mHC, 'home' × 100: 0 of 5 at 8, 5 of 5 at 24, 5 of 5 at 48, 5 of 5 at 96 sublayers." in page
    assert "1/n, mHC, 'paper' × 1: 0 of 5 at 8, 0 of 5 at 24" in page and "| 0.4 |" in page  # .9 less one half
    assert "first 0.3 above that of mHC, 'home', at step 30, 30, 30, never, 30 (by seed)" in page
    assert (place / "assets" / "depth.png").stat().st_size > 50_000


def test_the_block_length_with_the_smallest_peak_is_held_against_the_formula(place):
    def rows_at(peaks):
        cells = [{"sublayers": 60, "recompute": "mhc", "L_r": L_r} for L_r in peaks]
        shared = {"commit": "c", "saved": 100, "table_3": 76, "best_L_r": 6}
        return {(n := experiments.name_of(c)): {"cell": n, **c, **shared, "peak": peaks[c["L_r"]]} for c in cells}

    page = section(place, "memory", rows_at({4: 210, 6: 198, 7: 199}))
    assert "| 60 | mhc | 6 | 100 | 198 | 76 |" in page and "peak is at L_r = 6, Eq 20's L_r* is 6." in page
    found = lambda peaks: verdicts.of_memory(section(place, "memory", rows_at(peaks)) and report.read("memory"))  # noqa: E731
    assert found({4: 210, 6: 198, 7: 199})[0][-1] == found({4: 1e3, 5: 1})[0][-1] == "reproduced"
    assert found({4: 1, 6: 198})[0][-1] == "not reproduced"


def test_overhead_is_shown_as_measured_and_as_predicted(place):
    empty = dict.fromkeys(("threads", "rounds", "baseline_ms", "HC", "HC ±", "mHC eager", "mHC eager ±"), "")
    paper = dict.fromkeys(("mfu", "memory_share", "mHC", "mHC, at the peaks"), "")
    timed = {"threads": 2, "rounds": 9, "baseline_ms": 100, "HC": 2, "HC ±": 1, "mHC eager": 3.5, "mHC eager ±": 0.5}
    reckoned = {"mfu": 0.4, "memory_share": 0.8, "mHC": 5.4, "mHC, at the peaks": 8.0}
    cells = experiments.overhead()
    rows = {
        (n := experiments.name_of(c)): {"cell": n, **c, **empty, **paper, **(timed if "width" in c else reckoned)}
        for c in cells
    }
    page = section(place, "overhead", rows)
    assert "| 1280 | 2 | 2 | 9 | 100 | 2 ± 1 | 3.5 ± 0.5 |" in page and "| mhc_27b | H100 | 5.4 (8.0) |" in page
    assert "40% of the card's FLOP/s and 80% of its bandwidth" in page
    (claim,) = verdicts.of_overhead(experiments.read_rows(str(place / "results" / "overhead.csv")))
    assert claim[2] == "C = 1280: mHC 3.5 ± 0.5 %, HC 2 ± 1 %"
