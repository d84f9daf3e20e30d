"""What a model's files compute, by transformers and PEFT on a CPU in float32: what engines are held against.

Weights stay as the files hold them, most of them unread in memory-mapped files, and a module's own are widened to
float32 only while it computes: an 8B model takes a few gigabytes of the files' cache at a time, not 32 of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from evals.agreement import Reference
from fleet.core.errors import EvalError

_Parameters: TypeAlias = dict[str, torch.nn.Parameter | None]

_CANT_LOAD = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)
"""What transformers and PEFT raise at files that they can't make a model of."""


def load_model(folder: Path, adapter: Path | None, dtype: torch.dtype) -> torch.nn.Module:
    """A model as transformers and PEFT make it of its files.

    Nothing else may compute in the process meanwhile: transformers sets the default dtype of all threads.

    Args:
        folder: a full model.
        adapter: a LoRA on it.
        dtype: of the weights in memory; one that holds what the files hold.

    Raises:
        EvalError: transformers or PEFT can't make the model of these files.
    """
    try:
        config: Any = cast(Any, AutoConfig).from_pretrained(folder, trust_remote_code=False)
        auto: Any = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
        model, info = auto.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
        if adapter is not None:
            from peft import PeftModel  # noqa: PLC0415 - a second to load, for adapters alone

            model = cast(Any, PeftModel).from_pretrained(model, adapter, torch_device="cpu")
    except _CANT_LOAD as error:
        raise EvalError(f"transformers can't load {adapter or folder}: {error}") from error
    if lacking := sorted(info["missing_keys"]):
        raise EvalError(f"transformers finds no {', '.join(lacking[:3])} in {folder}")
    return model.eval()


@torch.no_grad()
def reference(model: torch.nn.Module, token_ids: Sequence[int], rounding: torch.dtype | None) -> Reference:
    """The log-probability of each token after those before it.

    Args:
        model: of `load_model`; used up.
        token_ids: at least two.
        rounding: the engine's dtype, for `Reference.rounding`; None if it is float32.
    """
    num_rows = 1 if rounding is None else 2
    _widen(model, num_rows, rounding)
    ids = torch.tensor([list(token_ids)] * num_rows)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    rows = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].double()
    return Reference(tuple(rows[0].tolist()), (rows[-1] - rows[0]).square().mean().sqrt().item())


def _widen(model: torch.nn.Module, num_rows: int, rounding: torch.dtype | None) -> None:
    """Has every module compute in float32, and the second of two rows rounded after each module with weights."""
    for module in model.modules():
        if own := dict(module._parameters):  # pyright: ignore[reportPrivateUsage]
            module.register_forward_pre_hook(_widening(own))
            module.register_forward_hook(_narrowing(own))
            if rounding is not None:
                module.register_forward_hook(_rounding(num_rows, rounding))


def _widening(own: _Parameters) -> Callable[..., None]:
    def hook(module: torch.nn.Module, _: Any) -> None:
        for name, parameter in own.items():
            if parameter is not None:
                wide = torch.nn.Parameter(parameter.float(), requires_grad=False)
                module._parameters[name] = wide  # pyright: ignore[reportPrivateUsage]

    return hook


def _narrowing(own: _Parameters) -> Callable[..., None]:
    def hook(module: torch.nn.Module, *_: Any) -> None:
        module._parameters.update(own)  # pyright: ignore[reportPrivateUsage]

    return hook


def _rounding(num_rows: int, dtype: torch.dtype) -> Callable[..., torch.Tensor | None]:
    def hook(_module: torch.nn.Module, _arguments: Any, output: Any) -> torch.Tensor | None:
        # A table of positions has one row for all, and a router gives several tensors: these stay as they are.
        if not isinstance(output, torch.Tensor) or output.shape[0] % num_rows:
            return None
        first, second = output.chunk(num_rows)
        return torch.cat([first, second.to(dtype).to(output.dtype)])

    return hook
