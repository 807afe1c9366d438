"""Students on a real device: recorded passes against their eager twin and against the CPU; nothing moves."""

import pytest
import torch
from encoder_oracle import pack
from student_groups import COUNT, make_group, write_group_folder

from zinfer import Classifier
from zinfer.students.bank import StudentBank
from zinfer.students.fixed import BUCKETS
from zinfer.students.spread import CopyingCollective, SpreadBank

pytestmark = pytest.mark.gpu
SIZES = ((5, 17, 1, 9), (3,), (16,), (40,) * 7, tuple(range(1, 33)))


def texts(lengths):
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(3, 97, (length,), generator=draw).tolist() for length in lengths]


def test_replayed_eager_and_host_passes_agree_and_no_weight_moves():
    host, bank = StudentBank(make_group()), StudentBank(make_group(), "cuda:0")
    eager = {(lengths, m): bank.answer(pack(texts(lengths)), m) for lengths in SIZES for m in (1, 2, COUNT)}
    assert bank.replays.num_replayed == 0
    bank.warm_up(range(1, COUNT + 1), [one for one in BUCKETS if one.rows <= 256])
    places = {name: tensor.data_ptr() for name, tensor in bank.stacked.items()}
    allocated = torch.cuda.memory_allocated()
    for _ in range(3):
        for (lengths, m), (rows, logits) in eager.items():
            ours, our_logits = bank.answer(pack(texts(lengths)), m)
            slow, slow_logits = host.answer(pack(texts(lengths)), m)
            assert (ours - rows).abs().max() <= 1e-4
            assert (our_logits - logits).abs().max() <= 1e-4
            assert (ours - slow).abs().max() <= 1e-3
            assert (our_logits - slow_logits).abs().max() <= 1e-3
    assert bank.replays.num_replayed > 0
    assert {name: tensor.data_ptr() for name, tensor in bank.stacked.items()} == places
    assert torch.cuda.memory_allocated() == allocated, "passes leave nothing behind"
    wrong, _ = bank.answer(pack(texts(SIZES[0])), 1)
    assert (wrong - eager[SIZES[0], COUNT][0].cpu()).abs().max() > 0.1, (
        "the mutation: another prefix is noticed"
    )


def test_a_group_serves_from_the_device_within_its_budget(tmp_path):
    folder = write_group_folder(tmp_path / "group")
    with (
        Classifier(folder, device="cuda:0", memory={"device": "1GiB"}) as classifier,
        Classifier(folder, device="cpu", machine="sim-default") as host,
    ):
        assert classifier.engine.ledger.reserved["students"] >= classifier.engine.bank.nbytes
        assert abs(classifier.embed(["the fox", "a dog"]) - host.embed(["the fox", "a dog"])).max() <= 1e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices_answer_as_one():
    spread = SpreadBank(make_group(), ["cuda:0", "cuda:1"], CopyingCollective())
    bank = StudentBank(make_group(), "cuda:0")
    for m in (1, 2, COUNT):
        one, two = (where.answer(pack(texts(SIZES[0])), m)[0] for where in (bank, spread))
        assert (one - two).abs().max() <= 1e-4
