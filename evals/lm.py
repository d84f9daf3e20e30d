"""lm-eval's view of a session: what its evaluator calls to complete and to score texts."""

# lm-eval ships no type stubs, and types few of its members.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    normalize_gen_kwargs,  # pyright: ignore[reportUnknownVariableType]
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evals.engine import Completion
from fleet.core.errors import EvalError

if TYPE_CHECKING:
    from evals.session import Session
    from evals.turn import Turn

_normalized = cast(Callable[[dict[str, Any], int], Mapping[str, Any]], normalize_gen_kwargs)

DEFAULT_MAX_TOKENS = 256
"""lm-eval's own longest completion, where a task names none."""


class FleetLM(TemplateLM):
    """lm-eval's view of a session, which serves one candidate.

    lm-eval encodes context and continuation together (`TemplateLM`); prompts that are too long lose their
    beginning, as in lm-eval's own backends, and are counted in `num_truncated`.
    """

    def __init__(self, session: Session, templated: bool, turn: Turn | threading.Lock) -> None:
        """
        Args:
            session: Serves the candidate.
            templated: The evaluator applies the chat template, so texts hold their special tokens already.
            turn: What the calling thread holds; it is free while the engine works.
        """
        super().__init__()
        self.session = session
        self._turn = turn
        self.templated = templated
        self.tokenizer = session.tokenizer
        self.num_truncated = 0
        self.completions: dict[tuple[str | None, int | None], Completion] = {}
        """(task, document) -> the first completion it got."""

    @property
    def eot_token_id(self) -> int:
        return cast(int, self.session.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS where there is one."""
        bos = self.session.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.session.options.max_model_len

    @property
    def tokenizer_name(self) -> str:
        return self.session.model.identity

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        bare = self.templated if add_special_tokens is None else not add_special_tokens
        return self.session.encode(string, templated=bare)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.session.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """One completion per request, in order, cut at its stop strings.

        A request that a task repeats stands here as often; sampled, each of them is another draw (`Session.generate`).
        """
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(_arguments(request)[1], sort_keys=True)].append(index)
        texts = [""] * len(requests)
        for key, members in groups.items():
            settings = dict(_normalized(json.loads(key), DEFAULT_MAX_TOKENS))
            stop = _stop_strings(settings.pop("until", None))
            limit = int(cast(int, settings.pop("max_gen_toks")))
            settings.pop("do_sample", None)
            if limit >= self.max_length:
                raise EvalError(f"the task asks for {limit} new tokens, but max_model_len is {self.max_length}")
            contexts = [
                self._fit(self.tok_encode(_arguments(requests[i])[0]), self.max_length - limit) for i in members
            ]
            with self._engine_works():
                completions = self.session.generate(contexts, limit, stop, sampling=settings)
            for i, completion in zip(members, completions, strict=True):
                texts[i] = postprocess_generated_text(completion.text, stop, None)
                self.completions.setdefault((requests[i].task_name, requests[i].doc_id), completion)
        return texts

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs: list[tuple[list[int], list[int]]] = []
        for _, context, continuation in requests:
            # One token of room for the engine, one of context before whatever is scored.
            room = self.max_length - 1 - len(continuation)
            if room < 1:
                raise EvalError(f"a continuation of {len(continuation)} tokens exceeds max_model_len {self.max_length}")
            pairs.append((self._fit(context, room), continuation))
        with self._engine_works():
            return list(self.session.loglikelihood(pairs))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log probability of each whole text, in windows that score every token once."""
        totals: list[float] = []
        for request in requests:
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(_arguments(request)[0], add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - 2,
                    context_len=1,
                ),
            )
            scores = self._loglikelihood_tokens([(None, *window) for window in windows])
            totals.append(sum(logprob for logprob, _ in scores))
        return totals

    @contextmanager
    def _engine_works(self) -> Generator[None]:
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()

    def _fit(self, context: list[int], room: int) -> list[int]:
        if len(context) <= room:
            return context
        self.num_truncated += 1
        return context[-room:]


def _arguments(request: Instance) -> tuple[Any, ...]:
    return cast(tuple[Any, ...], request.args)


def _stop_strings(until: object) -> list[str]:
    strings = [until] if isinstance(until, str) else list(cast(Sequence[str], until or ()))
    return [text for text in strings if text]
