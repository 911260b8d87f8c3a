"""The statistics of scores: intervals of one checkpoint, paired comparisons of two, corrected for their number."""

import math

import numpy as np

PLAIN = ("loss", "bits_per_byte", "perplexity")  # no percentages, and less is better
Z95 = 1.959964


def wilson(mean, n):
    """The 95 % interval of a proportion (Wilson 1927): never empty, and inside 0..1, also for 0 of 20.

    For scores between 0 and 1, like DROP's F1, it is wide enough: their variance is at most that of a proportion.
    """
    z2 = Z95**2 / n
    middle = (mean + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * math.sqrt(max(0.0, mean * (1 - mean)) / n + z2 / 4 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def standard_error(scores):
    """Of the mean of per-item scores; None for a single item."""
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None


def summary(metric, scores):
    """Per-item scores -> {value, low, high}: the mean and its 95 % interval, None for that of a single loss.

    Scores from 0 to 1 have Wilson's interval; losses 1.96 standard errors. The scores of 'perplexity' are nats, and it
    is exp of their mean.
    """
    mean = float(np.mean(scores, dtype=np.float64))
    if metric not in PLAIN:
        low, high = wilson(mean, len(scores))
        return {"value": mean, "low": low, "high": high}
    error = standard_error(scores)
    bounds = (mean, None, None) if error is None else (mean, mean - Z95 * error, mean + Z95 * error)
    to_scale = exp if metric == "perplexity" else float
    return {k: None if v is None else to_scale(v) for k, v in zip(("value", "low", "high"), bounds, strict=True)}


def exp(nats):
    return math.exp(min(nats, 700.0))  # the largest that is still a number in JSON


def paired(a, b, seed=0, resamples=10_000):
    """Compare two runs item by item: mean of b - a, its standard error, the middle 95 % of its bootstrap, and p.

    a, b: scores of the same items in the same order. The bootstrap draws items with replacement, seeded.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired comparison needs the same items: got {len(a)} and {len(b)} scores")
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    rng, n = np.random.default_rng(seed), len(difference)
    means = np.concatenate([difference[rng.integers(n, size=(k, n))].mean(1) for k in shares(resamples, n)])
    low, high = np.percentile(means, (2.5, 97.5))
    return {
        "difference": float(difference.mean()), "se": standard_error(difference), "low": float(low),
        "high": float(high), "p": sign_flips(difference, rng, resamples), "n": n, "resamples": resamples,
    }  # fmt: skip


def shares(total, n):
    """`total` draws of n numbers in shares of at most 80 MB."""
    step = max(1, 10**7 // max(1, n))
    return [min(step, total - i) for i in range(0, total, step)]


def sign_flips(difference, rng, resamples):
    """Two-sided p of the mean difference if, were the two runs alike, every item's could as well have its other sign.

    Exact but for the number of draws: one item never proves anything, whatever its difference.
    """
    sizes, counts = np.unique(np.abs(difference[difference != 0]), return_counts=True)
    observed = abs(difference.sum())
    near = observed * (1 - 1e-9)  # sums in another order round differently
    flipped = [abs((2 * rng.binomial(counts, 0.5, size=(k, len(counts))) - counts) @ sizes)
               for k in shares(resamples, len(counts))]  # fmt: skip
    return float((1 + sum((f >= near).sum() for f in flipped)) / (1 + resamples))


def holm(ps):
    """p-values of several comparisons -> adjusted ones: those below 0.05 hold for all together (Holm 1979)."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted
