"""The rules of the architecture that import-linter cannot see: who may name what.

Each rule is a row: a pattern over dotted names, and the places where such a name is at home.  A name counts
wherever it is mentioned (import, attribute, call, keyword, `getattr` text), under whatever alias.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import size_report

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Rule:
    """Names that match `pattern` may stand only in files under `homes`."""

    pattern: re.Pattern[str]
    homes: tuple[str, ...] = ()

    def holds(self, place: str, name: str) -> bool:
        return place.startswith(self.homes) or not self.pattern.search(name)


RULES = {
    "streams, events and pinning": Rule(
        re.compile(
            r"^torch\.(cuda\.)?(Stream|Event|ExternalStream|stream|current_stream|default_stream|set_stream)$"
            r"|^torch\.(cuda|accelerator)\.synchronize$|^torch\.cuda\.(streams|cudart)\b"
            r"|^torch\.cuda\.(CUDAGraph|graph\w*|make_graphed_callables)$"
            r"|(^|\.)(synchronize|pin_memory|is_pinned|(record|wait)_(stream|event)|cudaHost\w+)$"
        ),
        homes=("zinfer/memory/", "zinfer/runtime/graph.py", "zinfer/runtime/captured.py"),
    ),
    "torch.distributed": Rule(re.compile(r"^torch\.distributed\b"), homes=("zinfer/parallel/collective.py",)),
    "opening weight files": Rule(
        re.compile(
            r"(^|\.)(preadv2?|O_DIRECT|safe_open)$|^safetensors\.(\w+\.)?(load|load_file|deserialize)$"
        ),
        homes=("zinfer/checkpoint/read.py", "zinfer/chunks/store.py", "zinfer/memory/nvme.py"),
    ),
    "printing and exiting": Rule(
        re.compile(r"^(print|exit|quit|SystemExit|sys\.(stdout|exit|__stdout__)|os\._exit)$"),
        homes=("zinfer/cli/", "zinfer/__main__.py"),
    ),
    "the environment": Rule(
        re.compile(r"^os\.(environb?|getenvb?|putenv)$"), homes=("zinfer/config/load.py",)
    ),
    "unpickling and running strings": Rule(
        re.compile(
            r"^(_?pickle|cPickle|cloudpickle|dill|joblib|marshal|runpy|shelve)\b"
            r"|^torch\.(jit\.)?load$|^torch\.(hub|package)\b|(^|\.)(allow_pickle|trust_remote_code)$"
            r"|^(builtins\.)?(exec|eval|compile|__import__)$"
        )
    ),
    "importing by name": Rule(
        re.compile(r"^importlib(?!\.(resources|metadata)\b)"),
        homes=("zinfer/__init__.py", "zinfer/cli/main.py"),
    ),
}


def aliases(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for: {'nn': 'torch.nn'}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`cuda.Stream` -> 'torch.cuda.Stream'; '?' stands for what is no name, such as the result of a call."""
    match node:
        case ast.Name(id=name):
            return names.get(name, name)
        case ast.Attribute(value=owner, attr=attr):
            return f"{dotted(owner, names)}.{attr}"
    return "?"


