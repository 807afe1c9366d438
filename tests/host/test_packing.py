"""Weights packed in memory behind their first use: the same bits under any budget, the books balanced, harm undone."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.cli.render import forecast_line
from zinfer.config.profiles import load_machine
from zinfer.errors import InternalError, MachineError
from zinfer.kernels.exponents import TooManyExponentsError
from zinfer.kernels.native.calls import kernels
from zinfer.memory import nvme
from zinfer.memory.assemble import open_manager
from zinfer.plan.records import Budget, Fetch, Settle, Tier
from zinfer.runtime.forms import pack_weights, weights_of
from zinfer.units import Bytes

PROMPT = [5, 9, 200, 31, 7, 44]
OTHERS = [[5, 9, 31], [200, 31, 7, 44, 5, 6, 7, 8], [1]]
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=4, temperature=0.9, seed=3, ignore_eos=True)
FAMILIES = ("llama", "qwen3", "phi3", "opt")

pytestmark = pytest.mark.skipif(kernels() is None, reason="packed weights are multiplied by compiled kernels")


@pytest.fixture
def machine(tmp_path):
    """A machine that replays passes, as one with our kernels does."""
    known = load_machine("sim-default")
    host = known.host.model_copy(update={"replayed_op_s": 1e-6})
    path = tmp_path / "machine.json"
    path.write_text(known.model_copy(update={"host": host}).model_dump_json())
    return str(path)


def wide(family, folder, layers=12):
    width = "ffn_dim" if family == "opt" else "intermediate_size"
    sizes = {"hidden_size": 128, "num_hidden_layers": layers, width: 512}
    return write_tiny(family, folder, **sizes)


@pytest.fixture
def folder(tmp_path):
    return wide("llama", tmp_path / "m")


def options(folder, machine, **more):
    """With a budget under which about half of the weights stream as they are published."""
    fixed = {"device": "cpu", "threads": 1, "machine": machine, "lookahead": 1, "max_batch": 4} | more
    with LLM(folder, **fixed, memory={"host": "1GiB"}) as llm:
        plan = llm.fit([PROMPT, *OTHERS], PARAMS)
        fixed_bytes = plan.uses[0].total - plan.reserve.recorded
        weights = sum(chunk.nbytes for chunk in plan.table.streamable)
    return fixed | {"memory": {"host": fixed_bytes - weights // 2}}


def outcome(llm):
    greedy = [each.outputs[0].token_ids for each in llm.generate([PROMPT, *OTHERS], PARAMS)]
    sampled = [each.outputs[0].token_ids for each in llm.generate([PROMPT, *OTHERS], SAMPLED)]
    return greedy, sampled, llm.logits(PROMPT)


def assert_same(one, other):
    assert one[:2] == other[:2], "tokens"
    assert torch.equal(one[2], other[2]), "logits"


def tokens_of(llm):
    return llm.generate([PROMPT], PARAMS)[0].outputs[0].token_ids


def manager_of(llm):
    return llm._session._engine.manager


@pytest.mark.parametrize("graphs", ["auto", "off"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_packing_changes_no_bit_and_fewer_bytes_are_read(family, exact, graphs, tmp_path, machine):
    folder = wide(family, tmp_path / family)
    settings = options(folder, machine, exact=exact, graphs=graphs)
    with LLM(folder, **settings, pack="never") as llm:
        wanted = outcome(llm)
        never = llm.plan.forecast.bytes_per_pass["disk"]
    with LLM(folder, **settings, pack="always") as llm:
        assert_same(outcome(llm), wanted)
        plan, stats, manager = llm.plan, llm.stats, manager_of(llm)
        packed, memory = plan.placement.packed, manager._memory.tiers[Tier.HOST]
        assert len(packed) > 1, "else this compares nothing"
        assert all(memory.is_home(chunk) for chunk in packed)
        for chunk in packed:
            with manager.lease(chunk) as lease:
                roles = {name.rpartition(".")[2] for name, _, _ in lease.views}
                assert {"rest", "codes", "exponents"} <= roles
        assert plan.forecast.bytes_per_pass["disk"] < never
        streamed = sum(not plan.placement.resident(chunk.id) for chunk in plan.table.streamable)
        loading = [step for steps in plan.schedule.loading for step in steps if isinstance(step, Fetch)]
        steady = len(stats.passes) - len(plan.schedule.loading)
        assert manager.stats().num_fetches == len(loading) + steady * streamed, "as planned"
        assert stats.surprises == 0
        assert stats.peak_bytes[Tier.HOST] <= plan.budget.host
        manager.check()


def test_a_wrong_byte_of_what_was_packed_shows(folder, machine):
    """What the test above compares is really what passes multiply with."""
    with LLM(folder, **options(folder, machine), pack="always") as llm:
        wanted = outcome(llm)[2]
        manager = manager_of(llm)
        chunk = min(llm.plan.placement.packed)
        with manager.lease(chunk) as lease:
            lists = next(view for key, view in lease.views.items() if key[0].endswith(".exponents"))
            lists[:, 0] += 1
        assert not torch.equal(llm.logits(PROMPT), wanted)


def test_what_fits_only_packed_is_read_once(tmp_path, machine):
    folder = wide("llama", tmp_path / "m", layers=16)
    settings = options(folder, machine)
    with LLM(folder, **settings, pack="never") as llm:
        wanted = tokens_of(llm)
        use, recorded = llm.plan.uses[0], llm.plan.reserve.recorded
        all_bytes = sum(chunk.nbytes for chunk in llm.plan.table.streamable)
    settings["memory"] = {"host": use.total - use.resident - recorded + round(0.82 * all_bytes)}
    with LLM(folder, **settings, pack="never") as llm:
        assert tokens_of(llm) == wanted
        assert llm.plan.placement.slots and not all(
            llm.plan.placement.resident(chunk.id) for chunk in llm.plan.table.streamable
        )
    with LLM(folder, **settings, pack="always") as llm:
        assert tokens_of(llm) == wanted
        assert llm.plan.placement.packed
        assert all(llm.plan.placement.resident(chunk.id) for chunk in llm.plan.table.streamable)
        decode = [done for done in llm.stats.passes if not done.is_first]
        rows = sum(table.row_bytes for table in llm.plan.table.row_tables.values())
        assert decode and all(done.num_bytes.get("disk", 0) <= 2 * rows + 8192 for done in decode), (
            "embedding rows alone"
        )


def with_wild_exponents(folder, name):
    """Forty of them, all as frequent, in the matrix of that name."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    numbers = torch.arange(tensors[name].numel()).view(tensors[name].shape)
    tensors[name] = torch.exp2(numbers % 40 - 30.0).to(torch.bfloat16)
    save_file(tensors, path)
    return folder


