"""Settings: bare globals at the top of a script, Python files that override them, and --key=value flags that beat both.

    from configurator import at_least, configure, one_of
    n_layer = 12              # transformer blocks
    residual = "mhc"          # how sublayers are joined
    config = configure(globals(), {"n_layer": at_least(1), "residual": one_of("baseline", "hc", "mhc")})

    python train.py config/mhc_27b.py config/my_changes.py --residual=hc --lr=1e-4

The default of a setting fixes its type: an int is taken where a float is wanted, 1e5 where an int is, true/false in any
case for a bool, strings verbatim. Files compose from left to right; flags win wherever they stand. Anything else is one
line on stderr and exit code 2. Names with a leading underscore and CONSTANTS are not settings.
"""

import difflib
import math
import re
import runpy
import sys

TYPES = (bool, int, float, str)


def at_least(low):
    """Rule: a number not below `low`."""
    return lambda v: v >= low, f"a number of at least {low}"


def above(low):
    """Rule: a number greater than `low`."""
    return lambda v: v > low, f"a number above {low}"


def between(low, high):
    """Rule: a number from `low` to `high`, both included."""
    return lambda v: low <= v <= high, f"a number from {low} to {high}"


def one_of(*values):
    """Rule: one of `values`."""
    return lambda v: v in values, "one of " + ", ".join(map(repr, values))


def key_of(table):
    """Rule: a key of `table`, to which a config file may add."""
    return table.__contains__, lambda: "one of " + ", ".join(map(repr, table))


def fail(message):
    """End the program with one line on stderr and exit code 2: a mistake in the settings, nothing has been lost."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def coerce(name, value, default, source):
    """`value` (a string from a flag, anything from a file) as the type of `default`."""
    kind, text = type(default), str(value).strip()
    if kind is str and isinstance(value, str):
        return value
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float) and not isinstance(value, bool):
        if kind is int and re.fullmatch(r"[+-]?\d+", text):  # not through float: large integers stay exact
            return int(text)
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if math.isfinite(number) and (kind is float or number.is_integer()):
            return kind(number)
    wanted = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a string"}[kind]
    fail(f"{source}: {name}={value!r}: wanted {wanted}, like the default {default!r}")


def read_file(path):
    """The names a config file sets; run as a program of its own, never inside the caller."""
    try:
        names = runpy.run_path(path)
    except OSError as e:
        fail(f"{path}: cannot be read ({e.strerror or e})")
    except SyntaxError as e:
        fail(f"{e.filename}:{e.lineno}: syntax error: {e.msg}")
    except Exception as e:  # whatever a user's file raises is a mistake in that file
        fail(f"{path}: {type(e).__name__}: {e}")
    return {k: v for k, v in names.items() if not k.startswith("_") and not callable(v) and type(v) is not type(sys)}


def read_flag(arg):
    """'--key=value' -> ('key', 'value')."""
    name, equals, value = arg[2:].partition("=")
    if not arg.startswith("--"):
        fail(f"{arg!r}: wanted a config file ending in .py, or --name=value")
    if not equals or not name:
        fail(f"{arg}: a value is missing: write --{name or 'name'}=value")
    return name, value


def print_help(settings, script):
    """Every setting with its default and the comment that stands behind it in the script."""
    try:
        lines = open(script).read().splitlines()
    except OSError:  # an interactive session has no script to quote
        lines = []
    comments = dict(m.groups() for line in lines if (m := re.match(r"(\w+) = .*?  # (.*)", line)))
    for name, value in settings.items():
        print(f"  --{name}={value!r:<24} {comments.get(name, '')}")


def configure(script_globals, rules=None, argv=None):
    """Apply files and flags to a script's globals and return all its settings as a dict.

    script_globals: the caller's globals(); every bool, int, float or str in it so far is a setting, but for names that
    begin with an underscore or are all capitals, which are constants.
    rules: {name: (test, words)}; a value for which test(value) is false ends the program, saying `words` is wanted.
    The rules are asked after the files have run.
    argv: the arguments, sys.argv[1:] by default. Prints only what changed, each with its source.
    """
    settings = {k: v for k, v in script_globals.items() if not k.startswith("_") and not k.isupper()}
    defaults = {k: v for k, v in settings.items() if type(v) in TYPES}
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print_help(defaults, script_globals.get("__file__") or "")
        raise SystemExit(0)
    files = [a for a in argv if not a.startswith("-") and a.endswith(".py")]
    given = [(name, value, path) for path in files for name, value in read_file(path).items()]
    given += [(*read_flag(a), "command line") for a in argv if a not in files]
    changed = {}
    for name, value, source in given:
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, 1)
            fail(f"{source}: unknown setting {name!r}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        changed[name] = coerce(name, value, defaults[name], source), source
    config = defaults | {name: value for name, (value, _) in changed.items()}
    for name, (test, wanted) in (rules or {}).items():
        if not test(config[name]):
            wanted = wanted() if callable(wanted) else wanted
            fail(f"{changed.get(name, (0, 'default'))[1]}: {name}={config[name]!r}: wanted {wanted}")
    for name, (value, source) in changed.items():
        print(f"{name} = {value!r}  ({source})")
    script_globals.update(config)
    return config
