"""The command line as a user meets it: what it prints, its exit codes, and remedies that work when pasted."""

import json
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from plan_of import MACHINE, plan_of, small_llama
from tiny_models import streaming_bytes, write_tiny

from zinfer import SamplingParams
from zinfer.__main__ import main as begin
from zinfer.api import DEMO
from zinfer.classifier import DEMO as GROUP
from zinfer.cli.main import COMMANDS, run
from zinfer.cli.prompts import as_line, read_prompt_lines
from zinfer.cli.render import tip_lines
from zinfer.cli.store import perplexity_lines
from zinfer.jobs.perplexity import Perplexity
from zinfer.spec.lossless import LOSSLESS
from zinfer.units import seconds_text

IDS = "5,9,200,31,7,44"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("cli") / "model")


def half_streams(model, max_tokens):
    """A budget for IDS in which half of the weights stream."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return streaming_bytes(model, [int(token) for token in IDS.split(",")], params)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """No test measures this machine."""
    monkeypatch.setenv("ZINFER_MACHINE", "sim-default")
    monkeypatch.setenv("ZINFER_DEVICE", "cpu")


def refused(capsys, argv):
    """Run, expect a refusal; returns (exit code, error code, message, remedy)."""
    exit_code = run([str(part) for part in argv])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    found = re.search(r"error (ZI-\d{4})  (.*?)(?:\n  try: (.*))?$", err.strip(), re.DOTALL)
    assert found, err
    return exit_code, found[1], found[2], found[3]


def test_generate_prints_ids_where_there_is_no_tokenizer(model, capsys):
    assert run(["generate", str(model), "--prompt-ids", IDS, "--max-tokens", "4", "--ignore-eos"]) == 0
    out, err = capsys.readouterr()
    assert len(out.split()) == 4
    assert "plan " in err
    assert "stats " in err


def test_json_has_outputs_plan_and_stats(model, capsys):
    argv = ["generate", str(model), "--prompt-ids", IDS, "--max-tokens", "4", "--ignore-eos", "--json"]
    budget = half_streams(model, 4)
    assert run([*argv, "--host-mem", f"{budget}"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["outputs"][0]["token_ids"]) == 4
    assert record["plan"]["placement"]["slots"] >= 2
    assert record["stats"]["passes"] >= 4
    assert record["stats"]["bytes_per_pass"]["disk"] > 0
    assert record["stats"]["peak_bytes"]["host"] <= budget


def test_files_in_and_out(model, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": [1, 2, 3]}\n\n{"prompt": [4]}\n')
    argv = ["generate", str(model), "-i", str(source), "-o", str(target), "--max-tokens", "3", "--ignore-eos"]
    assert run(argv) == 0
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["prompt_tokens"] for line in lines] == [3, 1]
    assert all(len(line["token_ids"]) == 3 for line in lines)
    assert not list(tmp_path.glob("*.partial"))


def test_lines_end_where_json_lines_end(tmp_path):
    """Not at what else Unicode counts as an end; a byte order mark is no part of the first."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d"}'.encode())
    assert read_prompt_lines(source) == ["a\u2028b\x85c", "d"]


def test_a_file_that_is_no_utf8_is_named_with_its_line(model, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    code, name, message, remedy = refused(capsys, ["generate", model, "-i", source])
    assert (code, name) == (3, "ZI-4911")
    assert "line 2 is not UTF-8" in message
    assert remedy.startswith(f"iconv -f latin1 -t utf-8 {source}")


def test_half_a_surrogate_pair_is_written_as_an_escape():
    assert as_line({"text": "\ud800é"}) == '{"text": "\\ud800\\u00e9"}'
    assert as_line({"text": "é"}) == '{"text": "é"}'


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "MODEL", "--prompt-ids", "1", "-o", "PLACE"],
        ["generate", "MODEL", "--prompt-ids", "1", "--trace", "PLACE"],
        ["score", "MODEL", "-i", "IN", "-o", "PLACE"],
        ["bench", "throughput", "MODEL", "--json", "PLACE"],
        ["bench", "throughput", "MODEL", "--svg", "PLACE"],
        ["plan", "MODEL", "--save", "PLACE"],
        ["trace", "IN", "--png", "PLACE.png"],
        ["classify", "MODEL", "-i", "IN", "-o", "PLACE.csv"],
        ["embed", "MODEL", "-i", "IN", "-o", "PLACE.npy"],
    ],
)
def test_a_place_for_results_is_tried_before_any_work(model, tmp_path, capsys, monkeypatch, argv):
    for opened in ("api.LLM.__init__", "classifier.Classifier.__init__", "cli.plan.open_for_planning"):
        monkeypatch.setattr(f"zinfer.{opened}", lambda *_args, **_options: 1 / 0)
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": [1], "continuation": [2]}\n')
    names = {"MODEL": str(model), "IN": str(source)}
    for place in ("missing/file", "folder"):
        (tmp_path / "folder.csv").mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder.npy").mkdir(exist_ok=True)
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        (tmp_path / "folder").mkdir(exist_ok=True)
        given = [names.get(part, part.replace("PLACE", str(tmp_path / place))) for part in argv]
        assert refused(capsys, given)[:2] == (5, "ZI-5931")


@pytest.mark.parametrize("command", ["generate", "score"])
def test_results_never_take_the_place_of_the_prompts(model, tmp_path, capsys, command):
    source = tmp_path / "lines.jsonl"
    source.write_text('{"prompt": [1], "continuation": [2]}\n')
    code, name, _, remedy = refused(capsys, [command, model, "-i", source, "-o", source])
    assert (code, name, remedy) == (2, "ZI-1118", f"--output {tmp_path / 'lines-results.jsonl'}")
    assert source.read_text().startswith('{"prompt"')


def test_doctor_looks_for_a_place_before_it_measures(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("zinfer.memory.measure.measure", lambda *_args, **_options: 1 / 0)
    assert refused(capsys, ["doctor"])[:2] == (5, "ZI-5931")


@pytest.mark.parametrize(
    ("line", "code"),
    [("{", "ZI-4912"), ('{"text": "x"}', "ZI-4912"), ('{"prompt": [1.5]}', "ZI-4912"), ("", "ZI-4913")],
)
def test_bad_prompt_lines_are_refused(model, tmp_path, capsys, line, code):
    source = tmp_path / "in.jsonl"
    source.write_text(line + "\n")
    exit_code, found, _, remedy = refused(capsys, ["generate", model, "-i", source])
    assert (exit_code, found) == (3, code)
    assert remedy


def test_a_batch_says_what_failed_and_exits_with_7(model, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": [1, 2, 3]}\n{"prompt": [4]}\n')
    argv = [
        "run-batch",
        str(model),
        "-i",
        str(source),
        "-o",
        str(target),
        "--max-tokens",
        "3",
        "--ignore-eos",
    ]
    assert run(argv) == 0
    assert "results    2 in" in capsys.readouterr().err
    assert run(argv) == 0, "again: nothing is left to do"
    assert "resumed    2" in capsys.readouterr().err
    exit_code, code, message, remedy = refused(capsys, [*argv, "--temperature", "1"])
    assert (exit_code, code) == (2, "ZI-1712")
    assert "temperature was 0.0, is 1.0" in message
    assert str(target) in remedy
    source.write_text('{"prompt": [1, 2, 3]}\n{"prompt": [4000]}\nnot json\n')
    assert run([str(tmp_path / "other.jsonl") if part == str(target) else part for part in argv]) == 7
    assert "results    3 in" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "other.jsonl").read_text().splitlines()]
    assert sorted(line["error"]["code"] for line in lines if "error" in line) == ["ZI-1106", "ZI-1701"]


