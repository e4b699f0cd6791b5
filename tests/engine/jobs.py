"""What the engines are asked, and how they are set up."""

from prompts import questions, recall_prompts, source_prompt

CONTINUE = {"max_tokens": 16, "ignore_eos": True}
ANSWER = {"max_tokens": 12, "stop": "\n"}
MIXED_LENGTHS = (1, 2, 63, 127, 128, 129, 500)
MIXED_LENGTHS_GPU = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 500, 777, 1000, 1024)
MIXED_LENGTHS_GPU += (1500, 2047, 2048, 2049, 5000, 12_000)
# bfloat16 logits lie 0.06 or more apart, or tie.
FINE_LOGITS = {"hf_overrides": {"head_dtype": "float32"}}
RECALL_LENGTHS, ASKED = (1500, 3000), 2
RECALL_LENGTHS_GPU, ASKED_GPU = (2048, 8192, 16_384), 8
GPU = FINE_LOGITS | {
    "max_model_len": 20_000,
    "gpu_memory_utilization": 0.15,
    "kv_cache_memory_bytes": 2 << 30,  # engines side by side would disturb one another's profiling
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 32,
}
CPU = {"enforce_eager": True, "max_model_len": 4096}
# The mixed batch is longer than a step: prefills are cut, and run beside decodes.
SMALL_STEPS = CPU | FINE_LOGITS | {"max_num_batched_tokens": 512, "max_num_seqs": 6}

NUM_DRAFTS = 4
DRAFTS = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": NUM_DRAFTS,
        "prompt_lookup_max": 4,
    },
    "disable_log_stats": False,  # they count the drafts that were accepted
}


def source_batch(lengths: tuple[int, ...], apart: int = 1) -> list[list[int]]:
    """Prompts of such lengths, none the start of another."""
    return [source_prompt(length, start=apart * length) for length in lengths]


def mixed_batches() -> list[list[list[int]]]:
    """Mixed lengths together; then, in one step, two that the cache holds and one that it mostly
    holds."""
    first, second = recall_prompts(1500, 2)
    mixed = source_batch(MIXED_LENGTHS, apart=10)
    return [[*mixed, first], [first, mixed[-1], second]]


def mixed_batches_gpu() -> list[list[list[int]]]:
    """32 prompts of 1 to 16,000 tokens; the last 6 repeat an earlier one or its start."""
    mixed = source_batch(MIXED_LENGTHS_GPU, apart=2)
    longest = recall_prompts(16_000, 3)
    long = recall_prompts(8192, 2)
    medium = recall_prompts(3000, 2)
    mixed += [longest[0], long[0], medium[0]]
    others = [longest[1], longest[2], long[1], medium[1], long[0][:4097] + source_prompt(700)]
    return [mixed, [longest[0], *others]]


def recall_batches(lengths: tuple[int, ...], asked: int) -> list[list[str]]:
    return [[question.prompt for question in questions(length, asked)] for length in lengths]
