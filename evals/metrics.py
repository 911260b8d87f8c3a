"""What the eight tasks count as right: extraction and metrics, written from their definitions. Text in, numbers out.

    choices      acc, acc_norm                        argmax of the log-probability, whole and per character
    GSM8K        strict, flexible                     the number behind '####', or the last number of all
    BBH          em                                   what follows 'the answer is'
    TriviaQA     em                                   any alias, after the official (or the harness') normalisation
    MATH         em                                   Minerva's normal form (Lewkowycz et al. 2022, app. D), then sympy
    DROP         em, f1                               bags of words, aligned one to one (Dua et al. 2019)

"harness" is lm-evaluation-harness 0.4.13, whose numbers these reproduce digit by digit, oddities included; an oddity
that costs a model points is named where it stands. MATH needs antlr4-python3-runtime 4.11 (sympy's LaTeX parser).
"""

import contextlib
import re
import signal
import string

import numpy as np

INVALID = "[invalid]"  # what an extraction gives when it finds nothing: equal to no answer
ARTICLES = re.compile(r"\b(a|an|the)\b")


# ----------------------------------------------------------------------------------------------------------------------
# Choices


def argmax(values):
    """Index of the largest value; the first of equals, as numpy has it."""
    return max(range(len(values)), key=lambda i: values[i])


def choice_scores(logprobs, choices, gold):
    """Summed log-probabilities of each choice's text -> acc and acc_norm, 0.0 or 1.0.

    acc_norm divides by the characters of the choice (not tokens, not bytes, and not the space in front of it).
    """
    per_character = [lp / max(1, len(c)) for lp, c in zip(logprobs, choices, strict=True)]
    return {"acc": float(argmax(logprobs) == gold), "acc_norm": float(argmax(per_character) == gold)}


# ----------------------------------------------------------------------------------------------------------------------
# Finding the answer in generated text


def find(pattern, text, which=0):
    """The first (which=0) or last (-1) match of pattern; of several groups the first that caught anything; stripped."""
    found = re.findall(pattern, text)
    if not found:
        return INVALID
    groups = found[which] if isinstance(found[which], tuple) else (found[which],)
    return next((g for g in groups if g), "" if len(groups) == 1 else INVALID).strip()


GSM8K_STRICT = r"#### (\-?[0-9\.\,]+)"
GSM8K_FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"


def gsm8k_number(text):
    """An answer as the harness compares it: no ',' or '$', nothing before '#### ', no final '.', lower case."""
    text = text.replace(",", "").replace("$", "")
    text = re.sub(r"(?s).*#### ", "", text)
    return re.sub(r"\.$", "", text).lower()


def gsm8k_scores(text, answer):
    """Generated text against a row's whole `answer` (which ends in '#### N') -> strict, flexible."""
    gold = gsm8k_number(answer)
    strict, flexible = find(GSM8K_STRICT, text), find(GSM8K_FLEXIBLE, text, -1)
    return {"strict": float(gsm8k_number(strict) == gold), "flexible": float(gsm8k_number(flexible) == gold)}


def answer_is(text):
    """What follows the first 'the answer is' (or 'The answer is') on its line, without the final full stop."""
    return find(r"[Tt]he answer is:? *(.*)", text).rstrip().removesuffix(".").rstrip()


def bbh_harness_answer(text):
    """The harness' extraction: all but the last character of the line. Without a final '.', it eats a letter."""
    return find(r"(?<=the answer is )(.*)(?=.)", text)


# ----------------------------------------------------------------------------------------------------------------------
# TriviaQA


def triviaqa_normalize(text):
    """The official normalisation: punctuation ('_' too) becomes spaces, lower case, no articles, single spaces."""
    punctuation = set(string.punctuation + "‘’´`")
    text = "".join(" " if c in punctuation else c for c in text.lower())
    return " ".join(ARTICLES.sub(" ", text).split())


def triviaqa_em(text, aliases):
    """Official exact match: 1.0 if the normalised text is any normalised alias."""
    return float(triviaqa_normalize(text) in {triviaqa_normalize(a) for a in aliases})


