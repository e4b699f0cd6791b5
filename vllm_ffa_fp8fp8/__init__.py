"""FFA_FP8FP8: a vLLM attention backend with FP8 + FP8-residual keys and block-skipping decode."""
