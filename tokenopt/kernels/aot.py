"""Kernels compiled to PTX without a GPU, to be embedded where there is no Python: a TensorRT plugin, a C++ program."""

from __future__ import annotations

import re
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Ptx(NamedTuple):
    """A compiled kernel.

    text: PTX.
    name: of its entry.
    shared: bytes of dynamic shared memory to launch it with.
    num_warps: of 32 threads, per program.
    """

    text: str
    name: str
    shared: int
    num_warps: int


def ptx(
    kernel: triton.JITFunction,
    signature: dict[str, str],
    constants: dict[str, object],
    capability: int,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    ptx_version: int | None = None,
) -> Ptx:
    """Compiles a kernel for compute capability 80, 89, 90, 100, ...; ptxas has assembled what is returned.

    The entry takes the arguments in signature, in the kernel's order, and no others: the pointers to scratch memory
    that Triton adds at the end are removed where they are not used.

    Args:
        kernel: decorated with triton.jit, outside of the interpreter.
        signature: the type of each argument that is passed at launch, e.g. "*fp16" or "i32"; "*fp16:16" and "i32:16"
            promise a multiple of 16.
        constants: the value of every other argument; None for a pointer that is absent.
        capability: 90 and above give PTX for that architecture only (sm_90a).
        ptx_version: 87 for PTX 8.7; by default the newest that ptxas knows, which an older driver refuses.

    Raises:
        ValueError: an argument is in neither or both of signature and constants, or the kernel needs scratch memory.
    """
    names = kernel.arg_names
    if set(names) != signature.keys() | constants.keys() or signature.keys() & constants.keys():
        raise ValueError(f"{kernel.__name__} takes {names}, each as an argument or as a constant")
    types = {name: signature[name].split(":")[0] if name in signature else "constexpr" for name in names}
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature.get(name, "").endswith(":16")}
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if ptx_version is not None:
        options["ptx_version"] = ptx_version
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # paths of this machine have no place in an engine
        compiled = triton.compile(
            ASTSource(kernel, types, constants, hints), target=GPUTarget("cuda", capability, 32), options=options
        )
    if getattr(compiled.metadata, "global_scratch_size", 0) or getattr(compiled.metadata, "profile_scratch_size", 0):
        raise ValueError(f"{kernel.__name__} needs scratch memory, which only Triton's own launcher provides")
    text = _without_scratch(compiled.asm["ptx"], len(signature))
    return Ptx(text, compiled.metadata.name, compiled.metadata.shared, compiled.metadata.num_warps)


def _without_scratch(text: str, arguments: int) -> str:
    """Removes the parameters of the entry after the first `arguments`, none of which the body may use."""
    head, rest = text.split(".visible .entry ", 1)
    entry, body = re.fullmatch(r"(\w+\([^)]*\))(.*)", rest, re.DOTALL).groups()
    name, parameters = entry.rstrip(")").split("(", 1)
    kept = [parameter.strip() for parameter in parameters.split(",")][:arguments]
    if re.search(rf"{name}_param_({'|'.join(map(str, range(arguments, arguments + 8)))})\b", body):
        raise ValueError(f"{name} uses an argument that it is not given")
    return f"{head}.visible .entry {name}(\n\t" + ",\n\t".join(kept) + f"\n){body}"
