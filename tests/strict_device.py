"""A device that is not there and forgives nothing: what a pass must not do to a real one raises.

Tensors of torch's "meta" device have no bytes, so that whatever a host would have to wait for (item, tolist, nonzero, a
copy down, a mask as an index, `if tensor`) cannot be answered, and operands on two devices cannot be combined.  What
meta would forgive and CUDA would wait for, copies up and host tensors as indices, is refused here, unless
memory.upload does it.
"""

import sys
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

META = torch.device("meta")
_FACTORIES = {torch.tensor, torch.as_tensor}
_MOVES = {torch.Tensor.to, torch.Tensor.copy_}
_INDEXED = {
    torch.Tensor.__getitem__,
    torch.Tensor.__setitem__,
    torch.Tensor.index_select,
    torch.Tensor.index_copy_,
    torch.index_select,
}
_DOWN = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.cpu,
    torch.Tensor.numpy,
    torch.Tensor.nonzero,
    torch.nonzero,
    torch.equal,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
}


class WaitsError(Exception):
    """The host would wait for the device here."""


class StrictDevice(TorchFunctionMode):
    """Refuses what makes the host wait; `num_uploads` counts what went up the right way."""

    def __init__(self):
        super().__init__()
        self.num_uploads = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_upload = _is_called_by_upload()
        if function in _FACTORIES and _is_meta(kwargs.get("device")):
            raise WaitsError(f"{function.__name__}(..., device=): a copy from pageable memory")
        if function in _DOWN and any(_lies_there(x) for x in args):
            raise WaitsError(function.__name__)
        if function in _INDEXED and _lies_there(args[0]):
            for index in _flat(args[1:]):
                if isinstance(index, torch.Tensor) and index.dim() and not _lies_there(index):
                    raise WaitsError(f"{function.__name__} with an index of the host")
                if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
                    raise WaitsError(f"{function.__name__} with a mask")
        if function in _MOVES:
            goes_up = not _lies_there(args[0]) and any(
                _is_meta(x) for x in _flat((*args[1:], *kwargs.values()))
            )
            if function is torch.Tensor.copy_:
                goes_up = _lies_there(args[0]) and not _lies_there(args[1])
            if goes_up and not is_upload:
                raise WaitsError(f"{function.__name__}: a copy up beside memory.upload")
            self.num_uploads += goes_up
        return function(*args, **kwargs)


@contextmanager
def strict():
    """Within it the rules above hold."""
    with StrictDevice() as device:
        yield device


def _is_called_by_upload():
    frame = sys._getframe(2)
    return frame.f_code.co_filename.endswith("memory/upload.py")


def _is_meta(x):
    if isinstance(x, torch.Tensor):
        return x.device == META
    return isinstance(x, str | torch.device) and torch.device(x) == META


def _lies_there(x):
    return isinstance(x, torch.Tensor) and x.device == META


def _flat(values):
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value
