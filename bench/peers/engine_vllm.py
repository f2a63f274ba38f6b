"""vLLM's engine, in this process, answering the requests of bench/engine.py. Runs in vLLM's own environment.

    python engine_vllm.py MODEL_DIR      (VLLM_CPU_OMP_THREADS_BIND and the affinity are set by the caller)
"""

import json
import random
import sys
import time

from vllm import LLM, SamplingParams


def main(model: str) -> None:
    """Load, say ready, then answer one line of JSON with another until the input ends."""
    llm = LLM(
        model=model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=4096,
        max_num_batched_tokens=4096,
        disable_log_stats=True,
    )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    reply({"ready": True})
    for line in sys.stdin:
        reply(measure(llm.llm_engine, vocabulary, **json.loads(line)))


def measure(engine, vocabulary: int, num_tokens: int, batch: int, steps: int, seed: int) -> dict[str, object]:
    """Seconds until every prompt has its first token, and of each decode step after that."""
    rng = random.Random(seed)
    sampling = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True, detokenize=False)
    for index in range(batch):
        prompt = [rng.randrange(3, vocabulary) for _ in range(num_tokens)]
        engine.add_request(f"{seed}-{index}", {"prompt_token_ids": prompt}, sampling)
    first: set[str] = set()
    prefill, decode = 0.0, []
    while engine.has_unfinished_requests():
        waiting = len(first) < batch
        began = time.perf_counter()
        outputs = engine.step()
        elapsed = time.perf_counter() - began
        first |= {output.request_id for output in outputs if output.outputs[0].token_ids}
        if waiting:
            prefill += elapsed
        else:
            decode.append(elapsed)
    return {"prefill_seconds": prefill, "decode_seconds": decode}


def reply(message: dict[str, object]) -> None:
    """One line for the caller; vLLM writes its log to standard error."""
    sys.__stdout__.write(json.dumps(message) + "\n")
    sys.__stdout__.flush()


if __name__ == "__main__":
    main(sys.argv[1])
