"""One vLLM engine that serves many models. Only this module and `evals.session` import vllm.

A replica starts on the aligned model. Adapters are added to its engine and served together, mixed in its batches; full
weights of the same architecture are swapped in place. Everything that can be checked is checked first, from headers,
and raises `UnservableError` with the engine untouched. An engine that raised anything else is not to be trusted again:
exceptions of vLLM pass through as they are, and the process that owns the replica must end.

Before anything is asked of weights or of an adapter, the engine shows that it computes them: what it says of a few
fixed tokens is held against transformers' and PEFT's word on the same files (`evals.agreement`). Not every swap holds:
vLLM 0.32 packs the experts of a mixture for a CPU only when they are loaded first. Where one doesn't, the engine starts
anew from the model's folder, and has to show it again.
"""

# ruff: noqa: PLC0415 - vllm and torch read the environment, which __init__ sets, when first imported

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from evals.agreement import Answer, Reference, disagreement
from evals.batching import EngineThread
from evals.engine import (
    EngineOptions,
    ServedModel,
    UnservableError,
    config_mismatch,
    describe,
    engine_arguments,
    engine_env,
    lora_id,
    unservable,
    weights_mismatch,
)
from evals.served_lora import write_served_lora
from evals.session import Session
from evals.tokenizers import Tokenizer, moved_tokens
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.belongs import check_belongs
from fleet.checkpoint.chat_templates import prompting
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import Model, read_model
from fleet.checkpoint.tokens import num_token_rows
from fleet.core.errors import CheckpointError, EvalError, SourceError, some
from fleet.store.local import LocalFolder

if TYPE_CHECKING:
    import torch
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

_SHOWN_TEXT = "The quick brown fox jumps over the lazy dog. How does one make a cup of tea? Boil 1 litre of water,"
_NUM_SHOWN = 32
"""Tokens of that text that an engine is asked for: in a mixture of experts enough that most experts see some."""
_NUM_DECODED = 8
"""Tokens that it goes on with: decoding has kernels, and on a GPU graphs, of its own."""


