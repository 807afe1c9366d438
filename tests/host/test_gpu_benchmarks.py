"""The GPU benchmarks rehearsed: every block runs dry, and the table of figures says what was not measured."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "benchmarks" / "gpu"


def load(name, folder=ROOT / "benchmarks"):
    """A module of benchmarks/, which are scripts and no package."""
    sys.path.append(str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


gpu_figures, report = load("gpu_figures"), load("report")
run_series = load("run_series", GPU / "engines")


def python(script, *words, **environment):
    return subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd="/",
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """All blocks, once."""
    work, results = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("results")
    done = python(GPU / "all.py", "--dry-run", "--work", work, "--results", results)
    records = [json.loads(path.read_text()) for path in (work / "dry").glob("*.json")]
    return done, {record["bench"]: record for record in records}, work, results


@pytest.mark.timeout(600)
def test_every_block_runs_dry_and_every_answer_is_right(rehearsal):
    done, records, _, _ = rehearsal
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert set(records) == {f"gpu_{name}" for name in block_names()}
    for record in records.values():
        assert record["answer_matches"] is True, record["notes"]
        for row in record["rows"]:
            assert not row.get("num_wrong")


def test_a_dry_runs_records_are_marked_and_never_among_the_results(rehearsal):
    _, records, _, results = rehearsal
    assert list(results.iterdir()) == []
    assert all(record["config"]["dry_run"] and record["machine"]["simulated"] for record in records.values())
    assert all("dry run" in record["notes"][0] for record in records.values())
    assert "not measured" in gpu_figures.table(list(records.values()))[2]
    assert gpu_figures.newest(list(records.values())) == {}


def test_what_a_dry_run_streams_really_streams(rehearsal):
    _, records, _, _ = rehearsal
    rows = {row["name"]: row for row in records["gpu_decode"]["rows"]}
    # What a share of so small a model buys, chunks that stay or larger slots, is the planner's choice.
    assert all(row["bytes_per_pass"]["h2d"] > 0 for row in rows.values())
    assert rows["host, 0% resident"]["resident_share"] < 0.1
    assert rows["disk"]["bytes_per_pass"]["disk"] > 0


def test_a_prediction_is_on_disk_for_every_run_of_zinfer(rehearsal):
    _, records, work, _ = rehearsal
    told = [json.loads(line) for line in (work / "predictions.jsonl").read_text().splitlines()]
    names = {each["name"] for each in told}
    assert {row["name"] for row in records["gpu_decode"]["rows"]} <= names
    assert all(each["forecast"]["pass_s"] > 0 and each["tiers"] for each in told)


def test_the_prediction_is_written_before_the_run(tmp_path, monkeypatch):
    seen = []

    class FarEnoughError(RuntimeError):
        pass

    def generate(self, *args, **options):
        seen.append((tmp_path / "predictions").read_text())
        raise FarEnoughError("stop")

    monkeypatch.setattr(run_series.LLM, "generate", generate)
    call = {"prompts": [[5, 6, 7]], "max_tokens": 2}
    entry = {"name": "first", "memory": {"host": "64MiB"}, "calls": [call]}
    task = {
        "model": str(ROOT / "zinfer" / "assets" / "demo"),
        "device": "cpu",
        "machine": "sim-default",
        "predictions": str(tmp_path / "predictions"),
        "runtime": {"threads": 1},
        "series": [entry, entry | {"name": "too little", "memory": {"host": "4KiB"}}],
    }
    found = run_series.run(task)
    assert json.loads(seen[0])["name"] == "first"
    assert found[0]["error"] == "FarEnoughError: stop"
    assert "BudgetError" in found[1]["error"], "one that fails does not keep the next from running"


def block_names():
    """Those that all.py rehearses; one that stands alone has a test of its own."""
    lines = [line.strip() for line in (GPU / "all.py").read_text().splitlines()]
    return [line.split('"')[1] for line in lines if line.startswith('Block("') and "stands_alone" not in line]


def test_every_block_is_a_script_with_a_limit_and_a_line_in_the_runbook():
    runbook = (GPU / "README.md").read_text()
    assert len(block_names()) == 9
    for name in (*block_names(), "kernels"):
        assert (GPU / f"{name}.py").exists()
        assert f"| `{name}` |" in runbook
    limits = [
        int(line.split(",")[1]) for line in (GPU / "all.py").read_text().splitlines() if '    Block("' in line
    ]
    assert max(limits) <= 480


def test_every_figure_is_one_that_its_block_writes():
    for figure in gpu_figures.FIGURES:
        text = (GPU / f"{figure.bench.removeprefix('gpu_')}.py").read_text()
        name = figure.name if not figure.name.startswith(("accelerate", "airllm")) else "_ratio"
        assert name in text, figure


def test_a_block_that_is_run_alone_finds_what_it_imports():
    """Whatever is imported first of these scripts must lead to setting.py, which says where the others are."""
    first = {}
    for path in GPU.glob("*.py"):
        names = [
            node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        ]
        own = [
            name
            for name in names
            if any((at / f"{name}.py").exists() for at in (GPU, GPU.parent, GPU / "engines"))
        ]
        first[path.stem] = own[0] if own else None
    for block in block_names():
        name = block
        while name != "setting":
            assert first[name] in first, (
                f"{name} imports {first[name]} before anything that knows where it is"
            )
            name = first[name]


def test_without_a_gpu_a_block_says_so_and_how_to_rehearse(tmp_path):
    done = python(GPU / "streamer.py", "--work", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "--dry-run" in done.stderr


def real(bench, right=True, written="2030-01-01T00:00:00", **median):
    return {
        "bench": bench,
        "written": written,
        "config": {"dry_run": False},
        "machine": {"simulated": False, "name": "16c128g", "devices": [{"name": "a card"}]},
        "answer_matches": right,
        "median": median,
    }


def line(records, what):
    return next(line for line in gpu_figures.table(records) if what in line)


class TestTable:
    def test_says_not_measured_where_nothing_is(self):
        assert all("not measured" in line for line in gpu_figures.table([])[2:])
        assert len(gpu_figures.table([])) == 2 + len(gpu_figures.FIGURES)

    def test_shows_what_was_measured_and_whether_it_is_enough(self):
        found = line([real("gpu_decode", host_link_share=0.961)], "measured link")
        assert "≥ 95.0%" in found and "96.1% |" in found and "a card, 2030-01-01" in found
        assert "94.0% (missed)" in line([real("gpu_decode", host_link_share=0.94)], "measured link")
        assert "0.9% |" in line([real("gpu_decode", prediction_error=0.009)], "largest error")
        assert "11.0% (missed)" in line([real("gpu_decode", prediction_error=0.11)], "largest error")
        assert "6.10 x |" in line([real("gpu_peers", accelerate_ratio=6.1)], "Accelerate")

    def test_takes_the_newest_and_no_wrong_answer(self):
        old, new = real("gpu_int4", share_of_byte_ratio=0.5), real("gpu_int4", written="2031-01-01T00:00:00")
        assert "not measured" in line([new, old], "int4")
        wrong = real("gpu_int4", right=False, share_of_byte_ratio=0.99)
        assert "not measured" in line([wrong], "int4")

    def test_takes_no_dry_run_and_no_simulation(self):
        for changed in ({"config": {"dry_run": True}}, {"machine": {"simulated": True, "devices": []}}):
            assert "not measured" in line(
                [real("gpu_decode", host_link_share=1.0) | changed], "measured link"
            )

    def test_is_drawn(self, tmp_path):
        gpu_figures.draw([real("gpu_decode", host_link_share=0.9)], tmp_path / "figures.png")
        assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")

    def test_is_the_one_in_the_documentation(self):
        """No number stands there that no record holds."""
        results = ROOT / "benchmarks" / "results"
        records = [json.loads(path.read_text()) for path in results.glob("*.json")]
        section = (ROOT / "docs" / "gpu.md").read_text().split("## Results")[1].split("\n## ")[0]
        assert [line for line in section.splitlines() if line.startswith("|")] == gpu_figures.table(records)

    def test_is_what_the_report_prints(self, tmp_path, monkeypatch, capsys):
        record = tmp_path / "gpu.json"
        record.write_text(json.dumps(real("gpu_resident", bandwidth_share=0.92)))
        monkeypatch.setattr(
            sys, "argv", ["report.py", str(record), "--gpu", "--png", str(tmp_path / "p.png")]
        )
        report.main()
        assert "92.0%" in capsys.readouterr().out
        assert (tmp_path / "p.png").exists()