def test_scores_are_lines_of_json(model, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": [1, 2, 3], "continuation": [4, 5]}\n\n{"prompt": [], "continuation": [4]}\n'
    )
    assert run(["score", str(model), "-i", str(source), "-o", str(target)]) == 0
    first, second = [json.loads(line) for line in target.read_text().splitlines()]
    assert first["token_ids"] == [4, 5]
    assert first["logprob"] == pytest.approx(sum(first["token_logprobs"]))
    assert len(second["token_logprobs"]) == 1
    assert run(["score", "-p", "import", "-c", " os", "-c", " sys"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "stats " in err
    source.write_text('{"prompt": "x"}\n')
    exit_code, code, _, remedy = refused(capsys, ["score", model, "-i", source])
    assert (exit_code, code) == (3, "ZI-4922")
    assert remedy


def test_an_impossible_budget_names_one_that_works(model, capsys):
    argv = ["generate", str(model), "--prompt-ids", IDS, "--max-tokens", "4", "--ignore-eos"]
    exit_code, code, message, remedy = refused(capsys, [*argv, "--host-mem", "64KiB"])
    assert (exit_code, code) == (4, "ZI-2001")
    assert "64.00 KiB" in message
    assert run([*argv, *shlex.split(remedy)]) == 0


@pytest.mark.parametrize(
    ("argv", "exit_code", "code"),
    [
        (["generate", "no/such/folder", "-p", "x"], 3, "ZI-4001"),
        (["generate", "MODEL", "-p", "x"], 3, "ZI-4601"),
        (["generate", "MODEL"], 2, "ZI-1101"),
        (["generate", "MODEL", "--prompt-ids", "1,b"], 2, "ZI-1102"),
        (["generate", "MODEL", "--prompt-ids", "1,9999"], 2, "ZI-1106"),
        (["generate", "MODEL", "--prompt-ids", "1", "--max-tokens", "9999"], 2, "ZI-1107"),
        (["generate", "MODEL", "--prompt-ids", "1", "--set", "memory.hots=1GiB"], 2, "ZI-1002"),
        (["generate", "MODEL", "--prompt-ids", "1", "--host-mem", "plenty"], 2, "ZI-1003"),
        (["generate", "MODEL", "--prompt-ids", "1", "--temperature", "-1"], 2, "ZI-1302"),
        (["generate", "MODEL", "--prompt-ids", "1", "--device", "cuda:7"], None, None),
        (["run-batch", "MODEL", "-i", "no-such.jsonl", "-o", "no-such-output.jsonl"], 3, "ZI-4921"),
        (["run-batch", "MODEL", "--model", "x", "-i", "no-such.jsonl", "-o", "o.jsonl"], 2, "ZI-1710"),
        (["score", "MODEL"], 2, "ZI-1117"),
        (["score", "MODEL", "-p", "x"], 2, "ZI-1117"),
        (["score", "MODEL", "-p", "x", "-c", "y", "-i", "z.jsonl"], 2, "ZI-1117"),
        (["score", "MODEL", "-p", "x", "-c", "y"], 3, "ZI-4601"),
        (["shard", "MODEL", "--out", "MODEL"], 2, "ZI-3002"),
        (["verify", "MODEL"], 6, None),
        (["trace", "no-such-trace.json", "--png", "x.png"], 3, "ZI-4901"),
        (["plan", "MODEL", "--machine", "no-such-machine"], 2, "ZI-1007"),
        (["plan", "no-such-model", "--requests", "0"], 2, "ZI-1109"),
        (["doctor", "--seconds", "0"], 2, "ZI-1119"),
        (["doctor", "--seconds", "nan"], 2, "ZI-1119"),
        (["doctor", "--seconds", "inf"], 2, "ZI-1119"),
        (["trace", "x.json", "--png", "x.png", "--last", "-1"], 2, "ZI-1119"),
        (["trace", "x.json", "--png", "x.docx"], 2, "ZI-1138"),
        (["run-batch", "MODEL", "-i", __file__, "-o", "/dev/null"], 2, "ZI-1711"),
        (["verify", "no-such-store"], 3, "ZI-4001"),
        (["generate", "", "-p", "x"], 2, "ZI-1003"),
        (["generate", "MODEL", "--prompt-ids", "1", "--set", "runtime.threads=100000"], 2, "ZI-1003"),
        (["run-batch", "MODEL", "-i", __file__, "-o", "/tmp"], 2, "ZI-1711"),
    ],
)
def test_mistakes_end_in_one_numbered_error(model, capsys, argv, exit_code, code):
    argv = [str(model) if part == "MODEL" else part for part in argv]
    found_exit, found_code, _, remedy = refused(capsys, argv)
    assert remedy, "every refusal says what to try"
    if exit_code is None:
        assert found_exit in (2, 5)
    else:
        assert found_exit == exit_code
    if code is not None:
        assert found_code == code


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--no-such-flag"],
        ["no-such-command"],
        ["plan", "--batch", "many"],
        ["plan", "--gen-len", "-1"],
        ["plan", "--prompt-len", "0"],
    ],
)
def test_usage_errors_exit_with_2(argv, capsys):
    assert run(argv) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_plan_says_when_it_is_for_another_workload(model, capsys):
    assert run(["plan", str(model), "--prompt-len", "99999999", "--gen-len", "5"]) == 0
    said = capsys.readouterr()
    note = re.search(
        r"note +99999999 prompt tokens and 5 to generate .* planned for (\d+) and (\d+)", said.err
    )
    assert f"prompt {note[1]} · generate {note[2]}" in said.out
    assert run(["plan", str(model), "--prompt-len", "9", "--gen-len", "5"]) == 0
    assert "planned for" not in capsys.readouterr().err


