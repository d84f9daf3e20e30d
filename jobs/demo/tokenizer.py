"""The demo fleet's tokenizer: the generated text's words, characters for all others, and a chat template."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, BOS, END, USER, ASSISTANT, SYSTEM = SPECIALS = (
    "<|pad|>",
    "<|unknown|>",
    "<|begin|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)
# Special tokens stand first in the vocabulary, so their ids are their places.
PAD_ID, BOS_ID, END_ID = (SPECIALS.index(token) for token in (PAD, BOS, END))
# A word or one digit takes the space before it along; a comma or a full stop is a piece of its own.
PIECE: Final = r" ?[^\W\d_]+(?:'[a-z]+)?| ?\d| ?[^\w\s]|\s|_"
MAX_VOCABULARY: Final = 1024
CHARACTERS: Final = [chr(code) for code in range(ord(" "), ord("~") + 1)] + ["\n"]
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Unigram over the pieces of `texts` by frequency; printable characters spell what was never seen."""
    splitter = pre_tokenizers.Split(Regex(PIECE), "isolated")
    counts = Counter(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text))
    total = sum(counts.values())
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
    words = [piece for piece in ranked if piece not in CHARACTERS][: MAX_VOCABULARY - len(SPECIALS) - len(CHARACTERS)]
    # A character scores below any chain of words, so it is used only where no word fits.
    vocabulary = [(special, 0.0) for special in SPECIALS]
    vocabulary += [(character, -20.0) for character in CHARACTERS]
    vocabulary += [(word, math.log(counts[word] / total)) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIALS.index(UNKNOWN), byte_fallback=False))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
