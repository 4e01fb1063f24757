import numpy as np
import pytest

from farrier.plugins.reference import attention as reference
from farrier.plugins.rope import RopeAppend
from tests.kernels.paged import TYPES, rotary_tables


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim", "eps", "qkv_type", "act_type", "kv_type"),
    [
        (4, 1, 64, 64, None, "bf16", "bf16", "bf16"),
        (6, 2, 96, 96, None, "bf16", "bf16", "fp8e4nv"),
        (3, 3, 80, 32, 1e-6, "fp32", "fp16", "fp16"),
        (7, 1, 128, 128, 1e-6, "bf16", "bf16", "bf16"),
        (2, 1, 256, 256, None, "fp16", "fp16", "fp8e4nv"),
        (2, 2, 32, 12, 1e-5, "fp32", "bf16", "bf16"),
    ],
)
def test_rotates_and_appends(run, heads, kv_heads, head_dim, rotary_dim, eps, qkv_type, act_type, kv_type):
    random = np.random.default_rng(0)
    positions = np.array([0, 5, 90, 33, 0], np.int32)
    slots = np.array([64, 5, 95, 31, -1], np.int32)
    encode_qkv, decode_qkv = TYPES[qkv_type]
    qkv = encode_qkv(random.normal(size=(5, (heads + 2 * kv_heads) * head_dim)))
    cos, sin = rotary_tables(100, rotary_dim)
    norms = [random.uniform(0.5, 1.5, head_dim).astype(np.float32) for _ in range(2)] if eps else []
    encode_kv, decode_kv = TYPES[kv_type]
    pools = [encode_kv(np.full((4, kv_heads, 32, head_dim), 7.0)) for _ in range(2)]
    q_out = TYPES[act_type][0](np.full((5, heads * head_dim), 7.0))

    variant = RopeAppend(heads, kv_heads, head_dim, rotary_dim, eps, qkv_type, act_type, kv_type)
    run(variant.source(), variant.grid(5), qkv, positions, slots, cos, sin, *norms, q_out, *pools)

    q, k, v = reference.rope_qkv(
        decode_qkv(qkv), positions, cos, sin, heads, kv_heads, (*norms, eps) if eps is not None else None
    )
    # one rounding to the result's type: 2^-9 relative for bf16, 2^-4 for e4m3
    got = TYPES[act_type][1](q_out)
    np.testing.assert_allclose(got[:4], q.reshape(5, -1)[:4], rtol=2**-8, atol=1e-5)
    np.testing.assert_array_equal(got[4], 7.0)
    untouched = np.ones((4, 32), bool)
    for token, slot in enumerate(slots[:4]):
        untouched[slot // 32, slot % 32] = False
        for pool, expected in zip(pools, (k, v), strict=True):
            stored = decode_kv(pool)[slot // 32, :, slot % 32]
            exact = 2**-4 if kv_type == "fp8e4nv" else 2**-8
            np.testing.assert_allclose(stored, expected[token], rtol=exact, atol=2**-9)
    for pool in pools:
        assert (decode_kv(pool).swapaxes(1, 2)[untouched] == 7.0).all()


def test_fp8_pool_rounds_to_nearest_even_and_saturates(run):
    variant = RopeAppend(1, 1, 32, 2, qkv_type="fp32", kv_type="fp8e4nv")
    values = np.zeros(32, np.float32)
    values[:10] = [1e4, -1e4, 460.0, 1.0625, 1.1875, -1.0625, 2**-10, 3 * 2**-10, 0.1, 447.0]
    qkv = np.concatenate([np.zeros(64, np.float32), values])[None]
    pools = [np.zeros((1, 1, 32, 32), np.uint8) for _ in range(2)]
    cos, sin = rotary_tables(1, 2)
    zero = np.zeros(1, np.int32)
    run(variant.source(), variant.grid(1), qkv, zero, zero, cos, sin, np.zeros((1, 32), np.uint16), *pools)
    expected = [448.0, -448.0, 448.0, 1.0, 1.25, -1.0, 0.0, 2**-8, 0.1015625, 448.0]
    np.testing.assert_array_equal(TYPES["fp8e4nv"][1](pools[1])[0, 0, 0, :10], expected)
