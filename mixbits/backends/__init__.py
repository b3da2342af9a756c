"""Where operations run. `reference`, `cpu`, `triton` and `cuda` have functions for `mixbits.ops`:

    why_unavailable() -> str | None        None when usable, else one sentence
    supports(device) -> bool
    holds(fmt) -> bool                     whether it has code for a format; else `mixbits.ops`
                                           asks the next best, and never this one
    decodes(fmt) -> bool                   optional: whether it dequantizes and multiplies packed
                                           weights in `fmt`, which it may not be able to make
    fake_quantize(x, fmt), quantize_pack(weight, fmt), dequantize(packed, fmt, in_features, dtype)
    fisher_statistics(weight, row_weight, column_weight, formats)
    gradient_statistics(weight, gradient, formats)
    packed_matmul(x, operand), or, to do several at a time,
    packed_matmuls(x, operands, int8_activations)
    TAKES_PARTS                            optional: whether packed_matmul takes every regular
                                           `Operand`; else its parts are multiplied one by one
    square_sums(x, formats)                optional: else made of fake_quantize
    compensate_group(group, factor, importance, fmt, divisor, known)
                                           optional: else that of mixbits.formats.compensate
    explain_matmul(fmt, m, n, k, dtype)    optional: which way a product would take, in words

Tensors arrive checked, contiguous and on one device. What an operation means is said once, in
`mixbits.formats.reference`.
"""