def triviaqa_harness_em(text, aliases):
    """The harness' exact match: lower case with punctuation deleted ('T.S.' is 'ts', articles stay)."""

    def plain(s):
        return s.lower().translate(str.maketrans("", "", string.punctuation))

    return float(plain(text.strip()) in {plain(a) for a in aliases})


# ----------------------------------------------------------------------------------------------------------------------
# DROP


def is_number(text):
    try:
        float(text)
        return True
    except ValueError:
        return False


def drop_normalize(span):
    """Lower case, split at spaces and hyphens; of each word no punctuation and no article, but a number as a float."""
    words = []
    for word in re.split(" |-", span.lower()):
        if not is_number(word):
            word = "".join(c for c in word if c not in string.punctuation)
        word = str(float(word)) if is_number(word) else word
        words += ARTICLES.sub(" ", word).split()
    return " ".join(words)


def bag_f1(predicted, gold):
    """F1 of two sets of words; 0 when the gold set has numbers and none of them is predicted."""
    numbers = {w for w in gold if is_number(w)}
    if numbers and not numbers & predicted:
        return 0.0
    shared = len(predicted & gold)
    precision = shared / len(predicted) if predicted else 1.0
    recall = shared / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def best_assignment(scores):
    """The scores[i][j] of the one-to-one pairs with the largest sum, rows <= columns: the Hungarian method, O(n^2 m).

    Rows are added one by one; each looks for the cheapest chain of re-assignments (Dijkstra on costs reduced by the
    potentials u, v). Index 0 is a sentinel; p[j] is the row that holds column j.
    """
    n, m = len(scores), len(scores[0])
    u, v, p = [0.0] * (n + 1), [0.0] * (m + 1), [0] * (m + 1)
    for i in range(1, n + 1):
        p[0], j0, way = i, 0, [0] * (m + 1)
        slack, done = [float("inf")] * (m + 1), [False] * (m + 1)
        while p[j0]:
            done[j0], row, delta, j1 = True, p[j0], float("inf"), 0
            for j in range(1, m + 1):
                if not done[j]:
                    cost = -scores[row - 1][j - 1] - u[row] - v[j]
                    if cost < slack[j]:
                        slack[j], way[j] = cost, j0
                    if slack[j] < delta:
                        delta, j1 = slack[j], j
            for j in range(m + 1):
                if done[j]:
                    u[p[j]], v[j] = u[p[j]] + delta, v[j] - delta
                else:
                    slack[j] -= delta
            j0 = j1
        while j0:
            p[j0], j0 = p[way[j0]], way[j0]
    return [scores[p[j] - 1][j - 1] for j in range(1, m + 1) if p[j]]


def drop_pair(predicted, gold):
    """EM and F1 of one predicted answer against one gold answer, each a list of spans; F1 rounded to 2 digits."""
    predicted, gold = ([drop_normalize(s) for s in spans] for spans in (predicted, gold))
    em = float(set(predicted) == set(gold) and len(predicted) == len(gold))
    scores = [[bag_f1(set(p.split()), set(g.split())) for p in predicted] for g in gold]
    if len(gold) > len(predicted):
        scores = [list(column) for column in zip(*scores, strict=True)]
    f1 = np.mean(best_assignment(scores) + [0.0] * abs(len(gold) - len(predicted)))
    return em, float(np.round(f1, 2))  # numpy's rounding, as in the official code: Python's makes 0.475 a 0.47


def drop_scores(predicted, golds):
    """Spans (a string is one span) against all gold answers (lists of spans): em and f1, each the best over golds."""
    predicted = [predicted] if isinstance(predicted, str) else list(predicted)
    pairs = [drop_pair(predicted, gold) for gold in golds if gold[0].strip()]
    return {"f1": max((f1 for _, f1 in pairs), default=0.0), "em": max((em for em, _ in pairs), default=0.0)}


# ----------------------------------------------------------------------------------------------------------------------
# MATH

