"""`python -m mixbits.lm_eval ...`: lm-eval's own command line, where packed models can be loaded.

    python -m mixbits.lm_eval --model hf --model_args pretrained=DIR --tasks lambada_openai

Neither lm-eval nor transformers looks for plugins: without mixbits imported, `lm_eval` itself would
warn of an unknown quantization type, and score random weights.
"""

from __future__ import annotations

import sys
import warnings

from .command import exit_code


def main() -> int:
    """Hands all arguments on; returns the exit code."""
    from lm_eval.__main__ import cli_evaluate

    # lm-eval reads a model's quantization_config and hands it on; transformers wonders why.
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")
    argv = sys.argv[1:]
    sys.argv = ["lm_eval", *(arg for arg in argv if arg != "--traceback")]
    return exit_code(cli_evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
