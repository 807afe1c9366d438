"""Compile every Triton kernel for a GPU that is not there; prints one line per kernel, raises where one is refused.

usage: compile_kernels.py CAPABILITY DTYPE [planted]      for example 90 bf16; `planted`: a kernel that is refused

The interpreter forgives what the compiler does not.  Triton brings its own assembler, so no CUDA is needed.  Run in a
process of its own: where kernels are interpreted they cannot be compiled.
"""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from zinfer.kernels.jit import paged, quant, rows

WORDS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


@triton.jit
def planted(x: tl.tensor, BLOCK: tl.constexpr):
    """A tile of 12 elements, which is no power of two."""
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at))


def cases(dtype):
    """(kernel, types of what is passed, constants): with and without each branch."""
    x, operand = f"*{dtype}", WORDS[dtype]
    integers, numbers = ["*i32", "*i32"], ["fp32", "fp32", "i32", "i32", "i32"]
    for is_int8 in (False, True):
        kv = "*i8" if is_int8 else x
        sums = ("*fp32", "*fp32", "*fp32") if is_int8 else (x, "*i32", "*i32")
        yield (
            paged.attend_pages,
            [x, kv, kv, *(("*fp32", "*fp32") if is_int8 else (kv, kv)), *integers, *sums, *numbers],
            {"HEADS": 6, "KV_HEADS": 2, "DIM": 80, "PAGE": 16, "BLOCK_G": 16, "BLOCK_D": 128, "BLOCK_N": 64}
            | {"OPERAND": operand, "HAS_SCALES": is_int8, "HAS_CAP": is_int8, "IS_WHOLE": not is_int8},
        )
        panels = {"GROUP": 64, "HALF": 32, "IS_INT8": is_int8}
        if dtype != "fp32":
            yield (
                quant.multiply_panels,
                [x, "*u8", "*u8", "*bf16", "*fp32", "i32", "i32", "i32", "i32"],
                panels | {"BLOCK_M": 16, "OPERAND": operand},
            )
        yield quant.unpack_panels, ["*u8", "*u8", "*bf16", "*bf16", "i32", "i32"], panels
    yield paged.merge_splits, ["*fp32", "*fp32", "*fp32", x, "i32"], {"DIM": 80, "BLOCK_D": 128, "BLOCK_S": 4}
    yield quant.add_splits, ["*fp32", x, "i32", "i32", "i32", "i32"], {"BLOCK": 1024}
    yield rows.norm_rows, [x, x, x, "fp32", "i32"], {"BLOCK": 4096}
    turned = {"DIM": 80, "HALF": 20, "BLOCK_H": 8, "BLOCK_D": 128}
    yield rows.rotate_rows, [x, x, x, x, "i32", "i32", "i32"], turned
    yield rows.gate_rows, [x, x, x, "i32", "i32", "i32"], {"BLOCK": 1024}
    yield rows.multiply_row, [x, x, x, "i32", "i32"], {"BLOCK_O": 8, "BLOCK_I": 512}


def compiled(kernel, types, constants, target):
    """The kernel for one signature; a whole number that is 1 is a constant to Triton, so both are tried."""
    runtime = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(runtime, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    ones = {name: 1 for name in runtime if signature[name] == "i32"}
    whole = triton.compile(source(kernel, signature, constants), target=target)
    lowered(source(kernel, signature | dict.fromkeys(ones, "constexpr"), constants | ones), target)
    return whole


def source(kernel, signature, constants):
    ordered = {name: signature[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(fn=kernel, signature=ordered, constexprs=places)


def lowered(case, target):
    """Only to Triton's own first form, where types are checked."""
    from triton._C.libtriton import ir

    backend = make_backend(target)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    return case.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )


if __name__ == "__main__":
    bad = [(planted, ["*fp32"], {"BLOCK": 12})]
    for kernel, types, constants in bad if "planted" in sys.argv else cases(sys.argv[2]):
        made = compiled(kernel, types, constants, GPUTarget("cuda", int(sys.argv[1]), 32))
        print(kernel.__name__, len(made.asm["cubin"]) > 0)
