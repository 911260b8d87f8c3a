"""lm-evaluation-harness itself drives a checkpoint, so that any of its tasks can be run. Needs `pip install lm-eval`.

    python eval.py out/demo/mhc --lm_eval=arc_easy,winogrande --limit=100

From Python, importing this file registers the model 'mhc':

    import lm_eval
    from evals import harness
    lm_eval.simple_evaluate(model="mhc", model_args="pretrained=out/demo/mhc", tasks=["arc_easy"])

    pip install lm-eval==0.4.13 && pytest tests/test_eval_harness.py    # a task of choices, one of generation; offline

lm-eval asks with texts; what it gets comes from evals/score.py, with shared prefixes and on all processes of torchrun.
"""

import logging
import os

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from checkpoint import load_model
from configurator import fail
from evals import score
from evals.generate import generate
from evals.rows import TaskError
from owned import write_json
from records import RecordError, anything, each, read_json
from tokenizer import open_encoding


@register_model("mhc")
class Checkpoint(TemplateLM):
    """A checkpoint (or a model and its tiktoken.Encoding) as lm-eval sees a language model. Greedy only."""

    def __init__(self, pretrained="", model=None, encoding=None, device="cpu", dtype="float32", batch_tokens=16384,
                 max_length=0, data_dir="", **unused):  # fmt: skip
        super().__init__()
        known = {k: v for k, v in unused.items() if k in ("batch_size", "max_batch_size")}  # lm-eval always sends these
        if set(unused) - set(known):
            raise ValueError(f"model_args: unknown {', '.join(set(unused) - set(known))}")
        if model is None:
            model, settings = load_model(pretrained, device)
            encoding = open_encoding({"data_dir": data_dir}, settings, model.config)
        self.encoding, self.batch_tokens = encoding, int(batch_tokens)
        self.runner = score.Runner(model, dtype, int(max_length))

    @property
    def eot_token_id(self):
        return self.encoding.eot_token

    def tok_encode(self, string, add_special_tokens=None, **unused):
        return self.encoding.encode_ordinary(string)

    def loglikelihood(self, requests, disable_tqdm=False):
        """Requests of one document become one item, and tasks become groups, so that prefixes are shared."""
        items = {}
        for i, request in enumerate(requests):
            items.setdefault((request.task_name, request.doc_id), []).append(i)
        pairs = [[score.encode_pair(self.encoding, *requests[i].args) for i in item] for item in items.values()]
        groups = [task for task, _ in items]
        found = self.score(pairs, groups, disable_tqdm)
        by_request = {i: score for item, scores in zip(items.values(), found, strict=True)
                      for i, score in zip(item, scores, strict=True)}  # fmt: skip
        return [by_request[i] for i in range(len(requests))]

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **unused):
        found = self.score([[(context, continuation)] for _, context, continuation in requests], None, disable_tqdm)
        return [score for (score,) in found]

    def score(self, items, groups, quiet):
        title = "" if quiet else "lm-eval: log-likelihoods"
        return score.loglikelihoods(self.runner, items, groups, self.batch_tokens, title=title)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """The whole text, in windows that overlap by one token, as lm-eval cuts them."""
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.runner.max_length, context_len=1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(lp for lp, _ in self._loglikelihood_tokens(pairs, disable_tqdm)))
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        texts = {}
        kinds = {}  # requests that stop alike run together
        for i, request in enumerate(requests):
            kwargs = normalize_gen_kwargs(request.args[1])
            if kwargs["do_sample"]:
                raise ValueError(f"{request.task_name}: wants sampling; only greedy generation is offered")
            kinds.setdefault((tuple(kwargs["until"]), kwargs["max_gen_toks"]), []).append(i)
        for (stops, budget), mine in kinds.items():
            prompts, groups = [requests[i].args[0] for i in mine], [requests[i].task_name for i in mine]
            title = "" if disable_tqdm else "lm-eval: generation"
            found = generate(
                self.runner, self.encoding, prompts, groups, [s for s in stops if s], budget, self.batch_tokens, title
            )
            texts.update(zip(mine, found, strict=True))
        return [texts[i] for i in range(len(requests))]


class Tasks(TaskManager):
    """lm-eval's tasks, which fetch their data from the Hugging Face Hub as they are loaded."""

    def load(self, names):
        try:
            return super().load(names)
        except Exception as e:  # a network, a hub, a package that a task needs: whatever it raises, it is not here
            why = " ".join(f"{type(e).__name__}: {e}".split())[:300]
            raise TaskError(
                f"lm_eval: {', '.join(names)} could not be loaded ({why}); lm-eval fetches its tasks' data from the "
                f"Hugging Face Hub, or takes them from its cache with HF_DATASETS_OFFLINE=1"
            ) from None


def is_ours(path):
    """Whether a file is an earlier lm_eval.json; another may not be overwritten."""
    try:
        return "lm_eval" in read_json(path, each(anything))
    except RecordError:
        return False


def run(checkpoints, tasks, s, out_dir, main):
    """eval.py's --lm_eval: run these tasks on every checkpoint; tables to the terminal, results to lm_eval.json.

    Raises TaskError if a task cannot be loaded, or a model's output is not a number.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    manager, found = Tasks(), {}
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        fail(f"lm_eval: lm-evaluation-harness has no task {', '.join(map(repr, unknown))}; lm-eval ls tasks lists all")
    for checkpoint in checkpoints:
        keys = ("device", "dtype", "batch_tokens", "max_length", "data_dir")
        model = Checkpoint(checkpoint, **{k: s[k] for k in keys})
        try:
            results = lm_eval.simple_evaluate(
                model=model, tasks=tasks, limit=s["limit"] or None, num_fewshot=None if s["shots"] < 0 else s["shots"],
                task_manager=manager, log_samples=False, bootstrap_iters=0,
            )  # fmt: skip
        except FloatingPointError as e:
            raise TaskError(f"{checkpoint}: {e}") from e
        found[checkpoint] = {k: results[k] for k in ("results", "versions", "n-shot", "n-samples")}
        if main:
            print(f"{checkpoint}, lm-evaluation-harness {lm_eval.__version__}\n{make_table(results)}")
    if main:
        path = os.path.join(out_dir, "lm_eval.json")
        write_json(path, {"lm_eval": lm_eval.__version__, "checkpoints": found}, ours=is_ours)
        print(f"results: {path}")
