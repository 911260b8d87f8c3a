"""What the tasks count as right: extraction and metrics, written from their definitions. Text in, numbers out.

    choices      acc, acc_norm                        argmax of the log-probability, whole and per character
    LAMBADA      acc, perplexity                      the last word: whether greedy says it, its log-probability
    GSM8K        strict, flexible                     the number behind '####', or the last number of all
    BBH          em                                   what follows 'the answer is'
    TriviaQA     em                                   any alias, after the official (or the harness') normalisation
    DROP         em, f1                               bags of words, aligned one to one (Dua et al. 2019)
    MATH                                              see evals/math_answer.py

"harness" is lm-evaluation-harness 0.4.13, whose numbers these reproduce digit by digit, oddities included; an oddity
that costs a model points is named where it stands. Generated text is arbitrary: of each no more than MAX_TEXT
characters are looked at.
"""

import re
import string

import numpy as np

MAX_TEXT = 10_000  # characters; 1024 tokens of English are about 5,000
INVALID = "[invalid]"  # what an extraction gives when it finds nothing: equal to no answer
ARTICLES = re.compile(r"\b(a|an|the)\b")


# ----------------------------------------------------------------------------------------------------------------------
# Choices


def argmax(values):
    """Index of the largest value; the first of equals, as numpy has it."""
    return max(range(len(values)), key=lambda i: values[i])


def choice_scores(scored, choices, gold):
    """(summed log-probability, greedy) of each choice's text -> acc and acc_norm, 0.0 or 1.0.

    acc_norm divides by the characters of the choice (not tokens, not bytes, and not the space in front of it).
    """
    logprobs = [lp for lp, _ in scored]
    per_character = [lp / max(1, len(c)) for lp, c in zip(logprobs, choices, strict=True)]
    return {"acc": float(argmax(logprobs) == gold), "acc_norm": float(argmax(per_character) == gold)}


def last_word_scores(scored, choices, gold):
    """LAMBADA: whether greedy decoding says the one text there is, and its negative log-probability in nats.

    The perplexity of the task is exp of the mean of the latter (report.py).
    """
    ((logprob, greedy),) = scored
    return {"acc": float(greedy), "perplexity": -logprob}


# ----------------------------------------------------------------------------------------------------------------------
# Finding the answer in generated text


def find(pattern, text, which=0):
    """The first (which=0) or last (-1) match of pattern; of several groups the first that caught anything; stripped."""
    found = re.findall(pattern, text[:MAX_TEXT])
    if not found:
        return INVALID
    groups = found[which] if isinstance(found[which], tuple) else (found[which],)
    return next((g for g in groups if g), "" if len(groups) == 1 else INVALID).strip()


GSM8K_STRICT = r"#### (\-?[0-9\.\,]+)"
GSM8K_FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"


def gsm8k_number(text):
    """An answer as the harness compares it: no ',' or '$', nothing before '#### ', no final '.', lower case."""
    text = text[:MAX_TEXT].replace(",", "").replace("$", "")
    text = text.rpartition("#### ")[2]
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
    return float(triviaqa_normalize(text[:MAX_TEXT]) in {triviaqa_normalize(a) for a in aliases})


def triviaqa_harness_em(text, aliases):
    """The harness' exact match: lower case with punctuation deleted ('T.S.' is 'ts', articles stay)."""

    def plain(s):
        return s.lower().translate(str.maketrans("", "", string.punctuation))

    return float(plain(text[:MAX_TEXT].strip()) in {plain(a) for a in aliases})


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


def drop_answer(text):
    """What a model says on the line of its answer, without the final full stop: '54.6 yards.' is '54.6 yards'."""
    return text[:MAX_TEXT].strip().split("\n")[0].rstrip().removesuffix(".")


def drop_scores(predicted, golds):
    """An answer against all gold answers (lists of spans): em and f1, each the best over golds.

    predicted: a text, one span where the gold answer is one ('Paris, France') and a list at its commas where it is
    several; or a list of spans.
    """

    def spans(gold):
        if not isinstance(predicted, str):
            return list(predicted)
        return re.split(r",\s+(?:and\s+)?", predicted) if len(gold) > 1 else [predicted]

    pairs = [drop_pair(spans(gold), gold) for gold in golds if gold[0].strip()]
    return {"f1": max((f1 for _, f1 in pairs), default=0.0), "em": max((em for em, _ in pairs), default=0.0)}
