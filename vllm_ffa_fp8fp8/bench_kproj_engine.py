"""Time per output token of a whole engine with `fused_kproj` off, auto and on: the shape of
Llama-3.1-8B, dummy weights, short contexts.

    python -m vllm_ffa_fp8fp8.bench_kproj_engine [--batches 1 8]

Each engine is a process of its own, so that nothing of one is left when the next starts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "vocab_size": 128_256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
PROMPT_TOKENS = 64


def measure(model: str, option: str, batches: list[int], tokens: int, repeats: int) -> dict:
    """Median milliseconds per output token by batch, in this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        attention_backend="FFA_FP8FP8",
        additional_config={"ffa_fp8fp8": {"fused_kproj": option}},
        max_model_len=2048,
        max_num_seqs=max(batches),
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": sorted({1, *batches})},
    )

    def seconds(batch: int, max_tokens: int) -> float:
        sampling = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        prompts = [
            {"prompt_token_ids": [1000 * row + i for i in range(PROMPT_TOKENS)]}
            for row in range(batch)
        ]
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        elapsed = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == max_tokens for output in outputs)
        return elapsed

    result = {}
    for batch in batches:
        seconds(batch, tokens)
        differences = [seconds(batch, tokens) - seconds(batch, 1) for _ in range(repeats)]
        result[batch] = sorted(differences)[repeats // 2] * 1e3 / (tokens - 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--options", nargs="+", default=["off", "auto", "on", "off"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--measure", nargs=3, metavar=("MODEL", "OPTION", "RESULT"), help="internal"
    )
    args = parser.parse_args()
    if args.measure:
        model, option, result = args.measure
        times = measure(model, option, args.batches, args.tokens, args.repeats)
        Path(result).write_text(json.dumps(times))
        return
    print("milliseconds per output token")
    print("fused_kproj", *(f"batch {batch}" for batch in args.batches), sep="  ")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_8B))
        for option in args.options:
            result, log = Path(folder, "result.json"), Path(folder, "log")
            command = [sys.executable, "-m", "vllm_ffa_fp8fp8.bench_kproj_engine"]
            command += ["--batches", *map(str, args.batches), "--tokens", str(args.tokens)]
            command += ["--repeats", str(args.repeats), "--measure", folder, option, str(result)]
            with log.open("wb") as output:
                process = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
            text = log.read_text(errors="replace")
            if process.returncode:
                raise SystemExit(text[-4000:])
            paths = [line.split("fused_kproj: ")[1] for line in text.splitlines() if "runs" in line
                     and "fused_kproj: " in line]  # fmt: skip
            times = json.loads(result.read_text()).values()
            print(f"{option:11}", *(f"{ms:7.3f}" for ms in times), *paths, sep="  ", flush=True)


if __name__ == "__main__":
    main()
