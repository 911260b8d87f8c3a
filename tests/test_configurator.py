"""Every kind of mistake in the settings, each beside a control that is right."""

import pytest

from configurator import above, at_least, between, configure, one_of, some

RULES = {
    "n_layer": at_least(1), "n_streams": at_least(1), "residual": one_of("baseline", "hc", "mhc"), "lr": above(0),
    "beta1": between(0, 1), "name": some("a name"),
}  # fmt: skip
ELSEWHERE = {"learning_rate": "lr", "dropout": "there is none", "total": "max_steps, in steps"}


def check(settings):
    if settings["n_layer"] * settings["n_streams"] > 100:
        raise ValueError(f"n_streams={settings['n_streams']}: wanted fewer")
    if settings["max_steps"] == 13:
        raise ValueError("thirteen steps")


def run(*argv, **more):
    settings = dict(n_layer=12, n_streams=4, residual="mhc", lr=1e-3, beta1=0.9, compile=False, max_steps=100, name="a")
    script_globals = settings | more | {"_private": 1, "CONSTANT": 7, "a_list": [], "configure": configure}
    script_globals["__file__"] = __file__
    config = configure(script_globals, RULES, [str(a) for a in argv], ELSEWHERE, check)
    assert all(script_globals[k] == v for k, v in config.items())  # the script's globals follow
    return config


def error(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        run(*argv)
    captured = capsys.readouterr()
    assert e.value.code == 2 and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


@pytest.mark.parametrize(
    "flag,name,value",
    [
        ("--n_layer=3", "n_layer", 3), ("--lr=1", "lr", 1.0), ("--max_steps=1e5", "max_steps", 100000),
        ("--compile=TRUE", "compile", True), ("--compile=false", "compile", False), ("--name=1e5", "name", "1e5"),
        ("--name=a=b", "name", "a=b"), ("--residual=hc", "residual", "hc"),
        ("--max_steps=12345678901234567890", "max_steps", 12345678901234567890), ("--lr=3e-4", "lr", 3e-4),
        ("--max_steps=-5", "max_steps", -5),
    ],
)  # fmt: skip
def test_flags_take_the_type_of_the_default(flag, name, value):
    config = run(flag)
    assert config[name] == value and type(config[name]) is type(value)


@pytest.mark.parametrize(
    "flag,words",
    [
        ("--n_layr=3", "unknown setting 'n_layr'; did you mean n_layer?"), ("--zzz=1", "see --help"),
        ("--n_layer=three", "a whole number"), ("--n_layer=3.5", "a whole number"), ("--n_layer=True", "whole number"),
        ("--lr=fast", "a finite number"), ("--lr=nan", "a finite number"), ("--lr=inf", "a finite number"),
        ("--compile=yes", "True or False"), ("--compile=1", "True or False"), ("--n_layer", "a value is missing"),
        ("--n_layer=", "a whole number"), ("--n_layer=-3", "a number of at least 1"), ("--n_streams=0", "at least 1"),
        ("--residual=mch", "one of 'baseline', 'hc', 'mhc'"), ("--lr=0", "above 0"), ("--beta1=2", "from 0 to 1"),
        ("n_layer=3", "--name=value"), ("-n_layer=3", "--name=value"), ("--=3", "a value is missing"),
        ("--n_layer=" + "9" * 5000, "a whole number"), ("--n_layer=10000000001", "at most 1e+09"),
        ("--learning_rate=1", "unknown setting 'learning_rate'; here it is lr"), ("--name=", "name='': wanted a name"),
        ("--dropout=0", "unknown setting 'dropout'; there is none"), ("--total=1", "here it is max_steps, in steps"),
        ("--_private=3", "unknown setting"), ("--CONSTANT=3", "unknown setting"), ("--a_list=3", "unknown setting"),
    ],
)  # fmt: skip
def test_mistakes_in_flags_are_one_line(capsys, flag, words):
    assert words in error(capsys, flag)


@pytest.mark.parametrize(
    "text,words",
    [
        ("n_layr = 3", "unknown setting 'n_layr'; did you mean n_layer?"), ("n_layer = 'x'", "a whole number"),
        ("n_layer = 3.0\nlr = 'x'", "a finite number"), ("n_layer = = 3", "syntax error"),
        ("n_layer =", "syntax error"),
        ("lr = 1 / 0", "ZeroDivisionError"), ("lr = float('nan')", "a finite number"), ("residual = 'x'", "one of"),
        ("compile = 1", "True or False"), ("lr = None", "a finite number"), ("name = 3", "a string"),
        ("import nowhere_to_be_found", "ModuleNotFoundError"), ("n_layer = True", "a whole number"),
        ("lr = max", "lr=<built-in function max>: wanted a finite number"), ("import json as lr", "lr=<module 'js"),
        ("class name:\n    pass", ".name'>: wanted a string"), ("n_streams = 50", "n_streams=50: wanted fewer"),
        ("quit()", "ends the program (exit code None)"), ("import sys\nsys.exit(0)", "ends the program (exit code 0)"),
        ("raise SystemExit", "ends the program"), ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("lr = [0] * 10**6", "a finite number"), ("\0", "null byte"),
    ],
)  # fmt: skip
def test_mistakes_in_files_are_one_line_that_names_the_file(capsys, tmp_path, text, words):
    path = tmp_path / "x.py"
    path.write_text(text + "\n")
    message = error(capsys, path)
    assert words in message and str(path) in message


def test_what_no_single_rule_sees_names_the_source_too(capsys):
    assert error(capsys, "--n_streams=50") == "error: command line: n_streams=50: wanted fewer\n"
    assert error(capsys, "--n_layer=50") == "error: default: n_streams=4: wanted fewer\n"
    assert error(capsys, "--max_steps=13") == "error: thirteen steps\n"


def test_a_missing_file(capsys, tmp_path):
    assert "nothing.py: cannot be read" in error(capsys, tmp_path / "nothing.py")
    assert "wanted a config file ending in .py" in error(capsys, "config")


def test_flags_beat_files_wherever_they_stand_and_files_compose(tmp_path, capsys):
    (tmp_path / "a.py").write_text("import math\n_half = 3\nn_layer = 2 * _half\nlr = 1\n")
    (tmp_path / "b.py").write_text("lr = 2e-3\nname = 'b'\nmax_steps = 1e5\n\ndef helper():\n    pass\n")
    config = run("--n_layer=8", tmp_path / "a.py", tmp_path / "b.py")
    assert (config["n_layer"], config["lr"], config["name"], config["max_steps"]) == (8, 2e-3, "b", 100000)
    printed = capsys.readouterr().out
    assert "n_layer = 8  (command line)" in printed and f"lr = 0.002  ({tmp_path / 'b.py'})" in printed
    assert "n_streams" not in printed  # only what changed


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as e:
        run("--help")
    printed = capsys.readouterr().out
    assert e.value.code == 0 and "--n_layer=12" in printed and "--residual='mhc'" in printed
    assert "_private" not in printed
