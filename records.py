"""One reader for the small files that a person or another program may have touched: state.json, meta.json,
tokenizer.json, a line of metrics, a row of an evaluation, the settings inside a checkpoint.

    RUN = {"step": integer(0), "settings": each(anything), "best?": boolean, "loss": null_or(number())}
    record = read_json("out/run/step-00000100/state.json", RUN)
    for record in read_lines("out/run/metrics.jsonl", {"step": integer(0), "loss?": null_or(number())}): ...

A table says what a file holds: {name: kind} is an object with these fields ("name?" may be missing), [kind] a list,
(kind, kind) a list of exactly two, each(kind) an object with any names, any_of(kind, kind) one or the other. Fields
that a table does not name are left alone: a later version may write them.

Whatever is wrong with a file is one RecordError of one line, with the file's name, the line and the field: not UTF-8,
not JSON, NaN, nested too deeply, another type, out of range, larger than `limit` bytes (which is looked at before any
of it is read), a folder, a FIFO or a device where a file is wanted. Two kinds are told apart, because neither says that
the content is bad: Missing, and Unreadable (a permission, an I/O error: it may be readable tomorrow).
"""

import contextlib
import json
import math
import os
import reprlib
import stat
from collections.abc import Callable
from dataclasses import dataclass

FILE_LIMIT = 256 << 20  # bytes of a file that is read whole
LINE_LIMIT = 16 << 20  # bytes of one line


class RecordError(ValueError):
    """A file that does not hold what it should; the message is one line that begins with its name."""


class Missing(RecordError):
    """There is no such file."""


class Unreadable(RecordError):
    """It is there and cannot be read just now; what it holds is not known."""


# -- kinds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A single value: `test` says whether it will do, `wanted` what would."""

    test: Callable
    wanted: str


@dataclass(frozen=True)
class Each:
    """An object of any names whose values are all of one kind; `name`, if given, is the rule for the names."""

    kind: object
    name: Rule | None = None


@dataclass(frozen=True)
class NullOr:
    kind: object


@dataclass(frozen=True)
class AnyOf:
    """One of several kinds; the message is that of the last."""

    kinds: list


each, null_or, any_of = Each, NullOr, lambda *kinds: AnyOf(kinds)
anything = Rule(lambda v: True, "anything")
boolean = Rule(lambda v: isinstance(v, bool), "true or false")


def integer(low=-(2**63), high=2**63 - 1):
    """A whole number from low to high; 3.0 is none, nor is true."""
    bounds = "" if (low, high) == (-(2**63), 2**63 - 1) else f" from {low}" + f" to {high}" * (high < 2**63 - 1)
    return Rule(lambda v: type(v) is int and low <= v <= high, "a whole number" + bounds)


def number(low=-math.inf, high=math.inf):
    """A finite number from low to high, whole or not."""
    bounds = (f" from {low}" if low > -math.inf else "") + (f" to {high}" if high < math.inf else "")
    finite = lambda v: type(v) is int and abs(v) < 10**300 or type(v) is float and math.isfinite(v)  # noqa: E731
    return Rule(lambda v: finite(v) and low <= v <= high, "a number" + bounds)


def string(least=0, most=LINE_LIMIT):
    """A string that UTF-8 can write: JSON can spell half of a surrogate pair, and no terminal can print it."""
    return Rule(
        lambda v: isinstance(v, str) and least <= len(v) <= most and is_utf8(v), "a string" + " with text" * (least > 0)
    )


def one_of(*values):
    """One of these values, of the same type too: 1 is not true."""
    wanted = " or ".join(json.dumps(v) for v in values)
    return Rule(lambda v: any(type(v) is type(w) and v == w for w in values), wanted)


def hexadecimal(digits):
    """Such as a sha256 (64 digits)."""
    allowed = frozenset("0123456789abcdef")
    return Rule(lambda v: isinstance(v, str) and len(v) == digits and allowed.issuperset(v), f"{digits} hex digits")


