"""A device that is missing, full or lost: one typed error or one announced fallback each, and close() works.

The faults are injected where torch raises them; the engine computes on the simulated device.
"""

import logging
import warnings

import pytest
import torch
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.errors import BudgetError, MachineError
from zinfer.memory import devices
from zinfer.memory.devices import visible_devices
from zinfer.memory.faults import FULL, LOST, TOO_FULL, explained, is_lost, is_out_of_memory
from zinfer.runtime import engine as engines
from zinfer.runtime import loop as loops

PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
PROMPTS = [[5, 9, 200, 31, 7, 44], [17, 3, 2], [3, 3, 8, 120, 77, 45, 90, 14, 2]]
FIXED = {"machine": "sim-default", "device": "sim", "max_rows": 24, "max_batch": 3, "threads": 1}
ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("faults") / "model")


@pytest.fixture
def llm(folder):
    with LLM(folder, **FIXED) as made:
        yield made


def tokens(llm, prompts=PROMPTS):
    return [output.outputs[0].token_ids for output in llm.generate(prompts, PARAMS)]


def executor_of(llm):
    return llm._session._engine.loop.executor


def break_ops(llm, fault):
    """Before each op `fault(op, rows)` may raise."""
    tokens(llm, [[1, 2]])  # the engine opens
    executor = executor_of(llm)
    run_op = executor._run_op

    def faulty(op, spec, flow, weights, batch, kv, *, exact):
        fault(op, batch.num_rows)
        run_op(op, spec, flow, weights, batch, kv, exact=exact)

    executor._run_op = faulty


@pytest.mark.parametrize(
    "error, is_full, is_gone",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            True,
            False,
        ),
        (RuntimeError(ILLEGAL), False, True),
        (RuntimeError("CUDA error: unspecified launch failure"), False, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling"), False, True),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 5"), False, False),
        (ValueError("CUDA error"), False, False),
    ],
)
def test_what_torch_raises_is_understood(error, is_full, is_gone):
    assert (is_out_of_memory(error), is_lost(error)) == (is_full, is_gone)
    typed = explained(error, "in a test")
    assert (typed.code if typed else None) == (FULL if is_full else LOST if is_gone else None)
    if typed:
        assert "in a test" in typed.message
        assert "\n" not in typed.message
        assert explained(typed, "again") is None


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_full_device_gets_smaller_passes_and_the_same_answer(kind, llm, caplog):
    want = tokens(llm)
    full = []

    def fault(op, rows):
        if rows > 4 if kind == "prefill" else (1 < rows <= 3 and op.kind == "down"):
            full.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    break_ops(llm, fault)
    with caplog.at_level(logging.WARNING, "zinfer"):
        assert tokens(llm) == want
    assert full, "memory did run out"
    announced = [record for record in caplog.records if "rows at once instead of" in record.getMessage()]
    assert len(announced) == len(full)
    assert len(full) <= 4, "halves: it does not come back in every pass"
    llm._session._engine.manager.check()
    assert tokens(llm) == want


def test_a_device_that_holds_not_one_row_is_one_error_and_the_engine_stays(llm):
    want = tokens(llm)
    is_full = [True]

    def fault(op, rows):
        if is_full[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    is_full[0] = False
    break_ops(llm, fault)
    is_full[0] = True
    with pytest.raises(BudgetError, match=rf"{TOO_FULL}.*not one row"):
        tokens(llm)
    is_full[0] = False  # the other process has ended
    assert tokens(llm) == want


def test_a_lost_device_ends_the_engine_with_one_error(llm):
    is_gone = [False]

    def fault(op, rows):
        if is_gone[0]:
            raise RuntimeError(ILLEGAL)

    want = tokens(llm)
    break_ops(llm, fault)
    is_gone[0] = True
    with pytest.raises(MachineError, match=rf"{LOST}.*illegal memory access") as caught:
        tokens(llm)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert llm._session._engine is None
    assert tokens(llm) == want, "a new engine (in a real process the context stays lost, and opening says so)"


def test_closing_after_a_loss_works_though_everything_refuses(llm, monkeypatch):
    tokens(llm)
    engine = llm._session._engine
    engine.fault = MachineError(LOST, "gone")
    transfer = engine.manager._memory.transfer
    closed = []

    def refuse():
        closed.append(1)
        raise RuntimeError(ILLEGAL)

    monkeypatch.setattr(transfer, "close", lambda close=transfer.close: (close(), refuse()))
    engine.close()
    assert closed
    with pytest.raises(MachineError, match="gone"):
        engine.next_events([])


def test_a_loss_while_tokens_are_drawn(llm, monkeypatch):
    tokens(llm)
    monkeypatch.setattr(loops, "draw", lambda *_: (_ for _ in ()).throw(RuntimeError(ILLEGAL)))
    with pytest.raises(MachineError, match=rf"{LOST}.*drawn"):
        tokens(llm)
    monkeypatch.undo()
    assert tokens(llm)


@pytest.mark.parametrize("where", ["prepare_attention", "_open_cache", "open_manager"])
def test_a_full_device_at_opening_is_one_error_and_nothing_is_left(where, llm, monkeypatch):
    import threading

    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engines, where, full)
    with pytest.raises((BudgetError, torch.OutOfMemoryError)) as caught:
        tokens(llm)
    if where != "open_manager":  # which has errors of its own for every slab
        assert caught.value.code == FULL
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("zinfer-read")]
    monkeypatch.undo()
    assert tokens(llm)


