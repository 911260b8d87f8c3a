"""MATH's final answers: found, brought to Minerva's normal form (Lewkowycz et al. 2022, app. D), compared by sympy.

    math_scores(generated_text, math_gold(row))         # {'em': 1.0}

As in lm-evaluation-harness 0.4.13. Generated text is arbitrary: an answer of more than MAX_ANSWER characters is none,
and sympy has SECONDS for each. Needs antlr4-python3-runtime 4.11 (sympy's LaTeX parser).
"""

import contextlib
import re
import signal

from evals.metrics import MAX_TEXT

INVALID = "[invalidanswer]"  # equal to no answer
SECONDS = 5  # of this process's time
MAX_ANSWER = 1000  # characters; the longest of MATH's own has 159

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
    """Minerva's normal form of a final answer: no units, no dressing, shorthand TeX written out, 1,000 as 1000.

    Some of the patterns take time with the square of the length: what is longer than MAX_ANSWER is INVALID.
    """
    if len(answer) > MAX_ANSWER:
        return INVALID
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
    if len(answer) > MAX_ANSWER:
        raise ValueError(f"wanted an answer of at most {MAX_ANSWER} characters, got {len(answer)}")
    return math_normalize(answer)


def math_answer(text):
    """Minerva's final answer in generated text, not yet normalised."""
    # the closing words are appended since generation may have been cut right before them
    text = text[:MAX_TEXT] + "I hope it is correct."
    found = re.search(r"Final Answer: The final answer is(.*?). I hope it is correct.", text)
    return found.group(1).strip() if found else INVALID


@contextlib.contextmanager
def time_limit(seconds):
    """TimeoutError after `seconds` of this process's own time, so that a busy machine changes no score.

    Where the system has no SIGVTALRM there is no limit.
    """

    def ring(signum, frame):
        raise TimeoutError

    if not hasattr(signal, "SIGVTALRM"):
        yield
        return
    old = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)


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
        with time_limit(SECONDS):
            return bool(sympy.simplify(parse_latex(a) - parse_latex(b)) == 0)
    except Exception:  # generated text is arbitrary: whatever it makes the parser or simplify raise, it is no match
        return False


def math_scores(text, gold):
    """Generated text against a normalised gold answer -> em."""
    return {"em": float(math_equal(math_normalize(math_answer(text)), gold))}