def is_file_name(value):
    return (
        isinstance(value, str) and is_utf8(value) and value not in ("", ".", "..") and not set(value) & set("/\\\0\n")
    )


file_name = Rule(is_file_name, "a file's name without a folder")
sha256 = hexadecimal(64)


def is_utf8(string):
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


# -- checking ---------------------------------------------------------------------------------------------------------

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 60
SHORT.maxlevel, SHORT.maxdict, SHORT.maxlist = 2, 3, 4


def short(value):
    """A value on one short line, however large or deep it is."""
    return SHORT.repr(value)


def check(value, kind, where, field=""):
    """value, if it is of this kind. Raises RecordError: '<where>: <field>: wanted ..., got ...'."""
    place = f"{where}: {field}" if field else where
    dot = field + "." if field else ""
    if isinstance(kind, NullOr):
        return value if value is None else check(value, kind.kind, where, field)
    if isinstance(kind, Rule):
        if not kind.test(value):
            raise RecordError(f"{place}: wanted {kind.wanted}, got {short(value)}")
    elif isinstance(kind, AnyOf):
        for other in kind.kinds[:-1]:
            with contextlib.suppress(RecordError):
                return check(value, other, where, field)
        check(value, kind.kinds[-1], where, field)
    elif isinstance(kind, (list, tuple)):
        kinds = kind if isinstance(kind, tuple) else kind * len(value) if isinstance(value, list) else ()
        if not isinstance(value, list) or len(value) != len(kinds):
            wanted = f"a list of {len(kind)}" if isinstance(kind, tuple) else "a list"
            raise RecordError(f"{place}: wanted {wanted}, got {short(value)}")
        for i, (item, inner) in enumerate(zip(value, kinds, strict=True)):
            check(item, inner, where, f"{field}[{i}]")
    elif not isinstance(value, dict):
        raise RecordError(f"{place}: wanted an object, got {short(value)}")
    elif isinstance(kind, Each):
        for name, item in value.items():
            if kind.name:
                check(name, kind.name, where, dot + "a name")
            check(item, kind.kind, where, dot + short(name))
    else:
        for name, inner in kind.items():
            known = name.removesuffix("?")
            if known in value:
                check(value[known], inner, where, dot + known)
            elif known == name:
                raise RecordError(f"{place}: no {known!r}: wanted {', '.join(k for k in kind if k[-1] != '?')}")
    return value


def finite(digits):
    """A float of JSON text; 1e999 is Python's infinity and no number."""
    if math.isinf(value := float(digits)):
        raise ValueError(f"{digits[:20]} is too large a number")
    return value


def no_constant(name):
    raise ValueError(f"{name} is not JSON")


def parse(data, kind, where, nan=False):
    """Bytes of JSON -> the value, if it is of this kind. Raises RecordError that begins with `where`.

    nan: take NaN, which is not JSON, for null; older versions of some files have it."""
    try:
        constant = (lambda name: None) if nan else no_constant
        value = json.loads(data.decode(), parse_float=finite, parse_constant=constant)
    except UnicodeDecodeError as e:
        raise RecordError(f"{where}: not UTF-8 (byte {e.start})") from None
    except RecursionError:
        raise RecordError(f"{where}: nested too deeply") from None
    except ValueError as e:
        raise RecordError(f"{where}: not JSON ({e})") from None
    return check(value, kind, where)


# -- reading ----------------------------------------------------------------------------------------------------------


def kind_of_file(mode):
    """What a st_mode says that something is, in words."""
    kinds = {stat.S_ISREG: "a file", stat.S_ISDIR: "a folder", stat.S_ISLNK: "a link", stat.S_ISFIFO: "a FIFO",
             stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}  # fmt: skip
    return next((words for test, words in kinds.items() if test(mode)), "something unknown")


