"""The streaming product compiled for every target, and what the machine code has to look like to be fast."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from farrier.plugins.gemv import Gemv, GemvTile, candidates
from farrier.plugins.kernel import PDL_CAPABILITY, compile_kernel
from farrier.plugins.weight_form import FP8_CAPABILITY

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
UNTILED = GemvTile(1, 1, 1, 1)
CAPABILITIES = [80, 87, 90]

LLAMA_8B = {
    "qkv": Gemv(1, 6144, 4096, "bf16", "fp32", "bf16", UNTILED, norm_eps=1e-5),
    "o": Gemv(1, 4096, 4096, "bf16", "bf16", "fp32", UNTILED, epilogue="add"),
    "gate_up": Gemv(
        1, 14336, 4096, "bf16", "fp32", "bf16", UNTILED, norm_eps=1e-5, epilogue="gated", activation="silu"
    ),
    "down": Gemv(1, 4096, 14336, "bf16", "bf16", "fp32", UNTILED, epilogue="add"),
    "lm_head": Gemv(1, 128256, 4096, "bf16", "fp32", "fp32", UNTILED, norm_eps=1e-5, row_gather=True),
}
OTHERS = {
    "1b down": Gemv(1, 2048, 8192, "bf16", "bf16", "fp32", UNTILED, epilogue="add"),
    "qwen qkv": Gemv(2, 4608, 3584, "bf16", "fp32", "bf16", UNTILED, norm_eps=1e-6, bias="bf16"),
    "qwen 0.5b gate_up": Gemv(
        1, 4864, 896, "fp16", "fp32", "fp16", UNTILED, norm_eps=1e-6, epilogue="gated", activation="silu"
    ),
    "gemma gate_up": Gemv(
        4, 9216, 2304, "bf16", "fp32", "bf16", UNTILED, norm_eps=1e-6, epilogue="gated", activation="gelu_tanh"
    ),
    "gemma lm_head": Gemv(
        8, 256000, 2304, "bf16", "fp32", "fp32", UNTILED, norm_eps=1e-6, softcap=30.0, row_gather=True
    ),
    "int8": Gemv(1, 4096, 14336, "int8", "bf16", "fp32", UNTILED, epilogue="add"),
    "int4": Gemv(1, 4096, 14336, "int4", "bf16", "fp32", UNTILED, 128, epilogue="add"),
    "int4 with zeros": Gemv(1, 6144, 4096, "int4", "fp32", "bf16", UNTILED, 128, zeros=True, norm_eps=1e-5),
}


def _tiled(variant: Gemv) -> Gemv:
    gated = variant.epilogue == "gated"
    return replace(variant, tile=candidates(variant.rows, variant.n, variant.k, variant.weight, gated)[0])


def _compiled(variant, capability):
    variant = replace(_tiled(variant), pdl=capability >= PDL_CAPABILITY)
    return compile_kernel(variant.source(), capability)


def _tool(name, kernel, folder, *options):
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.cubin)
    return subprocess.run([TOOLS / name, *options, path], capture_output=True, text=True, check=True).stdout


def _stack_bytes(kernel, folder):
    return int(re.search(r"STACK:(\d+)", _tool("cuobjdump", kernel, folder, "--dump-resource-usage"))[1])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", [*LLAMA_8B, *OTHERS])
def test_every_target(name, capability, tmp_path):
    kernel = _compiled((LLAMA_8B | OTHERS)[name], capability)
    assert kernel.shared_bytes <= 4096
    assert _stack_bytes(kernel, tmp_path) == 0


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["gate_up", "down"])
@pytest.mark.parametrize("weight", ["bf16", "fp8"])
def test_rows_without_spills(name, weight, rows, tmp_path):
    kernel = _compiled(replace(LLAMA_8B[name], rows=rows, weight=weight), PDL_CAPABILITY)
    assert _stack_bytes(kernel, tmp_path) == 0


@pytest.mark.parametrize("name", LLAMA_8B)
@pytest.mark.parametrize("weight", ["bf16", "fp8"])
def test_weights_stream(name, weight, tmp_path):
    """Loads of 16 bytes; the first before the wait for the kernel before; no barrier until all are done."""
    kernel = _compiled(replace(LLAMA_8B[name], weight=weight), PDL_CAPABILITY)
    code = re.findall(r"\b(LDG\.\S+|ACQBULK|BAR\.\S+)", _tool("nvdisasm", kernel, tmp_path, "-c"))
    loads = [index for index, operation in enumerate(code) if ".EF" in operation]
    assert {code[index] for index in loads} == {"LDG.E.EF.128"}
    assert loads[0] < code.index("ACQBULK")
    assert not any(operation.startswith("BAR") for operation in code[: loads[-1]])


def test_fp8_needs_its_instructions():
    variant = replace(_tiled(LLAMA_8B["o"]), weight="fp8")
    with pytest.raises(Exception, match="ptxas"):
        compile_kernel(variant.source(), FP8_CAPABILITY - 2)


@pytest.mark.parametrize("weight", ["bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [96, 896, 2048, 2880, 4096, 14336])
def test_there_are_candidates(weight, rows, k):
    tiles = candidates(rows, 4096, k, weight)
    assert 1 <= len(tiles) <= 24
    assert len(set(tiles)) == len(tiles)
