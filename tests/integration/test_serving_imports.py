"""What a serving process has in memory: no torch, no Triton, and no other backend's libraries."""

from pathlib import Path

from farrier.targets.build import BuildOptions, build
from farrier.targets.detect import detect, select_target
from tests.serving import MODULE, client_of, imported, mapped, serving
from tests.small_llama import save_small_llama

FOREIGN = {"torch", "triton", "cuda", "nvmath"}


def test_a_cpu_engine_is_served_without_torch_triton_and_cuda(tmp_path: Path) -> None:
    save_small_llama(tmp_path / "small")
    build(tmp_path / "small", tmp_path / "engine", select_target(detect(), "cpu"), BuildOptions())
    log = tmp_path / "imports"
    traced = [MODULE[0], "-X", "importtime", *MODULE[1:]]
    with serving(tmp_path / "engine", command=traced, log=log) as (process, url), client_of(url) as client:
        answer = client.completions.create(model="small", prompt=[5, 6, 7], max_tokens=4)
        assert answer.usage is not None
        libraries = mapped(process.pid)
    packages = imported(log)
    assert {"farrier", "openvino", "numpy"} <= packages
    assert not packages & FOREIGN
    assert not {name for name in libraries if name.startswith(("libtorch", "libtriton", "libcuda", "libcublas"))}
