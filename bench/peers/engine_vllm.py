"""vLLM's engine under bench/engine.py. Runs in an environment of its own (setup_vllm.sh).

python engine_vllm.py MODEL_DIR      (affinity and VLLM_* variables are set by bench/engine.py)
"""

import sys
import time
from typing import Any

from vllm import LLM, SamplingParams

from peers.protocol import Steps, Work, serve


class Vllm:
    """Its engine in this process, stepped by hand."""

    def __init__(self, model: str) -> None:
        llm = LLM(
            model=model,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=4096,
            max_num_batched_tokens=4096,
            disable_log_stats=True,
        )
        self._engine: Any = llm.llm_engine
        self._vocab_size = self._engine.model_config.get_vocab_size()

    def measure(self, work: Work) -> Steps:
        """Time each step until all is done."""
        sampling = SamplingParams(temperature=0, max_tokens=work.steps + 1, ignore_eos=True, detokenize=False)
        for index, prompt in enumerate(work.prompts(self._vocab_size)):
            self._engine.add_request(f"{work.seed}-{index}", {"prompt_token_ids": prompt}, sampling)
        begun: set[str] = set()
        result = Steps(0.0, [])
        while self._engine.has_unfinished_requests():
            waiting = len(begun) < work.batch
            start = time.perf_counter()
            outputs = self._engine.step()
            elapsed = time.perf_counter() - start
            begun |= {output.request_id for output in outputs if output.outputs[0].token_ids}
            if waiting:
                result.prefill_seconds += elapsed
            else:
                result.decode_seconds.append(elapsed)
        return result


if __name__ == "__main__":
    serve(Vllm(sys.argv[1]).measure)
