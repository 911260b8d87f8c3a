"""experiments.py: a grid of two tiny cells, run, interrupted, and gone on with."""

import os
import shutil
import sys

import pytest

import experiments
import owned
from experiments import ASKED
from model import GPTConfig
from tests.test_resume import TINY, prepare
from tools import bench, roofline


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A config file of a tiny model on a tiny corpus."""
    root = tmp_path_factory.mktemp("experiments")
    data = prepare(root)
    lines = [f"{k} = {v!r}" for k, v in (flag[2:].split("=") for flag in TINY) if k not in ("device", "impl")]
    config = root / "tiny.py"
    config.write_text(
        "\n".join(line.replace("'", "") for line in lines) + f"\ndevice = 'cpu'\ndata_dir = {str(data)!r}\n"
    )
    return root


@pytest.fixture
def table(tiny, monkeypatch):
    """Two cells; results and run folders in a temporary place."""
    cells = lambda: experiments.grid(residual=["baseline", "mhc"], seed=2)  # noqa: E731
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"tiny": experiments.Experiment("?", cells, str(tiny / "tiny.py"))})
    monkeypatch.setattr(experiments, "runs", str(tiny / "out"))
    monkeypatch.setattr(experiments, "results", str(tiny / "results"))
    monkeypatch.setattr(experiments, "quick", True)
    monkeypatch.setattr(experiments, "only", "")
    experiments.stopping.clear()
    return tiny / "out" / "quick" / "tiny.csv"


def test_a_grid_is_run_once_and_a_lost_row_alone_is_redone(table, monkeypatch):
    monkeypatch.setattr(experiments, "jobs", 2)
    assert experiments.run("tiny") == 0
    rows = experiments.read_rows(table)
    assert list(rows) == ["residual=baseline,seed=2", "residual=mhc,seed=2"]
    mhc, baseline = rows["residual=mhc,seed=2"], rows["residual=baseline,seed=2"]
    assert (mhc["residual"], mhc["seed"], mhc["steps"], mhc["tokens"], mhc["finite"]) == (
        "mhc",
        "2",
        "10",
        "640",
        "True",
    )
    assert 0 < float(mhc["val_loss"]) < 6 and float(mhc["seconds"]) > 0 and float(mhc["gain_fwd_max"]) < 1.01
    assert [len(mhc[k].split()) for k in ("loss_curve", "val_curve", "fwd_max", "composite")] == [10, 2, 4, 16]
    assert baseline["gain_fwd_max"] == "" and mhc["torch"] and mhc["commit"]
    assert not any(os.scandir(table.parent / "tiny"))  # run folders are ours, and gone

    whole = table.read_bytes()
    table.write_bytes(whole[:-20])  # the last line half written
    monkeypatch.setattr(experiments, "run_cell", lambda config, cell, folder: ran.append(cell) or rows[name_of(cell)])
    ran, name_of = [], experiments.name_of
    assert experiments.run("tiny") == 0
    assert len(ran) == 1 and table.read_bytes() == whole


def test_a_run_that_broke_before_it_was_evaluated_has_no_loss_and_no_bound_on_its_gain(table, monkeypatch):
    cell, folder = {"residual": "mhc", "seed": 2}, str(table.parent / "broken")
    whole = experiments.run_cell(experiments.EXPERIMENTS["tiny"].config, cell, folder)
    assert whole["finite"] and whole["val_loss"] and float(whole["gain_peak"]) < 1.1
    steps, evals = experiments.records_of(folder)
    steps[-1]["skipped"] = 10
    monkeypatch.setattr(experiments, "records_of", lambda folder: (steps, evals[:1]))
    row = experiments.measure(cell, folder)
    assert (row["steps"], row["finite"], row["val_loss"], row["gain_peak"]) == (10, False, "", "inf")


def test_a_folder_of_someone_elses_and_a_run_that_fails_are_named_and_nothing_is_removed(table, capsys):
    table.unlink(missing_ok=True)
    folder = table.parent / "tiny" / "residual=baseline,seed=2"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.txt").write_text("keep me")
    cells = experiments.grid(residual="baseline", seed=2) + [dict(n_head=2, n_embd=-1)]
    experiments.EXPERIMENTS["tiny"] = experiments.EXPERIMENTS["tiny"]._replace(cells=lambda: cells)
    assert experiments.run("tiny") == 2
    out = capsys.readouterr().out
    assert "was not made by experiments.py; move it away" in out and (folder / "mine.txt").exists()
    assert "n_head=2,n_embd=-1: train.py ended with 2: error: " in out and "mend it and run this again" in out
    shutil.rmtree(folder)


def test_a_cell_that_is_stopped_has_no_row_and_has_not_failed(table):
    table.unlink(missing_ok=True)
    cell = {"residual": "baseline", "seed": 2}
    experiments.stopping.set()  # before train.py listens: the signal ends it
    assert experiments.run_cell(experiments.EXPERIMENTS["tiny"].config, cell, str(table.parent / "stopped")) is None
    assert experiments.run("tiny") == 0 and not table.exists()


def test_cells_whose_settings_do_not_exist_yet_are_left_out_and_named(table, capsys):
    cells = [dict(seed=1), dict(seed=1, warp=9), dict(residual="resnet")]
    experiments.EXPERIMENTS["tiny"] = experiments.Experiment("?", lambda: cells)
    assert list(experiments.cells_of("tiny")) == ["seed=1"]
    assert "warp=9" in (out := capsys.readouterr().out) and "residual='resnet'" in out


def test_every_experiment_of_the_table_has_cells_with_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "results", str(tmp_path))
    losses = {experiments.name_of(c): 5 - i / 1000 for i, c in enumerate(experiments.tune())}
    experiments.write_rows(str(tmp_path / "tune.csv"), {n: {"cell": n, "val_loss": v} for n, v in losses.items()})
    for name, experiment in experiments.EXPERIMENTS.items():
        names = [experiments.name_of(cell) for cell in experiment.cells()]
        assert experiment.question.endswith("?") and os.path.exists(experiment.config), name
        assert len(names) == len(set(names)) > 0, name
        for cell in experiments.cells_of(name).values():  # each is a model that can be
            GPTConfig(**{k: v for k, v in cell.items() if k in GPTConfig.__dataclass_fields__})
    best = [c for c in experiments.sizes() if c["n_layer"] == 8 and c["residual"] == "hc"]
    assert {(c["lr"], c["maps_lr_scale"]) for c in best} == {(12e-3, 100)}  # its last, in this pretence
    assert 1337 not in {c["seed"] for c in best} and len(best) == 5
    assert len(experiments.sizes()) == 5 * len(experiments.SIZES) * len(experiments.KINDS)


def test_an_unknown_experiment_and_a_second_process_end_in_one_line(table, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments.py", "tin"])
    with pytest.raises(SystemExit):
        experiments.main()
    assert "'tin': wanted one of tiny" in capsys.readouterr().err
    monkeypatch.setitem(experiments.EXPERIMENTS, "timed", experiments.EXPERIMENTS["tiny"]._replace(alone=True))
    monkeypatch.setattr(experiments, "jobs", 1)
    monkeypatch.setattr(sys, "argv", ["experiments.py", "timed", "--jobs=2"])
    with pytest.raises(SystemExit):
        experiments.main()
    assert "timed measures times, on a machine that does nothing else: wanted --jobs=1" in capsys.readouterr().err
    with experiments.hold("tiny"), pytest.raises(SystemExit):
        experiments.hold("tiny")
    assert "tiny is being run by another process" in capsys.readouterr().err


def test_a_cell_that_is_no_run_has_its_own_row(table, monkeypatch):
    cells = lambda: [{"sublayers": 8, "recompute": "mhc", "L_r": L_r} for L_r in (2, 4)]  # noqa: E731
    measured = experiments.Experiment("?", cells, row=experiments.measure_memory)
    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", measured)
    assert experiments.run("tiny") == 0
    rows = experiments.read_rows(table)
    kept = [float(row["saved"]) for row in rows.values()]
    assert kept[0] > kept[1] > 8 and [row["table_3"] for row in rows.values()] == ["28", "32"]  # 4 x 8/L_r + 6 L_r
    assert "val_loss" not in rows["sublayers=8,recompute=mhc,L_r=2"]


def test_a_row_of_overhead_has_the_median_of_paired_ratios_and_a_prediction_has_a_card(table, monkeypatch):
    timed = {"baseline": [1.0, 2.0, 1.0], "HC": [1.2, 2.4, 9.0], "mHC eager": [1.1, 2.2, 1.1]}
    monkeypatch.setattr(bench, "cpu_variants", lambda C: (timed, {}))
    monkeypatch.setattr(bench, "time_in_turn", lambda variants, rounds: dict(variants))
    for name in ("blocks", "tokens", "seq_len"):
        monkeypatch.setattr(bench, name, getattr(bench, name))  # put back afterwards
    part = lambda least, likely: {"x": roofline.Part(least=least, likely=likely)}  # noqa: E731
    monkeypatch.setattr(roofline, "by_form", lambda *a: (None, {"mHC": part(1.1, 2.1), "baseline": part(1, 2)}))
    measured, predicted = (experiments.measure_overhead("", cell, "") for cell in experiments.overhead()[3:6:2])
    assert (measured["width"], measured["blocks"], measured["HC"], measured["mHC eager"]) == (512, 4, 20, 10)
    assert (measured["baseline_ms"], measured["rounds"], bench.blocks, measured["HC ±"] > 100) == (1000, 2, 4, True)
    assert measured["threads"] >= 1 and predicted["config"] == "mhc_3b" and predicted["predicted"] == "H100"
    assert (predicted["mHC, at the peaks"], predicted["mHC"]) == (10, 5)


def test_one_baseline_is_continued_as_itself_and_with_more_streams_from_the_same_loss_and_then_removed(
    table, monkeypatch
):
    cells = lambda: experiments.grid(residual=["baseline", "mhc"], seed=2)  # noqa: E731
    upcycling = experiments.Experiment("?", cells, str(table.parents[2] / "tiny.py"), row=experiments.continue_baseline)
    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", upcycling)
    table.unlink(missing_ok=True)
    parent, ends = table.parent / "tiny" / "parent,seed=2", []
    remove = experiments.remove_parents

    def look_and_remove(place):
        ends.append(experiments.records_of(parent)[1][-1]["val_loss"])
        remove(place)

    monkeypatch.setattr(experiments, "remove_parents", look_and_remove)
    assert experiments.run("tiny") == 0
    rows = experiments.read_rows(table)
    curves = [list(map(float, row["val_curve"].split())) for row in rows.values()]
    assert [row["steps"] for row in rows.values()] == ["10", "10"] and rows["residual=mhc,seed=2"]["gain_peak"]
    assert [c[0] for c in curves] == [pytest.approx(ends[0], abs=6e-4)] * 2  # four digits of each
    assert curves[0][1] != curves[1][1] and max(c[1] for c in curves) < ends[0]
    assert not any("seed=2" in name for name in os.listdir(table.parent / "tiny"))  # neither runs nor starts


def test_a_model_is_trained_for_its_benchmarks_unless_it_was_kept(table, monkeypatch):
    asked, call = [], experiments.call

    def pretend(command, cell, folder):
        if command[0] != "eval.py":
            return call(command, cell, folder)
        asked.append(command[1])
        (place,) = (flag.partition("=")[2] for flag in command if flag.startswith("--out_dir="))
        owned.make(place, "results", lambda folder: False)
        records = [{"task": t, "n": 804, "random": {"acc": 0.5}, "metrics": {"acc": {"value": 0.625}}} for t in ASKED]
        owned.write_json(os.path.join(place, "results.json"), {"records": records})
        return "results: there"

    monkeypatch.setattr(experiments, "call", pretend)
    cells = lambda: experiments.grid(residual="baseline", seed=2)  # noqa: E731
    scored = experiments.Experiment("?", cells, str(table.parents[2] / "tiny.py"), row=experiments.score)
    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", scored)
    kept = str(table.parent / "sizes" / "residual=baseline,seed=2")
    for keep, trained in ((False, f"{table.parent}/tiny/residual=baseline,seed=2"), (True, kept)):
        table.unlink(missing_ok=True)
        if keep:
            assert experiments.run_cell(scored.config, *cells(), kept)["steps"] == 10
        assert experiments.run("tiny") == 0 and asked.pop() == trained
        (row,) = experiments.read_rows(table).values()
        assert (row["blimp"], row["piqa of"], row["hellaswag by chance"], row["seed"]) == ("62.5", "804", "50.0", "2")
        assert not any("seed=2" in name for name in os.listdir(table.parent / "tiny"))
    assert os.path.exists(os.path.join(kept, "metrics.jsonl"))
