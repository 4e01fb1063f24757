"""Token ids to rows of the embedding table."""

from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from farrier.plugins.kernel import KernelSource, PerRows, Variant
from farrier.plugins.rowwise import block_of, warps_for


@dataclass(frozen=True)
class Embedding(Variant):
    """Copies the table's row of each token, times `multiplier`, into the fp32 residual stream.

    Arguments: token_ids i32 `[T]`, previous i32 (what each row of the previous step sampled), table
    `[vocab_size, hidden]`, residual fp32 `[T, hidden]`. A negative id −1−r means `previous[r]`; an id that is in no
    vocabulary reads row 0.
    """

    vocab_size: int
    hidden: int
    table_type: str
    multiplier: float = 1.0
    pdl: bool = False

    def source(self) -> KernelSource:
        return KernelSource(
            _embedding,
            {"token_ids": "*i32", "previous": "*i32", "table": f"*{self.table_type}", "residual": "*fp32"},
            {
                "VOCAB": self.vocab_size,
                "WIDTH": self.hidden,
                "BLOCK": block_of(self.hidden),
                "MULTIPLIER": self.multiplier,
                "PDL": self.pdl,
            },
            num_warps=warps_for(self.hidden),
            pdl=self.pdl,
        )

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (PerRows(),)


@triton.jit
def _embedding(
    token_ids,
    previous,
    table,
    residual,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0)
    id_ = tl.load(token_ids + token)
    if PDL:
        gdc_wait()
    if id_ < 0:
        id_ = tl.load(previous - 1 - id_)
    id_ = tl.where((id_ >= 0) & (id_ < VOCAB), id_, 0)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(table + id_.to(tl.int64) * WIDTH + columns, inside, other=0)
    tl.store(residual + token.to(tl.int64) * WIDTH + columns, x.to(tl.float32) * MULTIPLIER, inside)
