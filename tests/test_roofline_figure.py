"""figures.py --figure=roofline: what it draws of a gpu.json, and what it refuses."""

import json
import sys

import pytest

import figures


def boundary(what, way, tokens, GB_s, intensity):
    return {"what": what, "way": way, "tokens": tokens, "ms": 0.1, "GB_s": GB_s, "TFLOP_s": GB_s * intensity / 1e3}


TIMED = [
    boundary(what, way, tokens, tokens / 10, intensity)
    for what, intensity in (("mHC", 9.0), ("HC", 9.0), ("Liger", 7.0))
    for way in ("forward", "forward + backward")
    for tokens in (4096, 16384)
]
REPORT = {
    "versions": [{"card": "A $card$"}],
    "ceilings": [{"what": "copy", "GB_s": 2600.0}, *({"what": "GEMM", "TFLOP_s": v} for v in (500.0, 650.0))],
    "kernels": [{"what": "Liger", "note": "not timed"}, *TIMED, {"what": "HC", "error": "no"}],
}


def gpu_json(folder, stages):
    done = {"status": "done", "seconds": 1.0, "error": None}
    stages = {name: done | {"records": records} for name, records in stages.items()}
    (folder / "gpu.json").write_text(json.dumps({"made_by": "mhc", "what": "gpu", "stages": stages}))
    return str(folder / "gpu.json")


def test_points_lie_where_their_numbers_say_and_under_the_measured_roof(tmp_path):
    roof, share = figures.draw_roofline(gpu_json(tmp_path, REPORT)).axes
    line, *points = roof.lines
    ridge = 650e12 / 2600e9
    assert list(line.get_xdata()) == pytest.approx([1, ridge, 10 * ridge])
    assert list(line.get_ydata()) == pytest.approx([2.6, 650, 650])
    drawn = {p.get_label(): (list(p.get_xdata()), list(p.get_ydata())) for p in points}
    assert len(drawn) == 6 and drawn["mHC, forward"][0] == pytest.approx([9, 9])
    assert drawn["Liger, forward + backward"][1] == pytest.approx([409.6 * 7 / 1e3, 1638.4 * 7 / 1e3])
    shares = {p.get_label(): (list(p.get_xdata()), list(p.get_ydata())) for p in share.lines}
    assert shares["HC, forward"] == ([4096, 16384], pytest.approx([409.6 / 2600, 1638.4 / 2600]))
    assert len({p.get_color() for p in points}) == 3


def main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["figures.py", *args])
    for name in ("figure", "out", "smooth"):
        monkeypatch.setattr(figures, name, getattr(figures, name))  # put back afterwards
    figures.main()


def test_the_picture_is_written_and_is_known_for_ours(tmp_path, monkeypatch, capsys):
    path = gpu_json(tmp_path, REPORT)
    for _ in range(2):  # the second replaces the first
        main(monkeypatch, path, "--figure=roofline", f"--out={tmp_path}/roofline.png")
    assert figures.is_ours(f"{tmp_path}/roofline.png") and "a copy 2600 GB/s" in capsys.readouterr().out


@pytest.mark.parametrize("change, message", [
    ({"ceilings": []}, "numbers of the stages ceilings and kernels"),
    ({"kernels": [{"what": "mHC", "error": "no"}]}, "numbers of the stages ceilings and kernels"),
    ({"ceilings": [{"what": "copy", "GB_s": "fast"}]}, "numbers of the stages ceilings and kernels"),
])  # fmt: skip
def test_a_report_without_numbers_is_refused(tmp_path, monkeypatch, capsys, change, message):
    with pytest.raises(SystemExit) as e:
        main(monkeypatch, gpu_json(tmp_path, REPORT | change), "--figure=roofline", f"--out={tmp_path}/x.png")
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_what_is_no_gpu_json_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "gpu.json").write_text("{}")
    for args in ([str(tmp_path / "gpu.json")], ["a.json", "b.json"], [str(tmp_path)]):
        with pytest.raises(SystemExit) as e:
            main(monkeypatch, *args, "--figure=roofline", f"--out={tmp_path}/x.png")
        said = capsys.readouterr().err
        assert e.value.code == 2 and "gpu.json" in said and said.count("\n") == 1
