"""Rows of experiments.py's CSV files, and numbers from them: means, differences, power laws, each with its error."""

import math
import statistics

import numpy as np

VARYING = (
    "n_layer n_embd max_steps residual manifold single_pass maps_init learned_maps lr maps_lr_scale alpha_init "
    "collapse n_streams sinkhorn_iters"
).split()


def pick(rows, **settings):
    """{seed: row} of the rows with these settings; '' asks for rows without the setting."""
    same = [r for r in rows.values() if all((r.get(k) or "") == f"{v}" for k, v in settings.items())]
    return {int(r["seed"]): r for r in same}


def values(rows, column):
    """{seed: number}; a loss that is no number any more counts as infinite."""
    return {seed: float(r[column]) if r[column] not in ("", "nan") else math.inf for seed, r in rows.items()}


def mean_se(numbers, digits=3):
    """'4.570 ± 0.020': the mean and its standard error over seeds."""
    numbers = list(numbers)
    if not numbers:
        return "–"
    if not all(map(math.isfinite, numbers)):
        return f"not finite in {sum(not math.isfinite(v) for v in numbers)} of {len(numbers)}"
    if len(numbers) == 1:
        return f"{numbers[0]:.{digits}f} (one seed)".replace("-", "−")
    error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return f"{statistics.mean(numbers):.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def differences(a, b):
    """{seed: a - b} over the seeds that both have."""
    return {s: a[s] - b[s] for s in sorted(a.keys() & b.keys())}


def paired(a, b, digits=3):
    """The mean difference a - b over the seeds that both have, with its standard error."""
    return mean_se(differences(a, b).values(), digits)


def behind(a, b):
    """How often a's loss is the higher one, over the seeds that both have."""
    both = a.keys() & b.keys()
    return f"{sum(a[s] > b[s] for s in both)} of {len(both)}"


def is_below(a, b):
    """Whether a is below b by more than two standard errors of the paired difference."""
    d = list(differences(a, b).values())
    if len(d) < 2 or not all(map(math.isfinite, d)):
        return False
    return statistics.mean(d) + 2 * statistics.stdev(d) / math.sqrt(len(d)) < 0


def standing(a, b):
    """Where a's losses are against b's."""
    return "ahead of" if is_below(a, b) else "behind" if is_below(b, a) else "level with"


def span(numbers):
    """'300 to 1.4e+03', '1.2' where they are equal to two digits."""
    low, high = (f"{f(numbers):.2g}" for f in (min, max))
    return low if low == high else f"{low} to {high}"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def varying(rows):
    """The settings that are not the same in all rows."""
    return [k for k in VARYING if len({row.get(k) or "" for row in rows.values()}) > 1]


def shared(rows):
    """'n_layer = 6, lr = 0.012': the settings that all rows have, with one value."""
    first = next(iter(rows.values()))
    return ", ".join(f"{k} = {first[k]}" for k in VARYING if first.get(k) and k not in varying(rows))


def groups(rows):
    """{settings that vary, without the seed, as a tuple of pairs: {seed: row}}, in the order of the rows."""
    found, names = {}, varying(rows)
    for row in rows.values():
        found.setdefault(tuple((k, row[k]) for k in names if row.get(k)), {})[int(row["seed"])] = row
    return found


def grid_table(rows, more=()):
    """One line for each combination of settings, over its seeds. more: (header, function of {seed: row}) pairs."""
    found, columns, lines = groups(rows), varying(rows), []
    for group, some in found.items():
        gains = [float(r["gain_peak"] or "nan") for r in some.values()]
        peak = "–" if any(map(math.isnan, gains)) else span(gains)
        extra = [f(some) for _, f in more]
        loss = values(some, "val_loss").values()
        lines.append([*(dict(group).get(k, "") for k in columns), len(some), mean_se(loss), *extra, peak])
    return table([*columns, "seeds", "val. loss", *(name for name, _ in more), "peak gain"], lines)


def exactly(rows, **settings):
    """{seed: row} of the rows that have these settings, and of those that vary no others."""
    return pick(rows, **dict.fromkeys(varying(rows), "") | settings)


def loss_of(rows, **settings):
    return values(exactly(rows, **settings), "val_loss")


def floats(row, column):
    return np.array([float(v) for v in row[column].split()])


def power_law(flops, losses, draws=2000):
    """loss = a FLOPs^-b, fitted to the logarithms of the means over seeds.

    flops (sizes,); losses (sizes, seeds), a column the same seed throughout. -> b, and the ends of its 95 % interval
    from draws of the seeds with replacement: the same for all sizes, because a seed fixes the data. Nothing is
    subtracted from the loss: three sizes cannot tell an irreducible part."""
    x, losses = np.log(flops), np.asarray(losses)

    def slope(chosen):
        return -np.polyfit(x, np.log(losses[:, chosen].mean(1)), 1)[0]

    n, generator = losses.shape[1], np.random.default_rng(0)
    drawn = [slope(generator.integers(0, n, n)) for _ in range(draws)]
    return slope(np.arange(n)), *np.quantile(drawn, (0.025, 0.975))
