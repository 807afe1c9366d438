"""The benchmarks' own machinery: records, memory groups, the answer check, the GGUF writer.  Nothing here is timed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from bench_modules import BENCHMARKS, load

FIELDS = {  # docs/benchmarking.md
    *("bench", "machine", "versions", "commit", "config", "repeats"),
    *("median", "spread", "limit", "baseline", "answer_matches"),
}


answer, cgroup, conditions, contest, harness = (
    load(name) for name in ("answer", "cgroup", "conditions", "contest", "harness")
)
write_gguf = load("write_gguf")


def record(**changed):
    given = {
        "bench": "example",
        "config": {"tokens": 2},
        "repeats": 3,
        "median": {"pass_s": 0.5},
        "spread": {"pass_s": (0.4, float("nan"))},
        "limit": {"pass_s": 0.45},
        "baseline": {},
        "answer_matches": True,
    }
    return harness.Record(**given | changed)


class TestRecord:
    def test_has_the_documented_fields_as_strict_json(self, tmp_path):
        path = record().write(tmp_path)
        found = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        assert set(found) >= FIELDS
        assert found["spread"] == {"pass_s": [0.4, None]}
        assert found["machine"]["cores"] >= 1
        assert path.name.startswith(f"example_{found['machine']['name']}_")
        assert list(tmp_path.iterdir()) == [path]

    def test_documented_fields_are_those_of_the_page(self):
        page = (BENCHMARKS.parent / "docs" / "benchmarking.md").read_text()
        page = page.split("## Record")[1].split("\n## ")[0]
        assert {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")} <= set(
            harness.Record.__dataclass_fields__
        )

    def test_summary_is_median_and_range(self):
        assert harness.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "spread": (1.0, 3.0), "repeats": 3}
        assert harness.summary([])["median"] is None


class TestChild:
    def test_memory_is_seen_from_outside(self, tmp_path, monkeypatch):
        """The child holds its memory until it has been seen."""
        seen, watch = tmp_path / "seen", harness.watch_memory

        class Peak(dict):
            def __setitem__(self, name, nbytes):
                super().__setitem__(name, nbytes)
                if name == "RssAnon" and nbytes >= 64 * harness.MIB:
                    seen.touch()

        def watched(pid, stop, peak):
            found = Peak(peak)
            watch(pid, stop, found)
            peak.update(found)

        monkeypatch.setattr(harness, "watch_memory", watched)
        code = "import os, sys, time; held = bytearray(64 * 2**20)\n"
        code += "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\nprint('done')"
        child = harness.run_child([sys.executable, "-c", code, str(seen)], tmp_path / "log", timeout_s=100)
        assert (child.returncode, child.log.strip()) == (0, "done")
        assert child.peak_anonymous_bytes >= 64 * harness.MIB

    def test_failure_and_time_out_say_why(self, tmp_path):
        child = harness.run_child(
            [sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path / "log"
        )
        assert child.why == "exit 1: no such thing"
        child = harness.run_child(
            [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", timeout_s=0.2
        )
        assert child.timed_out
        assert "ended after" in child.why

    def test_direct_reads_cover_the_file_or_are_refused(self, tmp_path):
        file = tmp_path / "data"
        file.write_bytes(bytes(3 * 4096))
        rate = harness.direct_read_rate([file])
        assert rate is None or rate > 0
        assert harness.direct_read_rate([tmp_path / "absent"]) is None


class TestMemoryGroup:
    V1 = "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0"
    V2 = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0"

    def test_finds_both_versions(self):
        own = "4:memory:/a/b\n1:cpu:/c\n0::/d"
        root = Path("/sys/fs/cgroup")
        assert cgroup.hierarchies(f"{self.V1}\n{self.V2}\nproc /proc proc rw 0 0", own) == [
            (1, root / "memory", root / "memory/a/b"),
            (2, root, root / "d"),
        ]
        assert cgroup.hierarchies("proc /proc proc rw 0 0", own) == []

    def test_refuses_cleanly_where_memory_cannot_be_limited(self, tmp_path, monkeypatch):
        own = tmp_path / "outer" / "inner"
        own.mkdir(parents=True)
        monkeypatch.setattr(cgroup, "hierarchies", lambda mounts, groups: [(2, tmp_path, own)])
        with pytest.raises(cgroup.NoGroupError, match="no memory control group"):
            cgroup.make(2**20)
        assert list(own.iterdir()) == []
        assert list(tmp_path.iterdir()) == [tmp_path / "outer"]

    def test_refuses_cleanly_where_none_is_mounted(self, monkeypatch):
        monkeypatch.setattr(cgroup, "hierarchies", lambda mounts, groups: [])
        with pytest.raises(cgroup.NoGroupError, match="none is mounted"), cgroup.memory_group(2**20):
            pass

    def test_caches_that_cannot_be_dropped_are_said_to_be_there(self, tmp_path):
        assert cgroup.drop_caches(tmp_path / "absent").startswith("not dropped: ")
        assert not (tmp_path / "absent").exists()

    def test_limit_ends_a_child_that_holds_more(self, tmp_path):
        try:
            group = cgroup.make(96 * harness.MIB)
        except cgroup.NoGroupError as why:
            pytest.skip(f"this machine lets us make no memory group: {why}")
        try:
            few, many = (f"held = bytearray({size} * 2**20)" for size in (16, 256))
            assert harness.run_child([sys.executable, "-c", few], tmp_path / "log", group).returncode == 0
            child = harness.run_child([sys.executable, "-c", many], tmp_path / "log", group)
            assert child.returncode != 0
            assert child.group_peak_bytes is None or child.group_peak_bytes <= 96 * harness.MIB
        finally:
            group.remove()
        assert not group.folder.exists()


class TestAnswer:
    @pytest.fixture
    def reference(self):
        return np.random.default_rng(0).standard_normal((16, 1000)).astype(np.float32)

    def test_rounding_passes(self, reference):
        noise = np.random.default_rng(1).uniform(-0.1, 0.1, reference.shape)
        verdict = answer.compare(reference, reference + noise)
        assert verdict.matches
        assert verdict.decided > 0
        assert verdict.largest_difference == pytest.approx(0.1, abs=1e-3)

    @pytest.mark.parametrize("corrupt", ["shuffle", "one_row", "nan", "shape", "nothing"])
    def test_corruption_fails(self, reference, corrupt):
        logits = reference.copy()
        if corrupt == "shuffle":
            logits = np.random.default_rng(2).permuted(logits, axis=-1)
        elif corrupt == "one_row":
            logits[7, logits[7].argmin()] = 100.0
        elif corrupt == "nan":
            logits[3, 5] = np.nan
        elif corrupt == "shape":
            logits = logits[:-1]
        verdict = answer.compare(reference, None if corrupt == "nothing" else logits)
        assert not verdict.matches
        assert verdict.wrong == {"one_row": (7,)}.get(corrupt, verdict.wrong)

    def test_log_probabilities_are_compared_with_normalised_logits(self, reference):
        theirs = answer.log_softmax(reference + 3.0)
        assert answer.compare(reference, theirs, log_probabilities=True).largest_difference < 1e-4
        assert answer.compare(reference, theirs).largest_difference > 1.0

    def test_own_tokens_may_leave_only_at_a_tie(self, reference):
        best = [int(token) for token in reference.argmax(-1)]
        assert answer.stream_error(reference, best, best) == ""
        assert "wanted" in answer.stream_error(reference, best, best[:-1])
        wrong = [*best[:3], int(reference[3].argmin()), *best[4:]]
        assert "token 3" in answer.stream_error(reference, best, wrong)
        reference[3, wrong[3]] = reference[3].max() - 0.1
        assert answer.stream_error(reference, best, wrong) == ""


class TestContest:
    @pytest.fixture
    def rows(self, tmp_path):
        """A contest in which zinfer took 1 s and a peer 4 s, both right."""
        held = contest.Contest(tmp_path, tmp_path, 2**20, prompts=[[1]], steps=2)
        for engine, seconds in (("zinfer", 1.0), ("peer", 4.0)):
            row = contest.Row(engine, contest.STREAMED, pass_s=[seconds], answer={"matches": True})
            held.rows[engine, contest.STREAMED] = row
        return held, row

    def test_ratio_is_formed_where_both_are_right_and_comparable(self, rows):
        held, peer = rows
        assert held.ratio(peer) == 4.0

    @pytest.mark.parametrize(
        "change",
        [
            {"comparable": False},
            {"error": "it could not be run"},
            {"answer": {"matches": False}},
            {"answer": {"matches": True, "stream_error": "token 3 is 7"}},
            {"pass_s": []},
        ],
    )
    @pytest.mark.parametrize("engine", ["zinfer", "peer"])
    def test_ratio_is_not_formed_otherwise(self, rows, engine, change):
        held, peer = rows
        for name, value in change.items():
            setattr(held.rows[engine, contest.STREAMED], name, value)
        assert held.ratio(peer) is None

    @pytest.fixture
    def fake_run(self, monkeypatch):
        """Engines answer at once; the disk gives 2 GB/s before a run and 1 GB/s after it."""
        rates = iter([2e9, 1e9] * 4)
        result = {"pass_s": [9.0, 2.0, 2.0], "read_bytes": [1, 2, 3], "first_token_s": 1.0, "logits": None}
        result |= {
            "reported_read_bytes": 1.0,
            "import_rss_bytes": 1,
            "settings": {},
            "versions": {},
            "facts": {},
        }
        result |= {"log_softmax": False, "tokens": []}
        child = harness.Child(0, 1.0, 1, 1, None, "")
        monkeypatch.setattr(conditions, "drop_caches", lambda: "dropped")
        monkeypatch.setattr(conditions, "direct_read_rate", lambda files, at_most: next(rates))
        monkeypatch.setattr(contest.Contest, "ask", lambda *given: (child, result))
        monkeypatch.setattr(contest.Contest, "judge", lambda *given: None)
        monkeypatch.setattr(contest, "disk_pass_s", lambda model, budget, rates, is_packed: 3e9 / rates[0])

    def test_row_without_a_group_is_not_comparable(self, rows, monkeypatch, fake_run):
        held, peer = rows

        def refuse(limit_bytes):
            raise cgroup.NoGroupError("none here")

        monkeypatch.setattr(conditions, "make", refuse)
        held.enter(contest.Engine("peer", "x.py", (contest.STREAMED,)), contest.STREAMED)
        assert (peer.comparable, peer.why, held.ratio(peer)) == (False, "none here", None)

    def test_disk_rate_is_taken_beside_the_run_and_limits_it(self, rows, monkeypatch, fake_run):
        held, peer = rows
        monkeypatch.setattr(conditions, "make", lambda limit_bytes: FakeGroup())
        (held.model / "model.safetensors").write_bytes(bytes(10))
        monkeypatch.setattr(conditions, "HEADROOM", -held.budget_bytes)
        held.enter(contest.Engine("peer", "x.py", (contest.STREAMED,)), contest.STREAMED)
        assert peer.disk_rates == [(2e9, 1e9)]
        assert peer.disk_rate == 1.5e9
        assert peer.limit_s == 2.0
        assert peer.over_limit == pytest.approx(peer.median / 2.0)

    def test_group_that_holds_the_checkpoint_is_not_comparable(self, rows, monkeypatch):
        held, _ = rows
        monkeypatch.setattr(conditions, "HEADROOM", 0)
        (held.model / "model.safetensors").write_bytes(bytes(2 * held.budget_bytes))
        monkeypatch.setattr(conditions, "make", lambda limit_bytes: FakeGroup())
        with held.group() as (_, why):
            assert why == ""
        held.budget_bytes *= 2
        with held.group() as (_, why):
            assert why == "the group holds the whole checkpoint"

    def test_streamed_bytes_leave_out_the_embedding_and_what_is_kept(self, tmp_path):
        (tmp_path / "config.json").write_text('{"vocab_size": 10, "hidden_size": 5}')
        (tmp_path / "model.safetensors").write_bytes(bytes(1000))
        assert conditions.streamed_bytes(tmp_path, 200) == 1000 - 100 - 170
        assert conditions.streamed_bytes(tmp_path, 200, kv_bytes=70) == 1000 - 100 - 100
        assert conditions.disk_pass_s(tmp_path, 200, [365.0, 1095.0]) == 1.0
        assert conditions.disk_pass_s(tmp_path, 200, []) is None
        # What is packed in memory leaves less to read: a third more of the budget's bytes stay.
        kept = 0.85 * 200 / conditions.PACKED_SHARE
        packed = conditions.streamed_bytes(tmp_path, 200, is_packed=True)
        assert packed == round(conditions.streamed_bytes(tmp_path, 0) - kept)


class FakeGroup:
    def remove(self):
        """Nothing was made."""


def rotate_halves(x_TD, angle_TF):
    """Rotary positions as transformers has them: element i is paired with i + D / 2."""
    first, second = np.split(x_TD, 2, axis=-1)
    cos, sin = np.cos(angle_TF), np.sin(angle_TF)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotate_neighbours(x_TD, angle_TF):
    """Rotary positions as llama.cpp has them for Llama: element 2i is paired with 2i + 1."""
    out = np.empty_like(x_TD)
    cos, sin = np.cos(angle_TF), np.sin(angle_TF)
    out[:, 0::2] = x_TD[:, 0::2] * cos - x_TD[:, 1::2] * sin
    out[:, 1::2] = x_TD[:, 1::2] * cos + x_TD[:, 0::2] * sin
    return out


def scores(x_TM, q, k, heads, kv_heads, rotate, order):
    """Attention scores [heads, T, T]; `order` reorders the rows of q and k for the rotation that is used."""
    head_dim, num_tokens = q.shape[0] // heads, len(x_TM)
    angle = np.arange(num_tokens)[:, None] * 10000.0 ** (-np.arange(head_dim // 2) * 2 / head_dim)
    q_TND = (x_TM @ order(q, heads).T).reshape(num_tokens, heads, head_dim)
    k_TND = (x_TM @ order(k, kv_heads).T).reshape(num_tokens, kv_heads, head_dim)
    shared = heads // kv_heads
    return np.stack(
        [rotate(q_TND[:, head], angle) @ rotate(k_TND[:, head // shared], angle).T for head in range(heads)]
    )


class TestGguf:
    HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 8, 32

    def test_row_order_suits_the_rotation_of_neighbours(self):
        draw = np.random.default_rng(0)
        x = draw.standard_normal((5, self.WIDTH))
        q = draw.standard_normal((self.HEADS * self.HEAD_DIM, self.WIDTH))
        k = draw.standard_normal((self.KV_HEADS * self.HEAD_DIM, self.WIDTH))
        shape = (self.HEADS, self.KV_HEADS)
        wanted = scores(x, q, k, *shape, rotate_halves, lambda weight, heads: weight)
        assert np.allclose(scores(x, q, k, *shape, rotate_neighbours, write_gguf.pair_rows), wanted)
        assert not np.allclose(
            scores(x, q, k, *shape, rotate_neighbours, lambda weight, heads: weight), wanted
        )

    @pytest.fixture
    def folder(self, tmp_path):
        import torch
        from safetensors.torch import save_file

        width, mlp, vocab, kv_width = self.WIDTH, 48, 300, self.KV_HEADS * self.HEAD_DIM
        shapes = {"model.embed_tokens": (vocab, width), "model.norm": (width,), "lm_head": (vocab, width)}
        for layer in range(2):
            for part, shape in {
                "self_attn.q_proj": (width, width),
                "self_attn.k_proj": (kv_width, width),
                "self_attn.v_proj": (kv_width, width),
                "self_attn.o_proj": (width, width),
                "mlp.gate_proj": (mlp, width),
                "mlp.up_proj": (mlp, width),
                "mlp.down_proj": (width, mlp),
                "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
            }.items():
                shapes[f"model.layers.{layer}.{part}"] = shape
        tensors = {f"{name}.weight": torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        config = {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": 2,
            "num_attention_heads": self.HEADS,
            "num_key_value_heads": self.KV_HEADS,
            "vocab_size": vocab,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path, tensors

    def test_round_trip(self, folder):
        gguf = pytest.importorskip("gguf", reason="the bench extra is not installed")
        import torch

        path, tensors = folder
        out = path / "model.gguf"
        write_gguf.write(path, out)
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
        assert set(found) == {write_gguf.gguf_name(name) for name in tensors}
        heads = {"q_proj": self.HEADS, "k_proj": self.KV_HEADS}
        for name, tensor in tensors.items():
            stored = found[write_gguf.gguf_name(name)]
            if tensor.ndim == 1:
                assert np.array_equal(stored.data, tensor.float().numpy())
                continue
            words = tensor.view(torch.uint16).numpy()
            for part, count in heads.items():
                if part in name:
                    words = write_gguf.pair_rows(words, count)
            assert np.array_equal(stored.data.view(np.uint16), words), name

    def test_foreign_architecture_is_refused(self, tmp_path):
        pytest.importorskip("gguf", reason="the bench extra is not installed")
        (tmp_path / "config.json").write_text('{"architectures": ["OPTForCausalLM"]}')
        with pytest.raises(KeyError, match="OPTForCausalLM"):
            write_gguf.write(tmp_path, tmp_path / "model.gguf")
        assert not (tmp_path / "model.gguf").exists()


def test_a_store_is_made_once_and_a_failure_is_said(tmp_path, monkeypatch):
    commands = []

    def run_child(command, log, timeout_s):
        commands.append((command[2:], log, timeout_s))
        return harness.Child(len(commands) - 1, 0.0, 0, 0, None, "no room", False)

    monkeypatch.setattr(harness, "run_child", run_child)
    made = (tmp_path / "m", tmp_path / "m-int4", "int4", tmp_path / "log", 9.0)
    assert harness.made_store(*made) == tmp_path / "m-int4"
    words = ["zinfer", "shard", str(tmp_path / "m"), "--out", str(tmp_path / "m-int4"), "--weights", "int4"]
    assert commands == [(words, tmp_path / "log", 9.0)]
    with pytest.raises(RuntimeError, match=r"int4 store cannot be made.*no room"):
        harness.made_store(*made)
    (tmp_path / "m-int4").mkdir()
    (tmp_path / "m-int4" / "config.json").write_text("{}")
    assert harness.made_store(*made) == tmp_path / "m-int4"
    assert len(commands) == 2
