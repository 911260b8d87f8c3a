"""records.py: whatever stands in a file, reading it gives a value of the kind that was asked for, or one line."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import records
from records import Missing, RecordError, Unreadable, any_of, anything, boolean, each, integer, null_or, number, string

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
KIND = {
    "step": integer(0), "loss?": null_or(number()), "name": string(1), "data": each({"sha": records.sha256}),
    "pairs": [(string(), integer(0, 9))], "best": boolean, "label": any_of(integer(0), string()),
    "file": records.file_name, "impl": records.one_of("a", 1),
}  # fmt: skip
GOOD = {
    "step": 3, "loss": None, "name": "x", "data": {"train": {"sha": "0" * 64}}, "pairs": [["a", 1], ["b", 2]],
    "best": True, "label": "3", "file": "a.bin", "impl": 1, "of a later version": [1],
}  # fmt: skip


def refused(value, kind=KIND, where="here"):
    with pytest.raises(RecordError) as e:
        records.check(value, kind, where)
    assert "\n" not in str(e.value) and str(e.value).startswith(f"{where}: ") and len(str(e.value)) < 400
    return str(e.value)


def test_what_is_of_its_kind_comes_back_as_it_is():
    assert records.check(GOOD, KIND, "here") is GOOD
    assert records.check(GOOD | {"loss": 1.5, "label": 0}, KIND, "here")
    without = {k: v for k, v in GOOD.items() if k != "loss"}
    assert records.check(without, KIND, "here") is without


@pytest.mark.parametrize(
    "field, value, named",
    [
        ("step", -1, "step: wanted a whole number from 0, got -1"), ("step", True, "got True"), ("step", 3.0, "3.0"),
        ("step", 2**63, "step"), ("loss", "1", "loss: wanted a number, got '1'"), ("loss", False, "loss"),
        ("loss", float("nan"), "loss"), ("loss", 10**400, "loss"), ("name", "", "name: wanted a string with text"),
        ("name", "\ud800", "name"), ("name", None, "name"), ("data", [], "data: wanted an object, got []"),
        ("data", {"val": {"sha": "0" * 63}}, "data.'val'.sha: wanted 64 hex digits"), ("data", {"a\nb": 1}, "'a\\nb'"),
        ("pairs", {}, "pairs: wanted a list, got {}"), ("pairs", [["a", 1], ["b"]], "pairs[1]: wanted a list of 2"),
        ("pairs", [["a", 10]], "pairs[0][1]: wanted a whole number from 0 to 9"), ("best", 1, "best"),
        ("best", "true", "best: wanted true or false"), ("label", 1.5, "label"), ("file", "../x", "file"),
        ("file", "/x", "file"), ("file", "", "file"), ("file", "a\0", "file"), ("impl", True, 'impl: wanted "a" or 1'),
    ],
)  # fmt: skip
def test_one_line_names_the_field_and_what_is_wanted(field, value, named):
    assert named in refused(GOOD | {field: value})


def test_a_missing_field_is_named():
    assert "no 'step'" in refused({})
    assert "data.'train': no 'sha'" in refused(GOOD | {"data": {"train": {}}})


@pytest.mark.parametrize(
    "data, named",
    [
        (b"", "not JSON"), (b"{", "not JSON"), (b"\xff\xfe{}", "not UTF-8 (byte 0)"), (b"[NaN]", "NaN is not JSON"),
        (b"-Infinity", "not JSON"), (b"1e999", "too large a number"), (b"1" * 5000, "not JSON"),
        (b"[" * 100_000, "nested too deeply"), (b'{"a":' * 100_000, "nested too deeply"), (b"{} {}", "not JSON"),
    ],
)  # fmt: skip
def test_what_is_no_json_is_one_line(data, named):
    with pytest.raises(RecordError, match="here: ") as e:
        records.parse(data, anything, "here")
    assert named in str(e.value) and "\n" not in str(e.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(json_values, st.sampled_from(list(KIND)))
def test_any_value_in_any_field_is_taken_or_refused_in_one_line(value, field):
    name = field.removesuffix("?")
    try:
        assert records.check(GOOD | {name: value}, KIND, "here")[name] is value
    except RecordError as e:
        assert str(e).startswith(f"here: {name}") and "\n" not in str(e)


@FUZZ
@given(st.binary(max_size=60) | json_values.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_a_value_or_one_line(data):
    try:
        value = records.parse(data, anything, "here")
    except RecordError as e:
        assert str(e).startswith("here: ") and "\n" not in str(e)
    else:
        assert json.loads(json.dumps(value, allow_nan=False)) == value


@FUZZ
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=3))
def test_one_damaged_place_in_a_good_file(at, new):
    good = json.dumps(GOOD).encode()
    damaged = good[: at % len(good)] + new + good[at % len(good) + len(new) :]
    try:
        records.parse(damaged, KIND, "here")
    except RecordError as e:
        assert str(e).startswith("here: ") and "\n" not in str(e)


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_that_are_none(tmp_path):
    """A folder, a FIFO (which would wait for ever), a device without an end, a link to nothing, a file as a folder."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    os.symlink("nowhere", tmp_path / "link")
    os.symlink("loop", tmp_path / "loop")
    (tmp_path / "file").write_text("{}")
    for path, error, named in (
        (tmp_path / "folder", RecordError, "wanted a file, got a folder"), (tmp_path / "fifo", RecordError, "a FIFO"),
        ("/dev/zero", RecordError, "a device"), (tmp_path / "link", Unreadable, "is a link to nowhere"),
        (tmp_path / "loop", Unreadable, "symbolic links"), (tmp_path / "file" / "x", Unreadable, "Not a directory"),
        (f"{tmp_path}/{'x' * 300}", Unreadable, "too long"), ("a\0b", RecordError, "is no file's name"),
    ):  # fmt: skip
        for read in (records.read_json, lambda path: list(records.read_lines(path))):
            with pytest.raises(error) as e:
                read(path)
            assert named in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(RecordError, match="wanted a folder, got a file"):
        records.names_in(tmp_path / "file")
    for read in (records.names_in, records.read_json):
        with pytest.raises(Missing):
            read(tmp_path / "nowhere")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "huge", "wb") as f:
        f.truncate(1 << 40)  # sparse
    with pytest.raises(RecordError, match="too large: wanted at most"):
        records.read_json(tmp_path / "huge")
    with pytest.raises(RecordError, match="huge:1: too large"):
        list(records.read_lines(tmp_path / "huge"))


def test_lines_are_numbered_and_a_torn_last_one_may_be_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"st')
    assert list(records.read_lines(path, {"step": integer()}, going_on=True)) == [{"step": 1}, {"step": 2}]
    with pytest.raises(RecordError, match=r"metrics.jsonl:4: not JSON"):
        list(records.read_lines(path, {"step": integer()}))
    path.write_text('{"step": 1}\n{"step": "x"}\n')
    with pytest.raises(RecordError, match=r"metrics.jsonl:2: step: wanted a whole number, got 'x'"):
        list(records.read_lines(path, {"step": integer()}))
