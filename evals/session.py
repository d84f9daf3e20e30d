"""What one served model is asked, and what it answers: completions and log likelihoods, batched with others'."""

# ruff: noqa: PLC0415 - vllm reads the environment, which `Replica` sets, when first imported

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evals.batching import EngineThread
from evals.engine import Completion, EngineOptions, Likelihood, ServedModel, UnservableError
from evals.tokenizers import Tokenizer
from fleet.core.errors import EvalError

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

Message = Mapping[str, str]
"""One turn of a conversation: role and content."""


class Session:
    """A model while it is served: what it is asked, and what it answers. Made by `Replica.serving`.

    Any number of threads may ask at once; what they ask is batched together, with other sessions' too.
    """

    def __init__(
        self,
        engine: EngineThread,
        options: EngineOptions,
        model: ServedModel,
        tokenizer: Tokenizer,
        stop_token_ids: list[int],
        lora: LoRARequest | None,
        num_rows: int | None = None,
    ) -> None:
        self.options = options
        self.model = model
        self.tokenizer = tokenizer
        self._engine = engine
        self._stop_token_ids = stop_token_ids
        self._lora = lora
        self._num_rows = num_rows

    def chat_prompt(self, messages: str | Sequence[Message]) -> str:
        """The model's chat template around a user's message, or a conversation, up to where it answers.

        The text holds every special token the model is to see: give it to `encode` as `templated`.

        Raises:
            UnservableError: The tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise UnservableError(
                f"candidate {self.model.name}: its tokenizer has no chat template; add one to the "
                "tokenizer's folder, or set chat: false in the suite to send prompts as they are"
            )
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self.tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=True
        )

    def encode(self, text: str, templated: bool) -> list[int]:
        """Token ids of a text; special tokens are added unless a template, or the text itself, brought them."""
        bos = self.tokenizer.bos_token
        bare = templated or (isinstance(bos, str) and text.startswith(bos))
        return self.tokenizer.encode(text, add_special_tokens=not bare)

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_tokens: int | Sequence[int],
        stop: Sequence[str] = (),
        templated: bool = False,
        sampling: Mapping[str, Any] | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in order; greedy unless `sampling` says otherwise.

        What is sampled depends on the prompt and on how often it stands among `prompts` before, not on what else is
        asked, in which order or batch (`sample_seed`).

        Args:
            prompts: Texts, or token ids ready for the model.
            max_tokens: Longest completion, for all prompts or one number each.
            stop: The completion ends before the first of these strings.
            templated: Whether texts already hold their special tokens (`chat_prompt`).
            sampling: Further fields of vLLM's SamplingParams (temperature, top_p, …); with `logprobs` completions tell
                those of their first token. A `seed` takes the place of the engine's.

        Raises:
            EvalError: A prompt leaves no room for its completion, or a completion is missing or aborted.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        token_ids = [self.encode(p, templated) if isinstance(p, str) else list(p) for p in prompts]
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        settings: dict[str, Any] = {"temperature": 0.0, "seed": self.options.seed, **(sampling or {})}
        seed = settings.pop("seed")
        seeds = _sample_seeds(seed, token_ids) if settings["temperature"] else [seed] * len(prompts)
        params: list[SamplingParams] = []
        for ids, limit, own_seed in zip(token_ids, limits, seeds, strict=True):
            if len(ids) + limit > self.options.max_model_len:
                raise EvalError(
                    f"a prompt of {len(ids)} tokens and its {limit} new ones exceed max_model_len "
                    f"{self.options.max_model_len}: raise it, or lower the suite's max_tokens"
                )
            params.append(
                SamplingParams(
                    max_tokens=limit,
                    stop=list(stop),
                    stop_token_ids=self._stop_token_ids,
                    spaces_between_special_tokens=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    seed=own_seed,
                    **settings,
                )
            )
        return [_completion(output) for output in self._run(token_ids, params)]

    def loglikelihood(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """How likely each continuation is after its context; both are token ids, encoded together.

        Raises:
            EvalError: An empty context or continuation, a pair longer than the model, or a missing score.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for context, continuation in pairs:
            if not context or not continuation:
                raise EvalError("a log likelihood needs at least one token of context and of continuation")
            # The engine insists on room for one new token.
            if len(context) + len(continuation) >= self.options.max_model_len:
                raise EvalError(
                    f"{len(context) + len(continuation)} tokens do not fit max_model_len "
                    f"{self.options.max_model_len} with one to spare"
                )
        token_ids = [[*context, *continuation] for context, continuation in pairs]
        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        outputs = self._run(token_ids, [params] * len(pairs))
        return [_likelihood(output, len(context)) for output, (context, _) in zip(outputs, pairs, strict=True)]

    def _run(self, token_ids: list[list[int]], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        if not token_ids:
            return []
        self._check_rows(token_ids)
        outputs = self._engine.generate(token_ids, params, self._lora)
        for output, ids in zip(outputs, token_ids, strict=True):
            if list(output.prompt_token_ids or ()) != ids:
                raise EvalError("an output of the engine is not of its prompt")
            if len(output.outputs) != 1 or not output.finished:
                raise EvalError(f"a prompt of {len(ids)} tokens got {len(output.outputs)} completions")
        return outputs

    def _check_rows(self, token_ids: Sequence[Sequence[int]]) -> None:
        last = max(max(ids, default=0) for ids in token_ids)
        if self._num_rows is not None and last >= self._num_rows:
            token = next((t for t, i in self.tokenizer.get_vocab().items() if i == last), "")
            raise UnservableError(
                f"candidate {self.model.name}: a prompt holds the token {token!r} ({last}), but the embedding has "
                f"{self._num_rows} rows; resize it (resize_token_embeddings), or take the token out of the tokenizer"
            )


def sample_seed(seed: int, token_ids: Sequence[int], repeat: int) -> int:
    """The seed of one sampled completion, from 0 to 2**63 - 1: another one for every prompt and repeat.

    Args:
        seed: Of all.
        token_ids: The prompt.
        repeat: How many completions of the same prompt come before this one.
    """
    text = json.dumps([seed, list(token_ids), repeat])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _sample_seeds(seed: int, prompts: Sequence[Sequence[int]]) -> list[int]:
    seen: Counter[tuple[int, ...]] = Counter()
    seeds: list[int] = []
    for ids in prompts:
        seeds.append(sample_seed(seed, ids, seen[tuple(ids)]))
        seen[tuple(ids)] += 1
    return seeds


def _completion(output: RequestOutput) -> Completion:
    answer = output.outputs[0]
    if answer.finish_reason not in ("stop", "length"):
        raise EvalError(f"a completion ended with {answer.finish_reason!r}, not stop or length")
    num_prompt_tokens = len(output.prompt_token_ids or ())
    first = answer.logprobs[0] if answer.logprobs else {}
    logprobs = {(token.decoded_token or ""): token.logprob for token in first.values()}
    return Completion(answer.text, num_prompt_tokens, len(answer.token_ids), answer.finish_reason, logprobs)


def _likelihood(output: RequestOutput, num_context: int) -> Likelihood:
    ids, logprobs = output.prompt_token_ids or [], output.prompt_logprobs or []
    if len(logprobs) != len(ids):
        raise EvalError(f"the engine scored {len(logprobs)} of {len(ids)} prompt tokens")
    total, greedy = 0.0, True
    for token, scores in zip(ids[num_context:], logprobs[num_context:], strict=True):
        if scores is None or token not in scores:
            raise EvalError(f"the engine left token {token} of a continuation unscored")
        total += scores[token].logprob
        greedy = greedy and scores[token].rank == 1
    return Likelihood(total, greedy)
