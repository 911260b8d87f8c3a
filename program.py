"""What every program here does around its work, so that whatever ends it is one line on stderr and an exit code.

    import program

    if __name__ == "__main__":
        program.begin()                         # before torch is imported

    import torch                                # and all the rest

    if __name__ == "__main__":
        program.run(main, CheckpointError)      # an error of these kinds is one line

    exit code
    0      done
    1      it could not be done; the line says what stood in the way
    2      a mistake in the command or the settings, found before anything was done
    130    Ctrl-C, at any moment; 143: SIGTERM. train.py's loop finishes its step instead, saves, and ends with 0

How threads wait. OpenMP's threads wait for each other at every operator, by spinning for milliseconds. Beside another
busy program one of them has no core, and the others burn theirs until it gets one: a training on two cores with two
neighbours was seen to fall to a twentieth of its speed. OMP_WAIT_POLICY=PASSIVE sleeps at once instead, and costs a
quiet machine a third. Between the two lies SPINS, which is the default of every program here (GNU's OpenMP, as in torch
for Linux, reads it; another ignores it). `python tools/bench.py neighbour` measures all three; whoever sets
OMP_WAIT_POLICY or GOMP_SPINCOUNT has chosen.

What becomes of freed memory. The C library gives the memory of a large tensor back to the system at once, and takes the
next one's in fresh pages, each of which the system must find and clear: with streams of 16 MB a quarter of all time. So
it is told to keep up to KEEP bytes for the next tensor. glibc alone listens; whoever sets MALLOC_... has chosen.
"""

import contextlib
import ctypes
import errno
import io
import os
import signal
import sys
import threading
import time

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
SPINS = "1000"  # rounds that a waiting thread spins before it sleeps, some tens of microseconds
KEEP = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
PATIENCE = 3  # seconds for Python to see a signal, before a thread ends the program
STDOUT = "standard output"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stopped(KeyboardInterrupt):
    """A signal, raised wherever the program is, so that it can clean up."""

    def __init__(self, number):
        super().__init__(f"stopped by {SIGNALS[number]}")
        self.code = 128 + number


def say(line):
    """One line on stderr, if there is room for it."""
    with contextlib.suppress(OSError, ValueError):
        print(" ".join(line.splitlines()), file=sys.stderr, flush=True)


def is_first():
    """Whether this is the process that speaks for all: rank 0, if torchrun has started several."""
    return os.environ.get("RANK", "0") == "0"


# -- before ---------------------------------------------------------------------------------------------------------


def begin():
    """From here on a signal ends the program in one line; nothing is there yet that would need clearing up."""
    wait_kindly()
    keep_memory()
    handle_signals(leave)
    if sys.stderr is None:  # closed: print(file=None) would write errors to stdout
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        say("error: standard output is closed: send it to a file, or to /dev/null")
        raise SystemExit(2)
    encoding = sys.stdout.encoding
    sys.stdout = sys.__stdout__ = Stdout(sys.stdout.detach(), encoding)


def wait_kindly():
    """Have waiting threads spin briefly, unless the user has chosen. Only before torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def keep_memory():
    """Have the C library keep freed memory, unless the user has chosen, or it is one that has no such setting."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, TypeError, OSError):  # no mallopt; no way to the C library
        mallopt = ctypes.CDLL(None).mallopt
        # smaller blocks come from memory that is kept (older versions take 32 MB at most),
        mallopt(M_MMAP_THRESHOLD, KEEP) or mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, KEEP)  # of which so much may be unused


class Stdout(io.TextIOWrapper):
    """Standard output: a terminal or a file name that is not UTF-8 does not end the program, whoever reads a pipe sees
    each line at once, and a full disk or a reader that left is an OSError with a name."""

    def __init__(self, buffer, encoding):
        super().__init__(buffer, encoding, errors="backslashreplace", line_buffering=True)

    def write(self, text):
        with naming(STDOUT):
            return super().write(text)

    def flush(self):
        with naming(STDOUT):
            super().flush()


def handle_signals(handler):
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background job is not to hear the Ctrl-C
            signal.signal(number, handler)


def leave(number, frame=None):
    """Handler: end now, with whatever is going on left as it is."""
    if is_first():
        say(f"stopped by {SIGNALS[number]}")
    os._exit(128 + number)


# -- the work -------------------------------------------------------------------------------------------------------

raised = threading.Event()  # whether `interrupt` has run


def interrupt(number, frame):
    """Handler: raise Stopped, so that `finally` and `with` clean up; a second signal does not wait for that."""
    raised.set()
    handle_signals(leave)
    raise Stopped(number)


def watch_signals():
    """Python's handlers wait for the main thread, which may be inside C for long: in a collective that nobody answers,
    say. This thread hears a signal at once, and ends the program if it is still there PATIENCE seconds later; where
    somebody else handles the signal (train.py's loop), only after a second one."""
    heard, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)

    def listen():
        first = None
        while number := os.read(heard, 1):
            number, now = number[0], time.monotonic()
            if number not in SIGNALS or first is not None and now - first < 2:  # torchrun passes on what the terminal
                continue  # has sent to all: that is no second signal
            again, first = first is not None, now
            if not again and signal.getsignal(number) not in (leave, interrupt):
                continue
            time.sleep(PATIENCE)
            if again or not raised.is_set():
                leave(number)

    threading.Thread(target=listen, daemon=True).start()


def run(main, *known):
    """main() as a whole program. known: kinds of exceptions whose message is for the user: exit code 1, or `code`.

    One that is raised on every process alike (its class says `on_every_rank = True`) is told by rank 0 alone.
    Exceptions that nobody expected keep their traceback."""
    handle_signals(interrupt)
    watch_signals()
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt as e:
        end(str(e) or "stopped by Ctrl-C", getattr(e, "code", 130), is_first())
    except known as e:
        end(f"error: {e}", getattr(e, "code", 1), is_first() or not getattr(e, "on_every_rank", False))
    except OSError as e:
        end(f"error: {what_failed(e)}", 1)
    except (MemoryError, RuntimeError) as e:  # torch's own types: OutOfMemoryError, and RuntimeError on a CPU
        if not isinstance(e, MemoryError) and "allocate" not in str(e):
            raise
        end(f"error: out of memory: {(str(e) or type(e).__name__).splitlines()[0]}", 1)
    finally:
        for number in SIGNALS:  # what remains is the interpreter's own end, where an exception would be a traceback
            if signal.getsignal(number) is interrupt:
                signal.signal(number, leave)


def end(line, code, speaks=True):
    if speaks:
        say(line)
    raise SystemExit(code)


def what_failed(e):
    """What an OSError says, in one line; one that names no file is raised again."""
    if e.filename == STDOUT:
        sys.stdout = open(os.devnull, "w")  # or the interpreter's own flush at its end fails too
    if e.filename is None and e.errno not in NO_ROOM:
        raise e
    where = os.fsdecode(e.filename) if isinstance(e.filename, (str, bytes)) else "a file"
    if e.errno in NO_ROOM:
        return f"{where} could not be written: {e.strerror}; make room, and run the same command again"
    return f"{where}: {e.strerror or e}"


@contextlib.contextmanager
def naming(path):
    """An OSError from inside names `path`: open() says which file it was about, write() and flush() do not."""
    try:
        yield
    except OSError as e:
        if e.filename is None:
            e.filename = path
        raise
