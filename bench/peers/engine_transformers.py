"""`transformers` alone under bench/engine.py: its own forward pass and cache, SDPA attention.

python engine_transformers.py MODEL_DIR
"""

import sys
import time

import torch
import transformers

from peers.protocol import Steps, Work, serve


class Transformers:
    """A model with the cache that `generate` would use."""

    def __init__(self, model_dir: str) -> None:
        torch.set_num_threads(1)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)

    @torch.inference_mode()
    def measure(self, work: Work) -> Steps:
        """Time each forward pass, greedy choice included."""
        cache = transformers.DynamicCache(config=self._model.config)
        tokens = torch.tensor(work.prompts(self._model.config.vocab_size))
        seconds = []
        for _ in range(work.steps + 1):
            start = time.perf_counter()
            output = self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens = output.logits[:, -1].argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - start)
        return Steps(seconds[0], seconds[1:])


if __name__ == "__main__":
    serve(Transformers(sys.argv[1]).measure)
