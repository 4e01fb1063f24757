"""The few PTX instructions that kernels' inline assembly uses, over numpy arrays of 32-bit registers."""

import re
from typing import Any

import numpy as np

from tests.kernels.interpreter import float8_values


def inline_asm(asm: str, outputs: int, arguments: list[Any], pack: int) -> list[Any]:
    """What `inline_asm_elementwise` gives for 32-bit arguments and results: `outputs` arrays of uint32 bits, each of
    the arguments' common shape. `pack` neighbours along the last dimension go through one run of `asm`."""
    arguments = np.broadcast_arrays(*(np.asarray(argument).view(np.uint32) for argument in arguments))
    shape = arguments[0].shape
    registers: dict[str, Any] = {}
    for index, argument in enumerate(arguments):
        for place in range(pack):
            registers[f"${outputs * pack + index * pack + place}"] = argument[..., place::pack]
    for statement in re.sub(r"//.*|[{}]\s*$|^\s*{", "", asm, flags=re.M).split(";"):
        if statement.strip() and not statement.strip().startswith(".reg"):
            _execute(statement.strip(), registers)
    results = [np.empty(shape, np.uint32) for _ in range(outputs)]
    for index, result in enumerate(results):
        for place in range(pack):
            result[..., place::pack] = registers[f"${index * pack + place}"]
    return results


def _execute(statement: str, registers: dict[str, Any]) -> None:
    operation, _, rest = statement.partition(" ")
    if operation == "mov.b32" and "{" in rest:
        (low, high), source = re.findall(r"\w+", rest.partition("}")[0]), rest.rpartition(",")[2].strip()
        registers[low], registers[high] = registers[source] & 0xFFFF, registers[source] >> 16
        return
    target, *names = (name.strip() for name in rest.split(","))
    operands = [np.uint32(int(name, 0)) if name[0].isdigit() else registers[name] for name in names]
    registers[target] = _OPERATIONS[operation](*operands)


def _halves(register: Any) -> Any:
    """Two fp16 numbers [..., 2] as float64: no operation on them rounds before it is put back."""
    halves = np.stack([register & 0xFFFF, register >> 16], -1).astype(np.uint16)
    return halves.view(np.float16).astype(np.float64)


def _register(halves: Any) -> Any:
    bits = halves.astype(np.float16).view(np.uint16).astype(np.uint32)
    return bits[..., 0] | bits[..., 1] << 16


def _prmt(a: Any, b: Any, selector: Any) -> Any:
    octets = [a >> 8 * i & 255 for i in range(4)] + [b >> 8 * i & 255 for i in range(4)]
    picked = [octets[int(selector) >> 4 * i & 7] << np.uint32(8 * i) for i in range(4)]
    return picked[0] | picked[1] | picked[2] | picked[3]


def _lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    rows = [(a, b, c)[i] if index >> (2 - i) & 1 else ~(a, b, c)[i] for index in range(8) for i in range(3)]
    cases = [rows[3 * index] & rows[3 * index + 1] & rows[3 * index + 2] for index in range(8) if table >> index & 1]
    return np.bitwise_or.reduce(np.broadcast_arrays(*cases))


_OPERATIONS = {
    "mov.b32": lambda a: a,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "sub.rn.f16x2": lambda a, b: _register(_halves(a) - _halves(b)),
    "mul.rn.f16x2": lambda a, b: _register(_halves(a) * _halves(b)),
    "fma.rn.f16x2": lambda a, b, c: _register(_halves(a) * _halves(b) + _halves(c)),
    "cvt.f32.f16": lambda a: _halves(a)[..., 0].astype(np.float32).view(np.uint32),
    "cvt.rn.f16x2.f32": lambda high, low: _register(np.stack([low, high], -1).view(np.float32)),
    "cvt.rn.f16x2.e4m3x2": lambda a: _register(float8_values(np.stack([a & 255, a >> 8 & 255], -1))),
}
