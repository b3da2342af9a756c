"""Packed models in the formats of other engines: `python -m mixbits.export`.

    packed              a packed folder, read tensor by tensor
    compressed_tensors  transformers and vLLM, through compressed-tensors
    auto_round          transformers, through auto-round
    gguf                llama.cpp; gguf_tokenizer is its vocabulary, gguf_special its special tokens
    plain               whatever loads the original: 16 bits again

What each can hold is in `mixbits.export.targets`. Codes and scales are carried over as they are, in
another order of bytes; with `--lossy`, what a target cannot hold is rounded again.
"""
