"""An architecture without LoRA, whose length has another name than most, on an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.engine import EngineOptions, ServedModel, engine_length
from tests.pico import make_gpt2, make_tokenizer


@pytest.mark.vllm
def test_gpt2_is_served_at_its_own_length_and_answers_as_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evals.replicas import Replica

    folder = make_tokenizer(make_gpt2(tmp_path / "gpt2", 1, heads=1))
    length = engine_length(json.loads((folder / "config.json").read_text()), None, "gpt2")
    assert length == 64
    replica = Replica(folder, EngineOptions(max_model_len=length, max_lora_rank=0, kv_cache_bytes=16 << 20))
    try:
        with replica.serving(ServedModel("gpt2", "sha256:gpt2")) as session:
            (completion,) = session.generate(["How?"], max_tokens=8)
    finally:
        replica.close()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([session.encode("How?", templated=False)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    assert completion.text == tokenizer.decode(out, skip_special_tokens=True)
