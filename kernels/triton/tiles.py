"""What a program of an elementwise kernel owns: some rows, and a span of each.

A span is of columns, or of the bytes or groups that belong to them; programs follow each other
along rows on axis 0 and within them on axis 1.
"""

import triton
import triton.language as tl


@triton.jit
def program_rows(rows, ROWS: tl.constexpr):
    """Numbers of the program's rows, int64 [ROWS, 1], and which of them there are."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return row.to(tl.int64)[:, None], (row < rows)[:, None]


@triton.jit
def program_span(count, row_inside, SIZE: tl.constexpr):
    """Its places among `count` of a row, int32 [1, SIZE], and which there are, [ROWS, SIZE]."""
    place = tl.program_id(1) * SIZE + tl.arange(0, SIZE)[None, :]
    return place, row_inside & (place < count)