def test_weights_that_cannot_be_packed_stay_published_and_the_plan_follows(folder, machine, caplog):
    settings = options(folder, machine)
    with LLM(folder, **settings, pack="always") as llm:
        packed = llm.fit([PROMPT, *OTHERS], PARAMS).placement.packed
        ops = [llm.model.spec.program[index] for index in llm.plan.table.chunks[max(packed)].ops]
    with_wild_exponents(folder, ops[-1].matrix.name)
    with LLM(folder, **settings, pack="never") as llm:
        wanted = outcome(llm)
    with LLM(folder, **settings, pack="always") as llm:
        assert llm.fit([PROMPT, *OTHERS], PARAMS).placement.packed == packed, "it looks at no weight"
        assert_same(outcome(llm), wanted)
        told = [record for record in caplog.records if "stays as it is published" in record.getMessage()]
        assert len(told) == 1, "nor packs any that a later plan could"
        assert llm.plan.placement.packed == frozenset()
        assert tokens_of(llm) == wanted[0][0]
        assert [done for done in llm.stats.passes if not done.is_first], "it settles down again"
        manager_of(llm).check()


def test_a_read_that_fails_while_chunks_settle_is_told_and_the_next_pass_begins_anew(
    folder, machine, monkeypatch
):
    settings = options(folder, machine)
    with LLM(folder, **settings, pack="never") as llm:
        wanted = tokens_of(llm)
    with LLM(folder, **settings, pack="always") as llm:
        llm.fit([PROMPT], PARAMS)
        packed = sorted(llm.plan.placement.packed)
        failing, real = packed[len(packed) // 2], nvme.Reader._read

        def read(reader, fetch, number, piece):
            if fetch.ticket.chunk.id == failing:
                raise MachineError("ZI-5321", "the disk has a bad moment", remedy="again")
            real(reader, fetch, number, piece)

        monkeypatch.setattr(nvme.Reader, "_read", read)
        with pytest.raises(MachineError, match="ZI-5321"):
            tokens_of(llm)
        monkeypatch.undo()
        memory, manager = manager_of(llm)._memory.tiers[Tier.HOST], manager_of(llm)
        manager.check()
        assert memory.is_home(packed[0]) and not memory.is_home(failing)
        assert tokens_of(llm) == wanted
        assert all(map(memory.is_home, packed))
        manager.check()


def test_budgets_change_in_the_middle_of_a_generation(folder, machine):
    settings = options(folder, machine)
    with LLM(folder, **settings, pack="never") as llm:
        wanted = tokens_of(llm)
    with LLM(folder, **settings, pack="always") as llm:
        texts = iter(llm._session.run(llm._jobs(llm._requests([PROMPT], PARAMS))))
        found, seen = [next(texts).token_id], [llm.plan.placement.packed]
        have = settings["memory"]["host"]
        for host in (have + 2**20, have, 2**30):
            llm.set_memory(host=host)
            seen.append(llm.plan.placement.packed)
            found.append(next(texts).token_id)
            manager_of(llm).check()
        assert found + [event.token_id for event in texts] == wanted
        assert seen[0] and seen[2] and seen[0] != seen[1] and not seen[3], "all forms were there"
        manager_of(llm).check()


@pytest.fixture
def opened(folder, machine):
    """A manager of a plan that packs, before its first pass, and the ops of its first packed chunk."""
    with LLM(folder, **options(folder, machine), pack="always") as llm:
        plan = llm.fit([PROMPT], PARAMS)
        spec, table = llm.model.spec, plan.table
    manager = open_manager(table, plan.placement, Budget(plan.budget.host))
    chunk = min(plan.placement.packed)
    assert any(step == Settle(chunk) for steps in plan.schedule.loading for step in steps)
    yield manager, chunk, [spec.program[index] for index in table.chunks[chunk].ops]
    manager.check()
    manager.close()


def test_settling_moves_a_chunk_home_and_frees_its_slot(opened):
    manager, chunk, ops = opened
    memory = manager._memory.tiers[Tier.HOST]
    slots = len(memory._free)
    manager.prefetch(chunk)
    assert len(memory._free) == slots - 1, "even without being asked it is a guest"
    with manager.lease(chunk) as lease:
        published = {
            op.index: {role: part.clone() for role, part in weights_of(op, lease.views).items()} for op in ops
        }
        with pytest.raises(InternalError, match="ZI-0121"):
            manager.settle(chunk, lambda *_: None)
    manager.settle(chunk, lambda one, two: pack_weights(ops, one, two))
    assert memory.is_home(chunk) and len(memory._free) == slots
    assert manager.ledger().held == {chunk: manager.table.packed[chunk].nbytes}
    manager.settle(chunk, lambda *_: pytest.fail("it is home"))
    with manager.lease(chunk) as lease:
        for op in ops:
            for role, part in weights_of(op, lease.views).items():
                if role in published[op.index]:
                    assert torch.equal(part, published[op.index][role]), "what is not packed is copied"


def test_what_cannot_be_packed_leaves_nothing_behind(opened):
    manager, chunk, ops = opened

    def refuse(*_):
        raise TooManyExponentsError("forty of them")

    memory = manager._memory.tiers[Tier.HOST]
    slots = len(memory._free)
    manager.prefetch(chunk)
    with manager.lease(chunk):
        pass
    with pytest.raises(TooManyExponentsError):
        manager.settle(chunk, refuse)
    manager.check()
    assert manager.ledger().held == {} and len(memory._free) == slots
    with manager.lease(chunk) as lease:  # a surprise, in a slot, and right all the same
        assert not memory.is_home(chunk)
        assert all(op.matrix.key in lease.views for op in ops)
    assert manager.surprises == 1
    manager.evict(chunk)
    manager.settle(chunk, lambda *_: pytest.fail("it is not there"))
    other = replace(manager.placement, packed=frozenset())
    assert other.at_home(manager.table, chunk) is manager.table.chunks[chunk]


def test_one_line_before_the_work_says_what_is_packed(folder, machine):
    settings = options(folder, machine)
    with LLM(folder, **settings, pack="always") as llm:
        llm.fit([PROMPT, *OTHERS], PARAMS)
        published, taken = llm.plan.packed_bytes
        assert 0 < taken < 0.8 * published
        assert f"({Bytes(published)} packed into {Bytes(taken)})" in forecast_line(llm.plan)
    with LLM(folder, **settings, pack="never") as llm:
        llm.fit([PROMPT, *OTHERS], PARAMS)
        assert "packed" not in forecast_line(llm.plan)