def test_an_interruption_that_an_import_swallows_is_not_lost(tmp_path, capsys, monkeypatch):
    (tmp_path / "swallowing.py").write_text(
        "import click, signal\n"
        "try:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass\n"
        "nosy = click.Command('nosy', callback=lambda: 0)\n"
    )
    (tmp_path / "impatient.py").write_text(
        "import signal\n" + "signal.raise_signal(signal.SIGINT)\n" * 2 + "1 / 0"
    )
    monkeypatch.setitem(COMMANDS, "twice", ("impatient", "Come."))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "nosy", ("swallowing", "Swallow."))
    assert run(["nosy"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run(["nosy"]) == 0
    assert run(["twice"]) == 130, "a second one is not put off"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Interrupting:
    """A finder that is interrupted as the command line is imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "zinfer.cli.main":
            signal.raise_signal(signal.SIGINT)


def test_an_interruption_while_the_command_line_is_imported_shows_no_traceback(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "zinfer.cli.main")
    monkeypatch.delattr("zinfer.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        begin()
    assert ended.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted: ")


@pytest.mark.parametrize(("sink", "exit_code"), [("| head -c 3", 0), ("> /dev/full", 5)])
def test_output_that_nobody_takes(model, sink, exit_code):
    """With more than a pipe holds, and with so little that the interpreter's last flush would meet it."""
    for argv in (["inspect", str(model)], ["plan", str(model), "--json"]):
        call = f"from zinfer.cli.main import main; main({argv})"
        line = f"{shlex.join([sys.executable, '-c', call])} {sink}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], check=False, capture_output=True, text=True, timeout=100)
        assert done.returncode == exit_code, done.stderr
        assert ("error ZI-5932  the output cannot be written: No space" in done.stderr) is bool(exit_code)
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert run([command, "--help"]) == 0
    assert "Usage: zinfer" in capsys.readouterr().out


def test_a_bug_is_reported_without_a_traceback(monkeypatch, model, capsys):
    monkeypatch.setattr("zinfer.cli.generate.read_prompts", lambda *_: 1 / 0)
    assert run(["generate", str(model), "-p", "x"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert run(["-vv", "generate", str(model), "-p", "x"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_quantised_store_from_shard_to_text(model, tmp_path, capsys):
    store = tmp_path / "store"
    assert run(["shard", str(model), "--out", str(store), "--weights", "int4"]) == 0
    assert "relative RMS error of" in capsys.readouterr().out
    assert run(["inspect", str(store), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["weights"] == "int4"
    assert 4.5 < described["bits_per_weight"] < 6  # 32 outputs fill half a panel
    assert run(["verify", str(store), "--source", str(model), "--json"]) == 0
    quality = json.loads(capsys.readouterr().out)["quality"]
    assert all(row["rms"] == pytest.approx(row["written"]) for row in quality)
    assert run(["generate", str(store), "--prompt-ids", "5,9,200", "--max-tokens", "2", "--json"]) == 0
    manifest = json.loads((store / "zinfer.json").read_bytes())
    manifest["quantised"]["quality"][0]["rms"] *= 1.001
    (store / "zinfer.json").write_text(json.dumps(manifest))
    exit_code, code, _, _ = refused(capsys, ["verify", store, "--source", model])
    assert (exit_code, code) == (6, "ZI-6011")
    again = tmp_path / "again"
    assert run(["shard", str(store), "--out", str(again), "--layout", "panels-32"]) == 0
    capsys.readouterr()
    assert run(["inspect", str(again)]) == 0
    assert "panels-32" in capsys.readouterr().out


def test_a_lossless_store_from_shard_to_the_published_text(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ZINFER_RUNTIME_THREADS", "1")
    store, text = tmp_path / "store", tmp_path / "text.txt"
    text.write_text((DEMO / "heldout.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    about = ["--text", str(text)]
    assert run(["shard", str(DEMO), "--out", str(store), "--weights", "lossless", *about]) == 0
    out = capsys.readouterr().out
    assert "42 matrices unpacked again: every bit is the published one" in out
    assert "+0.00%" in out
    assert "warning" not in out
    assert run(["inspect", str(store), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["weights"], described["kernel_layout"]) == ("lossless", "exponents-16")
    assert 12 < described["bits_per_weight"] < 12.2
    assert run(["verify", str(store), "--source", str(DEMO), *about, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["rms"] for row in told["quality"]} == {0.0}
    assert run(["verify", str(store), "--source", str(DEMO), *about]) == 0
    assert "every bit is the published one" in capsys.readouterr().out
    assert told["perplexity"]["rise"] == 0
    said = []
    for model in (DEMO, store):
        assert run(["generate", str(model), "-p", "def add(", "--max-tokens", "12", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0]["outputs"] == said[1]["outputs"]
    refusal = refused(
        capsys, ["shard", DEMO, "--out", tmp_path / "x", "--weights", "lossless", "--layout", "panels-64"]
    )
    assert refusal[:2] == (2, "ZI-3005")


def test_the_quality_report_has_the_perplexity_of_a_text(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ZINFER_RUNTIME_THREADS", "1")
    store, text = tmp_path / "store", tmp_path / "text.txt"
    text.write_text((DEMO / "heldout.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    about = ["--text", str(text)]
    assert run(["shard", str(DEMO), "--out", str(store), "--weights", "int8", *about]) == 0
    out = capsys.readouterr().out
    assert re.search(r"perplexity \d+\.\d+ as published, .*\(limit \+1%\)", out)
    assert "warning" not in out
    verify = ["verify", str(store), "--source", str(DEMO), *about]
    assert run([*verify, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["perplexity"]
    assert told["stored"] <= told["published"] * 1.01
    assert told["text"] == str(text)
    text.write_text("")
    assert refused(capsys, verify)[:2] == (2, "ZI-1118")


def test_a_perplexity_beyond_the_limit_is_said():
    lines = list(perplexity_lines(Perplexity("t", 9, 10.0, 10.7, 0.06)))
    assert lines[0].startswith("perplexity 10.000 as published, 10.700 in the store: +7.00% on 9 tokens of t")
    assert lines[1].startswith("warning")
    assert list(perplexity_lines(None)) == []


def test_another_source_says_nothing_against_the_store(model, tmp_path, capsys):
    """Least of all that it should be removed."""
    store = tmp_path / "store"
    assert run(["shard", str(model), "--out", str(store)]) == 0
    assert refused(capsys, ["verify", store, "--source", tmp_path / "missing"])[:2] == (3, "ZI-4001")
    other = write_tiny("llama", tmp_path / "other", num_hidden_layers=1)
    code, name, message, remedy = refused(capsys, ["verify", store, "--source", other])
    assert (code, name) == (6, "ZI-6012")
    assert "the store itself is whole" in message
    assert "rm " not in remedy


@pytest.mark.parametrize("command", ["inspect", "plan", "generate"])
def test_a_group_of_students_is_called_by_its_name(capsys, command):
    argv = [command, GROUP] + (["-p", "x"] if command == "generate" else [])
    code, name, _, remedy = refused(capsys, argv)
    assert (code, name) == (3, "ZI-4022")
    assert remedy == f"zinfer classify {GROUP} 'a text'"


def test_text_that_is_no_unicode_is_refused(tmp_path, capsys):
    """As bytes of another encoding become on a command line."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a\\ud800"}')
    for argv in (
        ["generate", "-p", "a\udce9"],
        ["generate", "-i", source],
        ["score", "-p", "\udce9", "-c", "b"],
    ):
        assert refused(capsys, argv)[:2] == (2, "ZI-1131")


def test_a_prompt_that_is_too_long_names_what_would_fit(model, capsys):
    context = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    for count, more, remedy in (
        (context - 2, 5, "--max-tokens 2"),
        (context, 1, f"give at most {context - 1} tokens"),
    ):
        ids = ",".join(["1"] * count)
        found = refused(capsys, ["generate", model, "--prompt-ids", ids, "--max-tokens", more])
        assert found[1::2] == ("ZI-1107", remedy)


def test_shard_verify_and_find_a_flipped_bit(model, tmp_path, capsys):
    store = tmp_path / "store"
    assert run(["shard", str(model), "--out", str(store)]) == 0
    assert run(["verify", str(store), "--source", str(model)]) == 0
    assert run(["inspect", str(store), "--json"]) == 0
    described = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert described["architecture"] == "LlamaForCausalLM"
    shard_file = next(store.glob("*.safetensors"))
    data = bytearray(shard_file.read_bytes())
    data[len(data) // 2] ^= 1
    shard_file.write_bytes(data)
    exit_code, code, _, _ = refused(capsys, ["verify", store])
    assert (exit_code, code) == (6, "ZI-6010")
    argv = [
        "generate",
        store,
        "--prompt-ids",
        IDS,
        "--max-tokens",
        "2",
        "--ignore-eos",
        "--host-mem",
        f"{half_streams(store, 2)}",
    ]
    exit_code, _, message, _ = refused(capsys, argv)
    assert exit_code == 6
    assert shard_file.name in message


def test_a_trace_can_be_drawn(model, tmp_path, capsys):
    trace, picture = tmp_path / "t.json", tmp_path / "t.png"
    argv = ["generate", str(model), "--prompt-ids", IDS, "--max-tokens", "3", "--ignore-eos"]
    assert run([*argv, "--host-mem", f"{half_streams(model, 3)}", "--trace", str(trace)]) == 0
    lanes = {e["args"]["name"] for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "M"}
    assert {"compute", "wait", "disk"} <= lanes
    assert run(["trace", str(trace), "--png", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plan_answers_without_weights_or_torch(tmp_path, capsys):
    config = tmp_path / "config.json"
    from tiny_models import CONFIGS

    config.write_text(json.dumps(CONFIGS["qwen3"]))
    assert run(["plan", str(config), "--json", "--host-mem", "2MiB"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["forecast"]["pass_s"] > 0
    assert record["alternatives"]
    assert run(["plan", str(config)]) == 0
    assert "bound by" in capsys.readouterr().out


def test_doctor_says_when_others_were_working():
    from zinfer.cli.doctor import others_share, warnings_for
    from zinfer.config.limits import memory_limits
    from zinfer.config.profiles import load_machine

    assert others_share((0.0, 0.0, 0.0), (10.0, 6.0, 2.0)) == 0.4
    assert others_share((1.0, 1.0, 1.0), (1.0, 1.0, 2.0)) == 0.0
    machine = load_machine("sim-default").model_copy(update={"skipped": ("BF16, 512 rows",)})
    told = "\n".join(warnings_for(machine, memory_limits(), is_small=False, others=0.4))
    assert "40%" in told
    assert "BF16, 512 rows" in told
    assert "other processes" not in "\n".join(warnings_for(machine, memory_limits(), is_small=False))


def test_doctor_describes_the_links_of_several_devices(monkeypatch):
    from zinfer.cli.doctor import describe_links, with_links
    from zinfer.config.profiles import load_machine
    from zinfer.errors import MachineError
    from zinfer.parallel import topology

    two = load_machine("sim-default")
    shared = [link.model_copy(update={"together_bytes_per_s": 12e9}) for link in two.links]
    lines = list(describe_links(two.model_copy(update={"links": tuple(shared)})))
    assert [line.count("shares its way") for line in lines] == [1, 1, 0]
    assert "24.00 GB/s together: 1.00 times one" in lines[-1]
    assert list(describe_links(two.using(1))) == []
    monkeypatch.setattr(topology, "cuda_links", lambda num_devices: two.links)
    assert with_links(two.using(1)).links == two.links

    def refused(num_devices):
        raise MachineError("ZI-5383", "no", remedy="look")

    monkeypatch.setattr(topology, "cuda_links", refused)
    assert with_links(two.using(1)).links == (), "one link is still a profile"


def test_whoever_waits_for_the_disk_hears_of_the_lossless_store():
    spec, slow = small_llama(), MACHINE.disk_read.model_copy(update={"bytes_per_s": 5e8})
    machine = MACHINE.model_copy(update={"disk_read": slow})
    plan = plan_of(spec, machine=machine, device="cpu", memory__host="250MiB")
    (tip,) = tip_lines(SimpleNamespace(spec=spec, folder=Path("a model")), plan)
    found = re.fullmatch(
        r"tip        (zinfer shard 'a model' --out DIR --weights lossless): (.*) per pass instead of (.*), every .*",
        tip,
    )
    assert found[3] == seconds_text(plan.forecast.pass_s) != found[2]
    assert shlex.split(found[1]) == ["zinfer", "shard", "a model", "--out", "DIR", "--weights", LOSSLESS]


@pytest.mark.parametrize("why", ["all stays", "a store", "short passes"])
def test_nobody_else_does(why):
    spec = small_llama()
    plan = plan_of(spec, device="cpu", memory__host="4GiB" if why == "all stays" else "250MiB")
    assert (plan.forecast.binding == "disk") == (why != "all stays")
    if why == "a store":
        spec = replace(spec, weights=LOSSLESS)
    if why == "short passes":
        plan = replace(plan, forecast=replace(plan.forecast, pass_s=0.09))
    assert list(tip_lines(SimpleNamespace(spec=spec, folder=Path("model")), plan)) == []
