"""cuBLASLt products, eager and inside a captured graph, against numpy."""

import numpy as np
import pytest

from farrier.targets.bfloat16 import from_bfloat16, to_bfloat16


@pytest.mark.parametrize(("accumulate", "has_bias"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_product(rows: int, accumulate: bool, has_bias: bool):
    from cuda.bindings import driver

    from farrier.targets.cuda.device import Array, DeviceMemory, check, open_device
    from farrier.targets.cuda.library import Library

    device = open_device()
    memory = DeviceMemory()
    stream = device.create_stream()
    rng = np.random.default_rng(0)
    n, k = 96, 256
    x, weight = (to_bfloat16(rng.standard_normal(shape).astype(np.float32)) for shape in ((rows, k), (n, k)))
    out_type = "fp32" if accumulate else "bf16"
    bias = to_bfloat16(rng.standard_normal(n).astype(np.float32))
    out = np.ones((rows, n), np.float32) if accumulate else np.zeros((rows, n), np.uint16)

    def sent(values, type_):
        address = memory.allocate(values.nbytes)
        check(driver.cuMemcpyHtoD(address, values.ctypes.data, values.nbytes))
        return Array(address, type_, values.shape)

    arrays = sent(x, "bf16"), sent(weight, "bf16"), sent(bias, "bf16") if has_bias else None, sent(out, out_type)
    library = Library(memory)
    library.multiply(*arrays, rows, accumulate=accumulate, stream=stream)
    stream.sync()
    builder = stream.create_graph_builder()
    builder.begin_building()
    library.multiply(*arrays, rows, accumulate=accumulate, stream=builder.stream)
    graph = builder.end_building().complete()
    graph.launch(stream)
    stream.sync()
    check(driver.cuMemcpyDtoH(out.ctypes.data, arrays[3].address, out.nbytes))
    library.close()
    memory.close()
    expected = from_bfloat16(x) @ from_bfloat16(weight).T
    if has_bias:
        expected += from_bfloat16(bias)
    if accumulate:
        expected = 1 + 2 * expected
    got = out if accumulate else from_bfloat16(out)
    np.testing.assert_allclose(got, expected, rtol=1e-2, atol=0.1)  # bf16 keeps eight bits
