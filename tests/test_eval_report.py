"""The statistics against their definitions, and what is said of scores."""

import itertools
import math

import numpy as np
import pytest

from evals import report
from evals.rows import first_rows
from evals.stats import holm, paired, sign_flips, summary, wilson


def test_wilson_by_its_definition():
    """The interval's ends are the p at which the observed mean is 1.96 of p's own standard errors away."""
    for mean, n in ((0.5, 20), (0.05, 20), (0.98, 1000)):
        low, high = wilson(mean, n)
        assert low < mean < high
        for p in (low, high):
            assert abs(mean - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n))
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)  # 0 of 20 is not 0.0 +- 0.0
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


def test_summaries():
    assert summary("acc", [0.0, 1.0, 1.0, 1.0])["value"] == 0.75
    loss = summary("loss", [1.0, 2.0, 4.0])
    half = 1.959964 * np.std([1, 2, 4], ddof=1) / 3**0.5
    assert loss == pytest.approx({"value": 7 / 3, "low": 7 / 3 - half, "high": 7 / 3 + half})
    assert summary("perplexity", [1.0, 2.0, 4.0]) == pytest.approx({k: math.exp(v) for k, v in loss.items()})
    assert summary("loss", [3.0]) == {"value": 3.0, "low": None, "high": None}
    assert math.isfinite(summary("perplexity", [9e9])["value"])  # results.json has no Infinity


def test_paired_comparison_by_hand():
    a, b = [1, 0, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0]
    got = paired(a, b, seed=3, resamples=4000)
    assert got["difference"] == pytest.approx(1 / 3)
    assert got["se"] == pytest.approx(np.std([0, 1, 0, 0, 1, 0], ddof=1) / 6**0.5)
    assert got["low"] == 0.0 and got["high"] == pytest.approx(2 / 3)  # of Binomial(6, 1/3) / 6
    assert got["p"] == pytest.approx(1 / 2, abs=0.03)  # of two items that differ, both signs agree half of the time
    assert got == paired(a, b, seed=3, resamples=4000) != paired(a, b, seed=3, resamples=999)
    with pytest.raises(ValueError, match="the same items: got 6 and 5"):
        paired(a, b[:5])


def test_sign_flips_against_all_of_them():
    rng = np.random.default_rng(1)
    for difference in ([0.5, -0.25, 1.5, 0, 0.5, 2.0, -0.125], [1, 1, 1, 1, 1, 0, 0, -1], [3.0]):
        d = np.array(difference)
        every = [abs(d @ np.array(signs)) for signs in itertools.product((-1, 1), repeat=len(d))]
        exact = np.mean([e >= abs(d.sum()) - 1e-9 for e in every])
        assert sign_flips(d, rng, 20_000) == pytest.approx(exact, abs=0.015)
    assert sign_flips(np.zeros(4), rng, 99) == 1.0 == sign_flips(np.array([7.0]), rng, 99)


def test_bootstrap_agrees_with_the_normal_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=800), rng.normal(0.1, 1, size=800)
    got = paired(a, b, seed=1, resamples=6000)
    for key, sign in (("low", -1), ("high", 1)):
        assert (got[key] - got["difference"]) / got["se"] == pytest.approx(sign * 1.96, abs=0.1)


def test_holm_by_hand():
    # sorted .01 .02 .03 .04 times 4 3 2 1 makes .04 .06 .06 .04, and none may be below the one before
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def a_record(run, task="loss", metric="loss", sha="a", seq_len=8, scores=(1.0, 2.0), **changes):
    return {"checkpoint": run, "run": run, "step": 1, "task": task, "files": {"val": sha}, "seq_len": seq_len,
            "style": "harness", "shots": 0, "shown": 0, "max_length": 8, "n": len(scores), "official": 5,
            "partial": True, "scores": {metric: list(scores)}} | changes  # fmt: skip


def test_unlike_items_are_not_compared():
    first = a_record("a")
    for other in (a_record("b", sha="b"), a_record("b", seq_len=9), a_record("b", scores=[1.0])):
        pairs, unlike = report.comparisons([first, other], 0, 50)
        assert not pairs and len(unlike) == 1 and "validation: a and b are not compared" in unlike[0]
    pairs, unlike = report.comparisons([first, a_record("b")], 0, 50)
    assert len(pairs) == 1 and not unlike
    assert "2 of 5 (partial) items" in report.comparison_lines(pairs, {"a": "a", "b": "b"})[0]


def test_stars_know_how_many_comparisons_were_made():
    """Six items that all got better: p 0.03 for a single comparison, and nothing among several."""
    worse, better = [0.0] * 6, [1.0] * 6
    names = {"a": "a", "b": "b"}

    def stars(tasks):
        records = [
            a_record(run, task, "acc", scores=scores) for run, scores in (("a", worse), ("b", better)) for task in tasks
        ]
        lines = report.comparison_lines(report.comparisons(records, 0, 2000)[0], names)
        return [line.endswith("items *") for line in lines[:-1]], lines[-1]

    assert stars(["piqa"])[0] == [True] and stars(["piqa"])[1].endswith("Holm's correction for this one comparison")
    assert stars(["piqa", "hellaswag"])[0] == [False, False]
    assert stars(["piqa", "hellaswag"])[1].endswith("for these 2 comparisons")


def test_the_table_shows_what_differs_between_checkpoints():
    def record(run, n, random, **changes):
        metrics = {"acc": {"value": 0.5, "low": 0.25, "high": 0.75}}
        return a_record(run, "piqa", n=n, partial=n < 9, official=9, metrics=metrics, random={"acc": random}, **changes)

    records = [record("a", 3, 0.5), record("b", 9, 0.25, shots=4, shown=0.5)]
    line = report.table(records, {"a": "a", "b": "b"})[2]
    for words in ("3 of 9 (partial), 9", "50.0, 25.0", "50.0 [25.0, 75.0]", "0, 0.5 of 4", "78.5"):
        assert words in line
    lambada = a_record("a", "lambada", metrics={"perplexity": {"value": 3.0, "low": None, "high": None}}, random={})
    lines = report.table([lambada], {"a": "a"})
    assert "paper" not in lines[0] and "3.0000 [-, -]" in lines[2]  # no column for what the paper does not have


@pytest.mark.parametrize(
    "runs, names",
    [
        (("out/mhc", "out/hc"), ("mhc 1", "hc 1")),
        (("out/mhc", "out/other/mhc"), ("out/mhc 1", "other/mhc 1")),
        (("a/x/mhc", "b/x/mhc", "c"), ("a/x/mhc 1", "b/x/mhc 1", None)),
    ],
)
def test_names_of_runs_are_unambiguous(runs, names):
    found = list(report.checkpoint_names([a_record(run) for run in runs]).values())
    assert len(set(found)) == len(runs)
    assert all(want is None or got == want for got, want in zip(found, names, strict=True))


def test_limits_take_every_subject():
    rows = [{"subject": s, "i": i} for s in "ab" for i in range(3)] + [{"subject": "c", "i": 0}]
    taken = [rows[i] for i in first_rows(rows, "subject", 4)]
    assert [(r["subject"], r["i"]) for r in taken] == [("a", 0), ("a", 1), ("b", 0), ("c", 0)]
    assert list(first_rows(rows, None, 2)) == [0, 1] and list(first_rows(rows, "subject", 0)) == list(range(7))