def mentions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) for every name that a source text speaks of."""
    names = aliases(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom(module=module, level=0):
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            case ast.Name(ctx=ast.Load()) | ast.Attribute():
                yield node.lineno, dotted(node, names)
            case ast.keyword(arg=str(name)):
                yield node.value.lineno, name
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(name)), *_]):
                yield node.lineno, f"{dotted(owner, names)}.{name}"


def violations(place: str, text: str) -> list[str]:
    """The names in `text` that may not stand in `place`, a path relative to the repository."""
    return [
        f"{place}:{line}: {name} ({rule_name})"
        for line, name in mentions(ast.parse(text))
        for rule_name, rule in RULES.items()
        if not rule.holds(place, name)
    ]


def test_names_stand_only_where_they_are_at_home():
    found = [
        violation
        for path in sorted((ROOT / "zinfer").rglob("*.py"))
        for violation in violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


PLANTED = [
    ("streams, events and pinning", "import torch\ns = torch.cuda.Stream()"),
    ("streams, events and pinning", "from torch.cuda import Stream as S"),
    ("streams, events and pinning", "from torch import cuda\ne = cuda.Event(enable_timing=True)"),
    ("streams, events and pinning", "import torch.cuda as tc\nwith tc.stream(s): pass"),
    ("streams, events and pinning", "import torch\ntorch.cuda.synchronize()"),
    ("streams, events and pinning", "event.synchronize()"),
    ("streams, events and pinning", "x = make().pin_memory()"),
    ("streams, events and pinning", "import torch\nx = torch.empty(8, pin_memory=True)"),
    ("streams, events and pinning", "import torch\ntorch.cuda.cudart().cudaHostRegister(p, n, 0)"),
    ("streams, events and pinning", "f = getattr(lib, 'cudaHostRegister')"),
    ("streams, events and pinning", "x.record_stream(s)"),
    ("streams, events and pinning", "import torch\ng = torch.cuda.CUDAGraph()"),
    ("streams, events and pinning", "import torch\nwith torch.cuda.graph(g): pass"),
    ("torch.distributed", "import torch.distributed as dist"),
    ("torch.distributed", "from torch import distributed"),
    ("torch.distributed", "def f():\n    from torch.distributed import all_reduce"),
    ("torch.distributed", "import torch\ntorch.distributed.barrier()"),
    ("opening weight files", "import os\nfd = os.open(p, os.O_RDONLY | os.O_DIRECT)"),
    ("opening weight files", "from safetensors import safe_open"),
    ("opening weight files", "import safetensors.torch as st\nst.load_file(p)"),
    ("printing and exiting", "print('hello')"),
    ("printing and exiting", "import sys\nsys.stdout.write('hello')"),
    ("printing and exiting", "from sys import exit"),
    ("printing and exiting", "raise SystemExit(2)"),
    ("the environment", "import os\nx = os.environ['HOME']"),
    ("the environment", "from os import getenv as g"),
    ("unpickling and running strings", "import pickle"),
    ("unpickling and running strings", "from pickle import loads"),
    ("unpickling and running strings", "import torch as t\nt.load(path)"),
    ("unpickling and running strings", "from torch import load"),
    ("unpickling and running strings", "import numpy as np\nnp.load(p, allow_pickle=True)"),
    ("unpickling and running strings", "eval(text)"),
    ("unpickling and running strings", "exec(text)"),
    ("unpickling and running strings", "__import__(name)"),
    ("importing by name", "import importlib\nimportlib.import_module(name)"),
    ("importing by name", "from importlib import import_module"),
    ("importing by name", "import importlib.util"),
]


@pytest.mark.parametrize(("rule", "text"), PLANTED)
def test_a_planted_violation_is_caught(rule, text):
    assert any(found.endswith(f"({rule})") for found in violations("zinfer/chunks/pack.py", text))
    for home in RULES[rule].homes:
        place = home if home.endswith(".py") else f"{home}part.py"
        assert not any(found.endswith(f"({rule})") for found in violations(place, text))


def test_every_rule_has_a_planted_violation():
    assert {rule for rule, _ in PLANTED} == set(RULES)


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "import re\nre.compile('x')",
        "import torch\ntorch.compile(f)",
        "import importlib.resources",
        "from importlib import metadata",
        "import torch\nn = torch.cuda.device_count()",
        "from . import load\nload.settings()",
        "'''print, pickle, torch.cuda.Stream: words in prose'''",
    ],
)
def test_what_only_looks_alike_is_let_through(text):
    assert violations("zinfer/chunks/pack.py", text) == []


MISSHAPEN = {
    "no module docstring": "x = 1",
    "lines, the limit is 400": '"""Doc."""\n' + "x = 1\n" * 400,
    "f has 82 lines, the limit is 80": '"""Doc."""\ndef f() -> None:\n' + "    x = 1\n" * 81,
    "f leaves untyped: a, return": '"""Doc."""\ndef f(a): pass',
    "f leaves untyped: args, kwargs": '"""Doc."""\ndef f(*args, **kwargs) -> None: pass',
    "g leaves untyped: b": '"""Doc."""\nclass C:\n    def g(self, b) -> None: pass',
    "h leaves untyped: a": '"""Doc."""\nclass C:\n    @staticmethod\n    def h(a) -> None: pass',
    "global x": '"""Doc."""\ndef f() -> None:\n    global x',
    "print outside zinfer/cli": '"""Doc."""\nprint(1)',
    "os.environ outside zinfer/config/load.py": '"""Doc."""\nimport os\nos.environ["A"]',
    "os.getenv outside zinfer/config/load.py": '"""Doc."""\nfrom os import getenv',
    "assert without a message": '"""Doc."""\nassert x',
    "TODO in product code": '"""Doc."""\nx = 1  # TODO: more',
    "NotImplementedError in product code": '"""Doc."""\nraise NotImplementedError',
}


@pytest.mark.parametrize(("breach", "text"), MISSHAPEN.items(), ids=list(MISSHAPEN))
def test_the_size_report_sees_a_planted_breach(breach, text):
    found = size_report.measure(size_report.PurePosixPath("zinfer/chunks/pack.py"), text).breaches
    assert len(found) == 1
    assert breach in found[0]


@pytest.mark.parametrize("place", ["zinfer/utils/pack.py", "zinfer/chunks/helpers.py"])
def test_the_size_report_refuses_names_that_name_nothing(place):
    found = size_report.measure(size_report.PurePosixPath(place), '"""Doc."""').breaches
    assert len(found) == 1
    assert "names nothing" in found[0]


def test_the_size_report_lets_well_shaped_code_through():
    text = '"""Doc."""\nclass C:\n    """A class."""\n    def f(self, *, a: int) -> int:\n        return a\n'
    shape = size_report.measure(size_report.PurePosixPath("zinfer/chunks/pack.py"), text)
    assert (shape.breaches, shape.class_docs, shape.slots, shape.typed) == ([], 1, 2, 2)
