"""What holds for every test: fixed seeds, no network, and a GPU test that cannot run says so."""

import os
import random
import socket
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

# Before any test imports a library that reads them.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

# Without a device Triton's kernels run in its interpreter, which must be known before triton is imported.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"

# Nothing is read from, or left in, the user's cache; what is found once serves the whole session.
_cache = tempfile.TemporaryDirectory(prefix="zinfer-tests-")
os.environ["ZINFER_CACHE"] = _cache.name

# The same examples in every run, however slowly they are drawn; others with --hypothesis-profile=explore.
_slow = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=50, derandomize=True, suppress_health_check=_slow
)
hypothesis.settings.register_profile("explore", hypothesis.settings.get_profile("ci"), derandomize=False)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _fixed_seeds():
    """Same random numbers in every run and order; a library that nobody imported is left alone."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def _is_loopback(address):
    if not isinstance(address, tuple):  # a Unix socket's path
        return True
    host = address[0]
    return host in {"", "::1", "localhost"} or host.startswith("127.")


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    """A connection to anywhere but this machine raises."""

    def guarded(connect):
        def checked(self, address):
            if not _is_loopback(address):
                raise RuntimeError(f"a test tried to connect to {address}: tests use no network")
            return connect(self, address)

        return checked

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        yield


def _why_no_gpu():
    """The reason why tests marked `gpu` cannot run here, or None."""
    try:
        import torch
    except ImportError as error:
        return f"needs a GPU: torch cannot be imported ({error})"
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return f"needs a GPU: torch {torch.__version__} ({build}) sees none"
    return None


def pytest_collection_modifyitems(items):
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and (reason := _why_no_gpu()):
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def one_thread():
    """Tiny products only lose by a second thread, most of all on a busy machine."""
    import torch  # not before a test needs it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["matrix unit", "vector unit"])
def unit(request):
    """Compiled kernels of a processor that has both on either; the vector unit's are everybody's."""
    from zinfer.kernels.native.calls import kernels

    if (found := kernels()) is None:
        pytest.skip("no C compiler here")
    if request.param == "matrix unit" and not found.has_amx:
        pytest.skip("no AMX here")
    found.allow_amx(request.param == "matrix unit")
    yield request.param
    found.allow_amx(True)


@pytest.fixture
def torch_kernels():
    """Torch does the work, also where kernels could be compiled."""
    from zinfer.kernels import quant

    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo what it patches itself
        for module in (
            "kernels.columns",
            "kernels.lossless",
            "kernels.products",
            "kernels.quant",
            "kernels.row_kernels",
            "layers.tiles",
        ):
            patch.setattr(f"zinfer.{module}.kernels", lambda: None)
        quant.has_kernel.cache_clear()
        yield
    quant.has_kernel.cache_clear()