class Replica:
    """One engine on one aligned model, which serves models: any number of them at once on the same weights."""

    def __init__(self, model_dir: Path, options: EngineOptions) -> None:
        """Starts the engine on the full model in `model_dir`.

        Raises:
            UnservableError: The folder holds no full model.
        """
        # Read when vllm is imported; a worker whose environment is already right keeps its own values.
        for key, value in engine_env(options).items():
            os.environ.setdefault(key, value)
        self.model_dir = model_dir
        self.options = options
        self._resident = _read_full_model(model_dir, "the aligned model")

        import torch
        from vllm.platforms import current_platform

        self._on_cpu = current_platform.is_cpu()
        if self._on_cpu:
            from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

            from evals import cpu_lora

            cpu_lora.install(PunicaWrapperCPU)
            _let_numba_be_loaded()
            # vLLM would compile the function that counts a token's rank: five seconds at the first likelihoods, while
            # nothing is generated.
            torch.compiler.set_stance("force_eager")
        self._tokenizer = _read_tokenizer(model_dir)
        self._scratch = TemporaryDirectory(prefix="fleet-loras-")
        num_shown = max(1, min(_NUM_SHOWN, options.max_model_len - _NUM_DECODED))
        self._shown = self._tokenizer.encode(_SHOWN_TEXT, add_special_tokens=True)[:num_shown]
        self._referring = threading.Lock()
        self._references: dict[tuple[Path, Path | None, tuple[int, ...]], Reference] = {}
        self._changed = threading.Condition()
        # Guarded by `_changed`:
        self._num_sessions = 0
        self._swaps_hold = True
        self._start(model_dir)

    def _start(self, folder: Path) -> None:
        """An engine on the full model in a folder."""
        import vllm

        self._llm = vllm.LLM(str(folder), **engine_arguments(self.options, self._on_cpu))
        self._engine = EngineThread(self._llm.llm_engine, 2 * self.options.max_num_seqs)
        self._started_on = _read_full_model(folder, "the engine's model")
        self._weights_dir = folder
        self._answer: Answer | None = None  # of the present weights; none before they are shown
        self._loras: dict[str, _ServedLora] = {}

    def close(self) -> None:
        """Ends the replica."""
        self._stop()
        self._scratch.cleanup()

    def _stop(self) -> None:
        """Frees the engine and vLLM's process-wide state, so that another can start in this process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
        from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

        self._engine.close()
        self._llm.llm_engine.engine_core.shutdown()
        # What vLLM 0.32 remembers of a swap refers to the layers, which so outlive the engine.
        LAYERWISE_INFO.clear()
        del self._llm, self._engine
        gc.collect()
        cleanup_dist_env_and_memory()

    @property
    def device(self) -> str:
        """cpu or gpu."""
        return "cpu" if self._on_cpu else "gpu"

    @contextmanager
    def serving(self, model: ServedModel) -> Generator[Session]:
        """Serve a model. Sessions in other threads go on beside this one if they need the same weights.

        The aligned model and every adapter on it are the same weights; a full model is others. A session that needs
        others waits until no session needs the present ones. Nothing is moved if weights or adapter are there already.

        Raises:
            UnservableError: It does not fit the engine, which is as it was.
            EvalError: Even an engine started on it doesn't compute what its files say; or the engine kept cached blocks
                of the previous weights, or did not take the adapter.
        """
        weights = model.model_dir or self.model_dir
        adapter = None
        if model.adapter_dir is not None:
            adapter = self._check_adapter(model, model.adapter_dir)
        elif weights != self.model_dir:
            self._check_weights(model, weights)
        # An adapter's tokens are the aligned model's.
        tokenizer = prompting(self._tokenizer_of(model, model.model_dir), model.chat_template, model.date)
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(model, weights))
            if weights != self._weights_dir or self._answer is None:
                self._hold(model, weights)
            lora = None if adapter is None else self._take_lora(model, adapter)
            self._num_sessions += 1
        try:
            if lora is not None:
                self._show_lora(model, lora)
            rows = num_token_rows(self._resident)
            # A token without a row is never said, and vLLM refuses to wait for one.
            stops = [i for i in _stop_token_ids(weights, tokenizer) if rows is None or i < rows]
            request = None if lora is None else lora.request
            yield Session(self._engine, self.options, model, tokenizer, stops, request, rows)
        finally:
            with self._changed:
                self._num_sessions -= 1
                if lora is not None:
                    lora.num_sessions -= 1
                self._changed.notify_all()

    def _check_adapter(self, model: ServedModel, folder: Path) -> Adapter:
        where = f"candidate {model.name} ({folder})"
        adapter = _read(folder, where)
        if not isinstance(adapter, Adapter):
            raise UnservableError(f"{where}: holds no adapter")
        if reason := unservable(adapter, self.options.max_lora_rank, self.options.lora_target_modules):
            raise UnservableError(f"{where}: {reason}; merge it into full weights to score it")
        try:
            check_belongs(adapter, self._resident)
        except CheckpointError as error:
            raise UnservableError(f"{where}: {error}") from error
        return adapter

    def _check_weights(self, model: ServedModel, folder: Path) -> None:
        where = f"candidate {model.name} ({folder})"
        candidate = _read_full_model(folder, where)
        problems = weights_mismatch(self._resident, candidate) + config_mismatch(
            self._resident.config, candidate.config
        )
        if problems:
            raise UnservableError(f"{where} does not fit {self.model_dir}: {describe(problems)}")

    def _tokenizer_of(self, model: ServedModel, folder: Path | None) -> Tokenizer:
        """The model's own tokenizer where it brings one (its chat template may differ), else the aligned one's.

        Raises:
            UnservableError: It cannot be read, or numbers a token otherwise than the aligned model's.
        """
        if folder is None or not (folder / "tokenizer_config.json").is_file():
            return self._tokenizer
        try:
            tokenizer = _read_tokenizer(folder)
        except (OSError, ValueError) as error:
            raise UnservableError(f"candidate {model.name}: no readable tokenizer in {folder}: {error}") from error
        if moved := moved_tokens(tokenizer.get_vocab(), self._tokenizer.get_vocab()):
            raise UnservableError(
                f"candidate {model.name}: the tokenizer in {folder} numbers its tokens unlike {self.model_dir}'s "
                f"({some(moved)}); an engine has one vocabulary"
            )
        return tokenizer

    def _hold(self, model: ServedModel, folder: Path) -> None:
        """Have the engine hold a full model's weights, and show that it computes them.

        Raises:
            EvalError: Even an engine started on the folder computes something else.
        """
        if self._answer is None:
            self._answer = self._show_start()
        if folder == self._weights_dir:
            return
        if self._can_swap(folder):
            before, self._answer = self._answer, None
            self._engine.call(lambda: self._swap_weights(folder))
            answer = self._ask(folder)
            if (wrong := disagreement(answer, before)) is None:
                self._answer = answer
                return
            self._swaps_hold = False
            logger.warning(
                "%s: its weights were swapped into the running engine, but %s; the engine starts anew for it, and for "
                "every other change of full weights",
                model.name,
                wrong,
            )
        self._stop()
        self._start(folder)
        self._answer = self._show_start()

    def _show_start(self) -> Answer | None:
        """Have an engine that has just been started show that it computes its model. A quantised one (a judge's) is
        taken at its word: transformers computes it only on a GPU."""
        if self._started_on.is_quantised:
            return None
        answer = self._ask(self._weights_dir)
        if (wrong := disagreement(answer, None)) is not None:
            raise EvalError(
                f"{self._weights_dir}: an engine started on this model doesn't compute what its files say: {wrong}"
            )
        return answer

    def _can_swap(self, folder: Path) -> bool:
        """Whether a swap is worth a try: into an engine that was built for the same tensors, if swaps held so far."""
        names = _read_full_model(folder, str(folder)).tensors.keys()
        return self._swaps_hold and self._answer is not None and names == self._started_on.tensors.keys()

    def _show_lora(self, model: ServedModel, lora: _ServedLora) -> None:
        """Have the engine show that it computes an adapter, and without it still the aligned model.

        Raises:
            UnservableError: It doesn't compute the adapter, or nothing can say what the adapter computes.
            EvalError: It doesn't compute the aligned model any more.
        """
        with lora.turn:
            if lora.is_shown:
                return
            where = f"candidate {model.name} ({model.adapter_dir})"
            try:
                answer = self._ask(self.model_dir, Path(lora.request.lora_path), lora.request)
            except EvalError as error:
                raise UnservableError(f"{where}: {error}; merge it into full weights to score it") from error
            if (wrong := disagreement(answer, self._answer)) is not None:
                raise UnservableError(
                    f"{where}: the engine doesn't compute this adapter: {wrong}; merge it into full weights to score it"
                )
            if (wrong := disagreement(self._ask(self.model_dir), None)) is not None:
                raise EvalError(f"{where}: with it in the engine, the aligned model isn't computed any more: {wrong}")
            lora.is_shown = True

    def _ask(self, folder: Path, adapter: Path | None = None, lora: LoRARequest | None = None) -> Answer:
        """What the engine says of the shown tokens, and what it should say.

        Raises:
            EvalError: transformers can't load the files.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=_NUM_DECODED, temperature=0.0, ignore_eos=True, prompt_logprobs=0, logprobs=0,
            detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        (output,) = self._engine.generate([self._shown], [params], lora)
        decoded = output.outputs[0]
        token_ids = (*self._shown, *decoded.token_ids)
        scores: list[Any] = [*(output.prompt_logprobs or [])[1:], *(decoded.logprobs or [])]
        logprobs: list[float] = [score[token].logprob for score, token in zip(scores, token_ids[1:], strict=True)]
        return Answer(token_ids, len(self._shown), tuple(logprobs), self._reference(folder, adapter, token_ids))

    def _reference(self, folder: Path, adapter: Path | None, token_ids: tuple[int, ...]) -> Reference:
        """Computed once for the same files and tokens: the aligned model comes back again and again."""
        from evals.reference import load_model, reference

        key, dtype = (folder, adapter, token_ids), _dtype_of(_read_full_model(folder, str(folder)))
        with self._referring:
            if key not in self._references:
                # Between two steps of the engine, as nothing may compute while transformers loads.
                model = self._engine.call(lambda: load_model(folder, adapter, dtype))
                self._references[key] = reference(model, token_ids, self._rounding)
            return self._references[key]

    @property
    def _rounding(self) -> torch.dtype | None:
        """What the engine's products are rounded to. In float32 a GPU may use TF32, which has float16's ten bits."""
        import torch

        dtype = self._llm.llm_engine.model_config.dtype
        if dtype != torch.float32:
            return dtype
        return None if self._on_cpu else torch.float16

    def _swap_weights(self, folder: Path) -> None:
        reload = cast(Callable[..., object], self._llm.collective_rpc)  # pyright: ignore[reportUnknownMemberType]
        reload("reload_weights", kwargs={"weights_path": str(folder)})
        if self._on_cpu:
            self._llm.apply_model(_repack_output_layer)
        # Cached blocks hold keys and values of the old weights, and would be used silently.
        if not self._llm.reset_prefix_cache():
            raise EvalError(f"the engine kept cached blocks after a swap to {folder}")
        self._weights_dir = folder

    def _has_room(self, model: ServedModel, weights: Path) -> bool:
        if weights != self._weights_dir and self._num_sessions:
            return False
        if model.adapter_dir is None or model.identity in self._loras:
            return True
        return len(self._loras) < self.options.max_loras or any(not lora.num_sessions for lora in self._loras.values())

    def _take_lora(self, model: ServedModel, adapter: Adapter) -> _ServedLora:
        """The adapter in the engine: there already, or loaded now, in the place of one that no session needs."""
        from vllm.lora.request import LoRARequest

        if (served := self._loras.get(model.identity)) is None:
            if len(self._loras) == self.options.max_loras:
                free = next(name for name, lora in self._loras.items() if not lora.num_sessions)
                gone = self._loras.pop(free).request
                self._engine.call(lambda: self._llm.llm_engine.remove_lora(gone.lora_int_id))
            number = lora_id(model.identity)
            folder = Path(self._scratch.name, str(number))
            if not folder.exists():
                assert model.adapter_dir is not None
                write_served_lora(adapter, model.adapter_dir, folder)
            request = LoRARequest(model.identity, number, str(folder))
            # Loaded here, not by the first request: an engine does not survive a bad adapter inside generate.
            if not self._engine.call(lambda: self._llm.llm_engine.add_lora(request)):
                raise EvalError(f"the engine did not take the adapter of candidate {model.name}")
            served = self._loras[model.identity] = _ServedLora(request)
        served.num_sessions += 1
        return served


@dataclass
class _ServedLora:
    """An adapter in the engine, and how many sessions need it."""

    request: LoRARequest
    num_sessions: int = 0
    is_shown: bool = False
    """Whether the engine has shown that it computes it."""
    turn: threading.Lock = field(default_factory=threading.Lock)
    """Of the session that has it shown, while others wait."""


def _repack_output_layer(model: torch.nn.Module) -> None:
    """Packs the output layer's weights again after a swap, on a CPU.

    There a layer multiplies with a packed copy made when its weights were loaded. A swap (vLLM 0.32) packs what
    it loads, and a tied output layer loads nothing: its weight is the new embedding, its copy still the old one.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _read(folder: Path, where: str) -> Model:
    try:
        return read_model(LocalFolder(folder))
    except (CheckpointError, SourceError) as error:
        raise UnservableError(f"{where}: {error}") from error


def _dtype_of(model: FullModel) -> torch.dtype:
    """The one that a model's files have; float32 where they have several."""
    from fleet.checkpoint.tensors import TORCH_DTYPES

    found = {info.dtype for info in model.tensors.values()}
    return TORCH_DTYPES[found.pop() if len(found) == 1 else "F32"]


def _let_numba_be_loaded() -> None:
    """Make llvmlite's library handle safe to look into.

    vLLM 0.32 asks every object of every loaded module for its `__dict__` (`register_kernels`); the handle has none, and
    answers every name with a function of the library, so an engine can't start where numba was used.
    """
    if ffi := sys.modules.get("llvmlite.binding.ffi"):
        ffi.lib._fntab["__dict__"] = {}


def _read_full_model(folder: Path, where: str) -> FullModel:
    model = _read(folder, where)
    if not isinstance(model, FullModel):
        raise UnservableError(f"{where}: {folder} holds an adapter, not a full model")
    return model


def _read_tokenizer(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    read = cast(Callable[[Path], Tokenizer], AutoTokenizer.from_pretrained)  # pyright: ignore[reportUnknownMemberType]
    return read(folder)


def _stop_token_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end this model's text. An engine knows those of its first model; a fine-tune may have others."""
    found: set[int] = set()
    if isinstance(tokenizer.eos_token_id, int):
        found.add(tokenizer.eos_token_id)
    for name in ("config.json", "generation_config.json"):
        if (file := folder / name).is_file():
            ids: int | list[int] | None = json.loads(file.read_bytes()).get("eos_token_id")
            found.update(ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else [])
    return sorted(found)