def test_an_error_of_another_kind_stays_what_it_is(llm):
    def fault(op, rows):
        raise RuntimeError("shapes differ")

    tokens(llm)
    executor_of(llm)._run_op = lambda *_, **__: fault(None, 0)
    with pytest.raises(RuntimeError, match="shapes differ"):
        tokens(llm)


def cuda_build(monkeypatch, error, count=0):
    """torch as built for CUDA, on a machine where initialising it raises `error`."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def is_available():
        if error is not None:
            warnings.warn("CUDA initialization: " + error, UserWarning, stacklevel=2)
        return count > 0

    def init():
        if error is not None:
            raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"


@pytest.mark.parametrize(
    "error, code",
    [
        (TOO_OLD, "ZI-5334"),
        ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", "ZI-5333"),
        ("No CUDA GPUs are available", "ZI-5333"),
        ("CUDA driver initialization failed, you might not have a CUDA gpu.", "ZI-5335"),
        ("CUDA unknown error - this may be due to an incorrectly set up environment", "ZI-5335"),
        (None, "ZI-5333"),
    ],
)
def test_why_there_is_no_device(error, code, monkeypatch):
    cuda_build(monkeypatch, error)
    found = visible_devices()
    assert found.count == 0
    assert found.error.code == code
    assert "--device cpu" in found.error.remedy
    assert found.is_disappointing == (code != "ZI-5333")


def test_devices_that_are_there(monkeypatch):
    cuda_build(monkeypatch, None, count=2)
    assert visible_devices() == devices.Devices(2)


def test_this_torch_says_that_it_has_no_cuda(folder):
    if torch.version.cuda is not None:
        pytest.skip("torch is built for CUDA here")
    with pytest.raises(MachineError, match=r"ZI-5333.*without CUDA"):
        LLM(folder, device="cuda", machine="sim-default")


def test_too_old_a_driver_is_an_error_where_a_device_is_asked_for(folder, monkeypatch):
    cuda_build(monkeypatch, TOO_OLD)
    with pytest.raises(MachineError, match=r"ZI-5334.*too old"):
        LLM(folder, device="cuda:0", machine="sim-default")


def test_and_an_announced_fallback_where_the_choice_is_ours(folder, monkeypatch, caplog):
    cuda_build(monkeypatch, TOO_OLD)
    with caplog.at_level(logging.WARNING, "zinfer"), LLM(folder, threads=1) as llm:
        assert llm.plan.device == "cpu"
    assert "too old" in caplog.text


def test_what_another_process_holds_is_not_planned_with(folder, monkeypatch):
    from zinfer.config.profiles import load_machine
    from zinfer.config.schema import parse_settings
    from zinfer.runtime import model

    cuda_build(monkeypatch, None, count=1)
    machine = load_machine("sim-default")
    settings = parse_settings({"device": "cuda"})
    monkeypatch.setattr(model, "free_bytes", lambda index: 100 * 2**20)
    assert model._resolved(settings, machine).device_bytes == 90 * 2**20
    ours = model._resolved(settings, machine, held_device_bytes=100 * 2**20)
    assert ours.device_bytes == 180 * 2**20, "what is ours is free for us"