SHORTER = (  # replaced in this order
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
REMOVED = (  # words (units) and notation
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
)  # fmt: skip
REWRITES = (
    (r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"),  # what stands between the dollars
    (r"(\\text\{)(.*?)(\})", r"\2"),
    (r"(\\textbf\{)(.*?)(\})", r"\2"),
    (r"(\\overline\{)(.*?)(\})", r"\2"),
    (r"(\\boxed\{)(.*)(\})", r"\2"),
    (r"(frac)([^{])(.)", r"frac{\2}{\3}"),  # \frac12 -> \frac{1}{2}
    (r"(sqrt)(\[[^\]]*\])(\w)", r"\1\2{\3}"),  # \sqrt[3]8 -> \sqrt[3]{8}
    (r"(sqrt)(?!\[)([^{])", r"sqrt{\2}"),  # \sqrt2 -> \sqrt{2}
)  # fmt: skip


def outside_commands(text, word):
    """text without `word`, but not inside a LaTeX command: 'ft' must not turn \\left into \\le."""
    pieces = re.split(r"(\\[a-zA-Z]+)", text)  # every second piece is a command
    return "".join(p if i % 2 else p.replace(word, "") for i, p in enumerate(pieces))


def math_normalize(answer):
    """Minerva's normal form of a final answer: no units, no dressing, shorthand TeX written out, 1,000 as 1000."""
    answer = answer.split("=")[-1]
    for word in filter(str.isalpha, REMOVED):  # while spaces still show where words end
        answer = re.sub(rf"(?<!\\)\b{word}\b", "", answer)
    for old, new in SHORTER:
        answer = answer.replace(old, new)
    for part in REMOVED:
        answer = outside_commands(answer, part) if part.isalpha() else answer.replace(part, "")
    for pattern, new in REWRITES:
        answer = re.sub(pattern, new, answer)
    answer = answer.replace("$", "")
    return answer.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+", answer) else answer


def last_boxed(solution):
    """What stands in a solution's last \\boxed{...} (braces may nest), '\\boxed x' or \\fbox{...}; None if nowhere."""
    if "\\boxed " in solution:
        return solution.split("\\boxed ")[-1].split("$")[0]
    start = solution.rfind("\\boxed") if "\\boxed" in solution else solution.rfind("\\fbox")
    depth = 0
    for i in range(start, len(solution)) if start >= 0 else ():
        depth += (solution[i] == "{") - (solution[i] == "}")
        if solution[i] == "}" and depth == 0:
            return solution[solution.index("{", start) + 1 : i]
    return None


def math_gold(row):
    """The normalised gold answer of a MATH row: its `answer`, or what the last \\boxed of its `solution` holds."""
    answer = last_boxed(row["solution"]) if row.get("solution") else row.get("answer")
    if answer is None:
        raise ValueError(f"a MATH row has neither an answer nor a \\boxed{{}} in its solution: {row['problem'][:80]!r}")
    return math_normalize(answer)


def math_answer(text):
    """Minerva's final answer in generated text, not yet normalised."""
    # the closing words are appended since generation may have been cut right before them
    found = re.search(r"Final Answer: The final answer is(.*?). I hope it is correct.", text + "I hope it is correct.")
    return found.group(1).strip() if found else "[invalidanswer]"


@contextlib.contextmanager
def time_limit(seconds):
    """TimeoutError after `seconds` (whole ones), where the system has SIGALRM; elsewhere there is no limit."""

    def ring(signum, frame):
        raise TimeoutError

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def need_latex_parser():
    """ImportError, saying what to install, unless sympy can parse LaTeX."""
    try:
        import antlr4  # noqa: F401
        from sympy.parsing.latex import parse_latex  # noqa: F401
    except ImportError as e:
        wanted = "pip install antlr4-python3-runtime==4.11.1"
        raise ImportError(f"MATH's equivalence needs sympy's LaTeX parser: {wanted}") from e


def math_equal(a, b):
    """Whether two normalised answers are the same string, or the same to sympy; what sympy cannot read is not."""
    if a and a == b:
        return True
    import sympy
    from sympy.parsing.latex import parse_latex

    try:
        with time_limit(5):
            return bool(sympy.simplify(parse_latex(a) - parse_latex(b)) == 0)
    except Exception:  # generated text is arbitrary: whatever it makes the parser or simplify raise, it is no match
        return False


def math_scores(text, gold):
    """Generated text against a normalised gold answer -> em."""
    return {"em": float(math_equal(math_normalize(math_answer(text)), gold))}