def open_file(path):
    """Open a regular file for reading, as bytes; never waits, as a FIFO would make it. Raises RecordError."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise RecordError(f"{path}: wanted a file, got {kind_of_file(mode)}")
        return open(path, "rb")
    except FileNotFoundError:
        if os.path.islink(path):  # to a disk that is not mounted, for one
            raise Unreadable(f"{path}: is a link to {os.readlink(path)}, which is not there") from None
        raise Missing(f"{path}: is not there") from None
    except OSError as e:
        raise Unreadable(f"{path}: cannot be read ({e.strerror or e})") from None
    except (ValueError, TypeError) as e:
        if isinstance(e, RecordError):
            raise
        raise RecordError(f"{path!a}: is no file's name ({e})") from None


def read_bytes(path, limit=FILE_LIMIT):
    """All of a file of at most `limit` bytes."""
    with open_file(path) as f:
        try:
            if (size := os.fstat(f.fileno()).st_size) > limit:
                raise RecordError(f"{path}: too large: wanted at most {limit} bytes, got {size}")
            return f.read(limit)
        except OSError as e:
            raise Unreadable(f"{path}: cannot be read ({e.strerror or e})") from None


def read_json(path, kind=anything, limit=FILE_LIMIT, nan=False):
    """The value in a JSON file, if it is of this kind. Raises RecordError, be it Missing or Unreadable."""
    return parse(read_bytes(path, limit), kind, path, nan)


def raw_lines(path, limit=LINE_LIMIT):
    """Yield (number, bytes) of each line of a file, its end included; none may have more than `limit` bytes."""
    with open_file(path) as f:
        number = 0
        while True:
            try:
                line = f.readline(limit + 1)
            except OSError as e:
                raise Unreadable(f"{path}: cannot be read ({e.strerror or e})") from None
            number += 1
            if len(line) > limit:
                raise RecordError(f"{path}:{number}: too large: wanted at most {limit} bytes in a line")
            if not line:
                return
            yield number, line


def read_lines(path, kind=anything, limit=LINE_LIMIT, going_on=False):
    """Yield the value of each line of a .jsonl file that is not blank. Raises as read_json, with the line.

    going_on: somebody may be writing the file: a last line without its end is left out."""
    for number, line in raw_lines(path, limit):
        if line.strip() and not (going_on and not line.endswith(b"\n")):
            yield parse(line, kind, f"{path}:{number}")


def names_in(folder):
    """Sorted names of what is in a folder. Raises Missing, Unreadable; a file is not a folder: RecordError."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        if os.path.islink(folder):
            raise Unreadable(f"{folder}: is a link to {os.readlink(folder)}, which is not there") from None
        raise Missing(f"{folder}: is not there") from None
    except NotADirectoryError:
        raise RecordError(f"{folder}: wanted a folder, got a file") from None
    except OSError as e:
        raise Unreadable(f"{folder}: cannot be read ({e.strerror or e})") from None
    except ValueError as e:
        raise RecordError(f"{folder!a}: is no folder's name ({e})") from None


# -- a line of metrics.jsonl ------------------------------------------------------------------------------------------

MAYBE = null_or(number())  # train.py writes null for what is not finite
METRIC = {  # of a step, with a loss, or of an evaluation, with a val_loss
    "step": integer(0),
    **dict.fromkeys(("loss?", "lr?", "grad_norm?", "expert_load?", "val_loss?", "bits_per_byte?"), MAYBE),
    **dict.fromkeys(("step_ms?", "peak_MB?", "params?", "skipped?"), null_or(number(0))),
    **{f"{kind}_{way}_{m}?": [MAYBE] for kind in ("single", "composite") for way in ("fwd", "bwd")
       for m in ("max", "min")},
}  # fmt: skip

# -- gpu.json, of tools/gpu_hour.py -----------------------------------------------------------------------------------

GPU_STAGE = {
    "status": one_of("done", "failed", "skipped"), "seconds": number(0), "error": null_or(string()),
    "records": [each(any_of(number(), null_or(string()), boolean))],
}  # fmt: skip
GPU_REPORT = {"made_by": one_of("mhc"), "what": one_of("gpu"), "stages": each(GPU_STAGE)}
