"""sample.py as a command: a checkpoint in, text out."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sample
from checkpoint import save
from data import sha256_file
from model import GPT, GPTConfig
from tokenizer import make_tokenizer, save_tokenizer

ROOT = Path(__file__).parent.parent
CONFIG = dict(
    vocab_size=260, seq_len=32, n_layer=2, n_embd=16, n_head=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4,
    v_head_dim=8, intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    init_std=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of an untrained model over bytes, whose vocabulary is padded to 260."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "tokenizer.json"
    save_tokenizer(make_tokenizer("bytes"), path)
    meta = {"vocab_size": 257, "eot": 256, "splits": {}}
    meta |= {"tokenizer_file": path.name, "tokenizer_sha256": sha256_file(path)}
    (folder / "meta.json").write_text(json.dumps(meta))
    model = GPT(GPTConfig(**CONFIG))
    model.init_weights(0)
    save(str(folder), 7, model, None, {}, CONFIG | {"data_dir": str(folder)})
    return str(folder)


@pytest.fixture
def run(run_folder, monkeypatch, capsys):
    """run(*args) -> stdout, stderr of `python sample.py <run> *args`, in this process."""
    settings = {k: v for k, v in vars(sample).items() if not k.startswith("_") and isinstance(v, (str, int, float))}
    monkeypatch.setattr(sys, "stdin", None)

    def call(*args, checkpoint=run_folder):
        vars(sample).update(settings)
        monkeypatch.setattr(sys, "argv", ["sample.py", *([checkpoint] if checkpoint else []), *args])
        try:
            sample.main()
        finally:
            vars(sample).update(settings)
        return capsys.readouterr()

    return call


def test_text_on_stdout_and_the_rest_on_stderr(run):
    out, err = run("--prompt=Zoë ", "--max_new_tokens=20")
    assert out.startswith("Zoë ") and len(out) > 12
    assert "prefill: 5 tokens in" in err and "; decode: " in err and "tokens/s" in err
    assert "max_new_tokens = 20" in err


def test_samples_are_the_same_drawn_together_or_alone(run):
    together = run("--prompt=ab", "--num_samples=3", "--seed=5", "--max_new_tokens=25")[0]
    assert together.count("--- seed ") == 3
    alone = [run("--prompt=ab", f"--seed={s}", "--max_new_tokens=25")[0] for s in (5, 6, 7)]
    assert together == "".join(f"--- seed {s} ---\n{text}" for s, text in zip((5, 6, 7), alone, strict=True))
    assert len(set(alone)) == 3


def test_a_prompt_from_a_file_and_a_step_folder(run, run_folder, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"x\r\ny")
    step = os.path.join(run_folder, "step-00000007")
    out = run(f"--prompt=FILE:{tmp_path}/p.txt", "--temperature=0", "--max_new_tokens=9", checkpoint=step)[0]
    assert out == run("--prompt=x\r\ny", "--temperature=0", "--max_new_tokens=9")[0]


def test_beyond_the_trained_length_a_line_says_so(run):
    assert "come to 33 tokens, the model was trained on 32" in run("--prompt=abc", "--max_new_tokens=30")[1]
    assert "trained on" not in run("--prompt=abc", "--max_new_tokens=29")[1]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--temperature=-1"], "temperature=-1.0: wanted a number of at least 0"),
        (["--top_p=0"], "top_p=0.0: wanted a number above 0 and at most 1"),
        (["--top_p=1.5"], "top_p=1.5: wanted a number above 0 and at most 1"),
        (["--top_k=-3"], "top_k=-3: wanted a number of at least 0"),
        (["--num_samples=0"], "num_samples=0: wanted a number of at least 1"),
        (["--max_new_tokens=0"], "max_new_tokens=0: wanted a number of at least 1"),
        (["--seed=-1"], "seed=-1: wanted a number from 0"),
        (["--seed=4294967296"], "seed=4294967296: wanted a number from 0 to 4294967295"),
        (["--seed=4294967295", "--num_samples=2"], "wanted at most 4294967294 for 2 samples"),
        (["--temprature=1"], "did you mean temperature?"),
        (["--prompt=FILE:/no/such"], "the file cannot be read (No such file or directory)"),
        (["--data_dir=/no/such"], "no prepared corpus here"),
        (["another/run"], "wanted one run folder or step folder, like python sample.py out/demo/mhc; got 2"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(run, capsys, args, message):
    with pytest.raises(SystemExit) as end:
        run(*args)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")


def test_no_checkpoint(run, tmp_path, capsys):
    for checkpoint, message in ((str(tmp_path), "wanted a run folder"), (None, "got 0")):
        with pytest.raises(SystemExit):
            run(checkpoint=checkpoint)
        assert message in capsys.readouterr().err


def test_a_piped_prompt_and_a_reader_that_leaves(run_folder):
    """As a process of its own: text arrives through a pipe, and `head` going away is no error."""
    command = [sys.executable, "sample.py", run_folder, "--max_new_tokens=3", "--temperature=0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, input="héllo".encode(), capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.decode().startswith("héllo") and b"from stdin" in done.stderr
    read, write = os.pipe()
    os.close(read)
    gone = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE,
                          timeout=120)  # fmt: skip
    os.close(write)
    assert b"Traceback" not in gone.stderr and b"Exception ignored" not in gone.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Without a model


def test_endoftext_in_a_prompt_is_the_separator():
    encoding = make_tokenizer("bytes")
    assert sample.encode_prompt(encoding, "") == [256]
    assert sample.encode_prompt(encoding, "a<|endoftext|>b") == [97, 256, 98]
    assert sample.encode_prompt(encoding, "<|endoftext|><|endoftext|>") == [256, 256]
    assert sample.encode_prompt(encoding, "<|endoftext") == list(b"<|endoftext")


class Out(io.StringIO):
    """Remembers what was visible after every flush."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def flush(self):
        self.seen.append(self.getvalue())


def test_partial_characters_are_held_back():
    out = Out()
    printer = sample.Printer([bytes([i]) for i in range(256)], [">"], out)
    for token in [*"aé€😀".encode(), 0xC3, None]:  # and one that never becomes whole
        printer(0, token)
    wanted = [">a", ">a", ">aé", ">aé", ">aé", ">aé€", ">aé€", ">aé€", ">aé€", ">aé€😀", ">aé€😀", ">aé€😀\ufffd\n"]
    assert out.seen == wanted


def test_the_first_sample_is_live_and_the_others_wait_their_turn():
    out = Out()
    printer = sample.Printer([b"a", b"b", b"c"], ["<0>", "<1>", "<2>"], out)
    seen = []
    for i, token in [(0, 0), (1, 1), (2, 2), (0, 0), (1, 1), (2, None), (0, None), (1, 1), (1, None)]:
        printer(i, token)
        seen.append(out.getvalue())
    first, second = "<0>aa\n", "<1>bbb\n"
    assert seen == ["<0>a"] * 3 + ["<0>aa"] * 3 + [first + "<1>bb", first + "<1>bbb", first + second + "<2>c\n"]
    assert printer.tokens == [2, 3, 1]


def test_a_sample_that_ends_at_once_has_rates_too():
    printer = sample.Printer([b"a"], [""], Out())
    printer(0, None)
    assert "prefill: 3 tokens" in printer.rates(printer.first_at - 1, 3) and "decode" not in printer.rates(0, 3)


def test_bfloat16(run):
    assert run("--prompt=ab", "--dtype=bfloat16", "--max_new_tokens=5")[0].startswith("ab")
