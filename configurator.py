"""Settings: bare globals at the top of a script, Python files that override them, and --key=value flags that beat both.

    from configurator import at_least, configure, one_of
    n_layer = 12              # transformer blocks
    residual = "mhc"          # how sublayers are joined
    config = configure(globals(), {"n_layer": at_least(1), "residual": one_of("baseline", "hc", "mhc")})

    python train.py config/mhc_27b.py config/my_changes.py --residual=hc --lr=1e-4

The default of a setting fixes its type: an int is taken where a float is wanted, 1e5 where an int is, true/false in any
case for a bool, strings verbatim. Files compose from left to right; flags win wherever they stand. Anything else is one
line on stderr and exit code 2. Names with a leading underscore and CONSTANTS are not settings.

Every rule about a number has an upper bound too: a slip of the finger must not look like a program that hangs.
"""

import difflib
import math
import re
import reprlib
import runpy
import sys

import program

TYPES = (bool, int, float, str)


def at_least(low, high=10**9):
    """Rule: a number not below `low`."""
    return lambda v: low <= v <= high, f"a number of at least {low} and at most {high:g}"


def above(low, high=10**9):
    """Rule: a number greater than `low`."""
    return lambda v: low < v <= high, f"a number above {low} and at most {high:g}"


def between(low, high):
    """Rule: a number from `low` to `high`, both included."""
    return lambda v: low <= v <= high, f"a number from {low} to {high}"


def some(what):
    """Rule: a string that is not empty; what: a folder, say."""
    return lambda v: v.strip() != "", f"{what}, got nothing"


def one_of(*values):
    """Rule: one of `values`."""
    return lambda v: v in values, "one of " + ", ".join(map(repr, values))


def fail(message):
    """End the program with one line on stderr and exit code 2: a mistake in the settings, nothing has been lost."""
    program.end(f"error: {message}", 2)


def coerce(name, value, default, source):
    """`value` (a string from a flag, anything from a file) as the type of `default`."""
    kind, text = type(default), str(value).strip()
    if kind is str and isinstance(value, (str, bool)):  # a choice like "auto" may stand beside True and False
        return str(value)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float) and not isinstance(value, bool):
        if kind is int and re.fullmatch(r"[+-]?\d{1,100}", text):  # not through float: large integers stay exact
            return int(text)
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if math.isfinite(number) and (kind is float or number.is_integer()):
            return kind(number)
    wanted = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a string"}[kind]
    fail(f"{source}: {name}={reprlib.repr(value)}: wanted {wanted}, like the default {default!r}")


def read_file(path, settings=()):
    """What a config file sets; run as a program of its own, never inside the caller. Functions and modules in it are
    its own business, unless they have the name of a setting."""
    try:
        names = runpy.run_path(path)
    except OSError as e:
        fail(f"{path}: cannot be read ({e.strerror or e})")
    except SyntaxError as e:
        fail(f"{e.filename or path}:{e.lineno or 0}: syntax error: {e.msg}")
    except SystemExit as e:
        fail(f"{path}: ends the program (exit code {e.code}): wanted settings, name = value")
    except Exception as e:  # whatever a user's file raises is a mistake in that file
        fail(f"{path}: {type(e).__name__}: {e}")
    helper = lambda v: callable(v) or type(v) is type(sys)  # noqa: E731
    return {k: v for k, v in names.items() if not k.startswith("_") and (k in settings or not helper(v))}


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


def unknown(name, settings, elsewhere):
    """What to say of a name that is no setting."""
    if name in elsewhere:
        known_as = elsewhere[name]
        return f"unknown setting {name!r}; " + (
            f"here it is {known_as}" if known_as.split(",")[0] in settings else known_as
        )
    near = difflib.get_close_matches(name, settings, 1)
    return f"unknown setting {name!r}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def configure(script_globals, rules=None, argv=None, elsewhere=None, check=None):
    """Apply files and flags to a script's globals and return all its settings as a dict.

    script_globals: the caller's globals(); every bool, int, float or str in it so far is a setting, but for names that
    begin with an underscore or are all capitals, which are constants.
    rules: {name: (test, words)}; a value for which test(value) is false ends the program, saying `words` is wanted.
    Rules and check are asked after the files have run, which may have added to what they look at.
    argv: the arguments, sys.argv[1:] by default. Prints only what changed, each with its source.
    elsewhere: {name that other programs have: its name here, or a few words}, for whoever types it.
    check(settings): called once the globals are set, for what no rule about one setting can see. A ValueError from it
    ends the program like a rule; if it begins with `name=`, it is told with the source of that setting.
    """
    settings = {k: v for k, v in script_globals.items() if not k.startswith("_") and not k.isupper()}
    defaults = {k: v for k, v in settings.items() if type(v) in TYPES}
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print_help(defaults, script_globals.get("__file__") or "")
        raise SystemExit(0)
    files = [a for a in argv if not a.startswith("-") and a.endswith(".py")]
    given = [(name, value, path) for path in files for name, value in read_file(path, defaults).items()]
    given += [(*read_flag(a), "command line") for a in argv if a not in files]
    changed = {}
    for name, value, source in given:
        if name not in defaults:
            fail(f"{source}: {unknown(name, defaults, elsewhere or {})}")
        changed[name] = coerce(name, value, defaults[name], source), source
    config = defaults | {name: value for name, (value, _) in changed.items()}
    source_of = lambda name: changed.get(name, (0, "default"))[1]  # noqa: E731
    for name, (test, wanted) in (rules or {}).items():
        if not test(config[name]):
            fail(f"{source_of(name)}: {name}={reprlib.repr(config[name])}: wanted {wanted}")
    script_globals.update(config)
    try:
        if check:
            check(config)
    except ValueError as e:
        name = re.match(r"(\w*)=", str(e))
        fail((f"{source_of(name[1])}: " if name and name[1] in config else "") + str(e))
    for name, (value, source) in changed.items():
        print(f"{name} = {value!r}  ({source})")
    return config
