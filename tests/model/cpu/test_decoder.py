"""The loop over a model's layers gives what the model gives, for whichever rows are asked for."""

from pathlib import Path

import pytest
import torch
import transformers

from kvbaton.model.attention import PagedAttention
from kvbaton.model.cpu.attention import CpuAttention
from kvbaton.model.cpu.decoder import CompiledDecoder, compiled_decoder
from kvbaton.model.cpu.linear import can_pack
from kvbaton.model.cpu.optimize import optimize
from support import tiny_models

pytestmark = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="no kernels for bfloat16 here")


@pytest.mark.parametrize("rows", [[], [4], [4, 0], [2, 2], [0, 1, 2, 3, 4]])
@torch.inference_mode()
def test_any_rows(rows: list[int], tmp_path: Path) -> None:
    tiny_models.save_tiny_model("qwen3", tmp_path)
    attention = PagedAttention(CpuAttention())
    attention.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation=attention.name
    )
    token_ids, positions = torch.tensor([[5, 9, 11, 3, 40]]), torch.tensor([[7, 8, 9, 10, 11]])
    model(input_ids=token_ids, position_ids=positions, use_cache=False)
    optimize(model, attention)
    decoder = compiled_decoder(model)
    assert isinstance(decoder, CompiledDecoder)
    kept = torch.tensor(rows, dtype=torch.long)
    whole = model(input_ids=token_ids, position_ids=positions, use_cache=False).logits[0]
    assert torch.equal(decoder(token_ids, positions, kept), whole[kept])
