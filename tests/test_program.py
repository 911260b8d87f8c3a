"""program.py: whatever ends a program is one line and an exit code; small programs without torch, and the real ones."""

import glob
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import program

ROOT = Path(__file__).parent.parent
PROGRAMS = [
    name for name in sorted(glob.glob("*.py", root_dir=ROOT) + glob.glob("tools/*.py", root_dir=ROOT))
    if name != "program.py" and '\nif __name__ == "__main__":' in (ROOT / name).read_text()
]  # fmt: skip


def small(body):
    """A program of these lines, as `python -c` takes it."""
    indented = "\n".join("    " + line for line in body.splitlines())
    return [
        sys.executable,
        "-c",
        f"""
import program
program.begin()
import os, sys, time
class Known(RuntimeError):
    pass
def main():
{indented}
program.run(main, Known)
""",
    ]


def start(command, **more):
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  a background job ignores it
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OMP_WAIT_POLICY")}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | more
    return subprocess.Popen(command, cwd=ROOT, env=env, preexec_fn=heed, **pipes)


def end(process):
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def catches(pid, number):
    """Whether the process has a handler for a signal."""
    with open(f"/proc/{pid}/status") as f:
        caught = next(int(line.split()[1], 16) for line in f if line.startswith("SigCgt"))
    return caught >> (number - 1) & 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_signal_during_the_imports_of_any_program_is_one_line(name):
    number, code = (signal.SIGTERM, 143) if PROGRAMS.index(name) % 2 else (signal.SIGINT, 130)
    process = start([sys.executable, name, *(["compile"] if "kernel" in name else [])])
    wait_for(lambda: catches(process.pid, signal.SIGTERM))
    process.send_signal(number)
    assert end(process) == (code, f"stopped by {program.SIGNALS[number]}\n")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_work_cleans_up_first(number, code):
    process = start(
        small("try:\n    print('at work')\n    time.sleep(60)\nfinally:\n    print('clean', file=sys.stderr)")
    )
    assert process.stdout.readline() == "at work\n"
    process.send_signal(number)
    assert end(process) == (code, f"clean\nstopped by {program.SIGNALS[number]}\n")


def test_a_second_signal_does_not_wait_for_cleaning_up():
    body = "try:\n    print('at work')\n    time.sleep(60)\nfinally:\n    print('cleaning')\n    time.sleep(60)"
    process = start(small(body))
    for said in ("at work", "cleaning"):
        assert process.stdout.readline() == said + "\n"
        process.send_signal(signal.SIGINT)
    assert end(process) == (130, "stopped by Ctrl-C\n")


def test_a_signal_that_finds_the_program_inside_c_ends_it_soon():
    """As in a collective that nobody answers: Python's handler cannot run there."""
    body = (
        "import ctypes\nc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\nprint('at work')\n"
        "for _ in range(2):\n    c.pthread_mutex_lock(mutex)"
    )  # the second waits for ever
    process = start(small(body))
    assert process.stdout.readline() == "at work\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (143, "stopped by SIGTERM\n")


@pytest.mark.parametrize(
    "body, code, said",
    [
        ("pass", 0, ""), ("sys.exit(2)", 2, ""), ("sys.exit('error: no')", 1, "error: no\n"),
        ("raise Known('two\\nlines')", 1, "error: two lines\n"),
        ("open('/no/such/file')", 1, "error: /no/such/file: No such file or directory\n"),
        ("with program.naming('a file'), open('/dev/full', 'w') as f:\n    f.write('x')", 1,
         "error: a file could not be written: No space left on device; make room, and run the same command again\n"),
        ("raise MemoryError", 1, "error: out of memory: MemoryError\n"),
        ("raise RuntimeError(\"can't allocate memory: you tried 8 bytes\\nand more\")", 1,
         "error: out of memory: can't allocate memory: you tried 8 bytes\n"),
        ("print('\\udcff', '\\u2603')", 0, ""),
    ],
)  # fmt: skip
def test_every_end_is_one_line(body, code, said):
    assert end(start(small(body))) == (code, said)


def test_a_bug_keeps_its_traceback():
    code, err = end(start(small("raise KeyError('a bug')")))
    assert code == 1 and "Traceback" in err and err.endswith("KeyError: 'a bug'\n")


def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        code, err = end(start(small("print('x')"), stdout=full))
    said = "error: standard output could not be written: No space left on device"
    assert code == 1 and err.startswith(said) and err.count("\n") == 1
    read, write = os.pipe()
    os.close(read)
    assert end(start(small("print('x')"), stdout=write)) == (1, "error: standard output: Broken pipe\n")
    os.close(write)
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *small("print('x')")]
    assert end(start(shell)) == (2, "error: standard output is closed: send it to a file, or to /dev/null\n")
    with open("/dev/full", "w") as full:  # nobody can be told; the exit code still says so
        assert start(small("sys.exit('error: no')"), stderr=full).wait(60) == 1


def test_waiting_threads_spin_briefly_unless_the_user_has_chosen():
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    body = f"print(*(os.environ.get(name) for name in {names}))"
    unset = ["env", *(f"--unset={name}" for name in names)]
    for theirs, found in (
        ([], f"None {program.SPINS}"),
        (["OMP_WAIT_POLICY=ACTIVE"], "ACTIVE None"),
        (["GOMP_SPINCOUNT=7"], "None 7"),
    ):
        assert start([*unset, *theirs, *small(body)]).communicate(timeout=60)[0] == found + "\n"
    assert any(os.environ.get(name) for name in names)  # conftest.py has seen to it, before torch


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_tensor_unless_the_user_has_chosen():
    """Pages that were faulted in for the second to ninth block of 16 MB, each freed before the next."""
    body = """
import resource
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
seen = [faults() for _ in range(9) if bytes(b"1" * 2**24)]
print(seen[-1] - seen[0] < 1000)"""
    unset = ["env", *(f"--unset={name}" for name in os.environ if name.startswith("MALLOC_"))]
    for theirs, kept in ([], True), (["MALLOC_ARENA_MAX=2"], False):
        assert start([*unset, *theirs, *small(body)]).communicate(timeout=60)[0] == f"{kept}\n"
