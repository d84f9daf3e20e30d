"""A LoRA adapter's headers: which modules it adapts, at which rank and scale, and what it holds beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from fleet.checkpoint.headers import TENSOR_BYTES, TensorInfo, check_dtypes, check_gathered, read_headers, read_json
from fleet.checkpoint.modules import MODULE_EXCLUDED
from fleet.checkpoint.names import unwrapped
from fleet.checkpoint.peft_rules import DeclaredValues, check_values, why_unreadable
from fleet.checkpoint.tables import HEADS, TOKEN_TABLES, output_head, same_values, token_table
from fleet.core.errors import CheckpointError, shown, some
from fleet.core.identity import Json
from fleet.store import Folder

PEFT_PREFIX = "base_model.model."

# The tensors of one adapted module, by the ends of their names; whoever saves a state dict himself leaves the adapter's
# own name in, as old PEFTs left `default`.
_LORA_TENSOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)"
    r"(\.(?!(weight|bias)$)(?P<adapter>[^.]+))?(?P<leaf>\.weight|\.bias)?"
)
_LORA_ROLES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_PEFT_ONLY = re.compile(r"(^|\.)(lora_|trainable_tokens)")


@dataclass(frozen=True)
class LoraModule:
    """One adapted module.

    Of a Linear, `a` is (rank, d_in), `b` is (d_out, rank), and the update of its weight (d_out, d_in) is
    `scale * b @ a`. Of an embedding, `a` is (rank, vocab), `b` is (d, rank), and the update of its table (vocab, d) is
    `scale * (b @ a).T`.
    """

    a: TensorInfo
    b: TensorInfo
    scale: float
    magnitude: TensorInfo | None = None
    """DoRA's magnitude, (d_out,): the norm of each output feature after the update."""
    embedding: bool = False
    bias: TensorInfo | None = None
    """`lora_bias`, (d_out,): `scale` times it is added to the module's bias."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the update."""
        d_out, d_in = self.b.shape[0], self.a.shape[1]
        return (d_in, d_out) if self.embedding else (d_out, d_in)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return tuple(t for t in (self.a, self.b, self.magnitude, self.bias) if t is not None)


@dataclass(frozen=True)
class Adapter:
    """An adapter's headers.

    `modules` maps a canonical module name to its factors. `replaced` maps a canonical base tensor name to the tensor
    that the adapter puts in its place: biases, `modules_to_save`, and the embeddings that PEFT saves beside a LoRA on
    them. A tensor may be in both: then the update is on top of the replacement.
    """

    folder: Folder
    config: dict[str, Json]
    modules: dict[str, LoraModule]
    replaced: dict[str, TensorInfo]

    @property
    def keeps_tie(self) -> bool:
        """Whether it changes a tied base's embedding and output head as one, which `modules` and `replaced` name once:
        as the embedding."""
        return bool(self.config.get("ensure_weight_tying"))

    @property
    def max_rank(self) -> int:
        return max(m.rank for m in self.modules.values())

    @property
    def num_bytes(self) -> int:
        factors = sum(t.num_bytes for m in self.modules.values() for t in m.tensors)
        return factors + sum(t.num_bytes for t in self.replaced.values())

    @property
    def memory_bytes(self) -> int:
        """About how much memory the headers take."""
        return TENSOR_BYTES * (sum(len(m.tensors) for m in self.modules.values()) + len(self.replaced))

    @cached_property
    def is_lora(self) -> bool:
        """Whether W + scale * B A on Linears says everything: only then can it be served, and written, as a LoRA."""
        return not self.why_not_lora()

    def why_not_lora(self) -> str:
        """What the adapter is beside a LoRA on Linears, to be read after "the adapter"; empty if nothing."""
        kinds = {
            "holds base tensors whole": self.replaced,
            "is a DoRA on": [n for n, m in self.modules.items() if m.magnitude is not None],
            "trains the bias of": [n for n, m in self.modules.items() if m.bias is not None],
            "adapts an embedding or the output head": [
                n for n, m in self.modules.items() if m.embedding or set(n.split(".")) & set(MODULE_EXCLUDED)
            ],
        }
        return " and ".join(f"{kind} ({some(names)})" for kind, names in kinds.items() if names)


def read_adapter(folder: Folder) -> Adapter:
    """An adapter's headers, checked against its config.

    Raises:
        CheckpointError: damaged files, unsupported dtypes, a config that means more than the tensors say
            (`why_unreadable`), or tensors that are no LoRA's.
    """
    config = read_json(folder, "adapter_config.json")
    if reason := why_unreadable(config):
        raise CheckpointError(f"{folder.uri}: {reason}")
    check_values(folder.uri, config)
    tensors = read_headers(folder, "adapter")
    check_gathered(folder.uri, tensors.values())
    check_dtypes(folder.uri, tensors)
    _check_one_adapter(folder.uri, tensors)
    found: dict[str, dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    unknown: list[str] = []
    for file_name, info in tensors.items():
        # PEFT wraps a targeted module: what is the base's own lies in `base_layer`.
        name = plain_name(file_name).replace(".base_layer.", ".")
        if match := _LORA_TENSOR.fullmatch(name):
            role = _LORA_ROLES.get(match["kind"] + (match["leaf"] or ""))
            roles = found.setdefault(match["module"], {})
            dims = 1 if role in ("magnitude", "bias") else 2
            if role is None or role in roles or len(info.shape) != dims:
                unknown.append(file_name)
            else:
                roles[role] = info
        elif _PEFT_ONLY.search(name) or name in replaced:
            unknown.append(file_name)
        else:
            replaced[name] = info
    if unknown:
        raise CheckpointError(
            f"{folder.uri}: tensors that are no LoRA factor of a Linear or an embedding, or are there twice: "
            f"{sorted(unknown)}; fold the adapter into its base (PEFT's merge_and_unload) and give the full model"
        )
    if not found:
        raise CheckpointError(f"{folder.uri}: the adapter has no LoRA factors")
    declared = DeclaredValues(folder.uri, config)
    modules = {name: _lora_module(declared, name, roles) for name, roles in sorted(found.items())}
    if not any(module.scale for module in modules.values()):
        raise CheckpointError(
            f"{folder.uri}: adapter_config.json: lora_alpha is {shown(config.get('lora_alpha'))}, so the adapter "
            "changes nothing; write the value it was trained with"
        )
    adapter = Adapter(folder, config, modules, dict(sorted(replaced.items())))
    return _without_tied_head(adapter) if adapter.keeps_tie else adapter


def _without_tied_head(adapter: Adapter) -> Adapter:
    """An adapter without its copy of what it does to the embedding of a tied base, which PEFT saves as the head's.

    The config then names the embedding alone (peft 0.21.2, `_add_modules_to_save_to_tie` and `_add_targets_to_tie`).
    The copy of a LoRA is the same product turned: lora_A is lora_embedding_B's transpose, lora_B lora_embedding_A's.
    """
    modules, replaced = adapter.modules, adapter.replaced
    has_table = any(set(name.split(".")) & TOKEN_TABLES for name in (*modules, *replaced))
    named = [name for field in ("target_modules", "modules_to_save") for name in _list(adapter.config.get(field))]
    names_head = any(set(str(name).split(".")) & HEADS for name in named)
    if not has_table or (names_head and not _head_is_copy(adapter)):
        return adapter
    return replace(
        adapter,
        modules={name: module for name, module in modules.items() if not set(name.split(".")) & HEADS},
        replaced={name: info for name, info in replaced.items() if not set(name.split(".")) & HEADS},
    )


def _head_is_copy(adapter: Adapter) -> bool:
    """Whether it saves the head's table as the embedding's, value by value: where its config names both, PEFT keeps
    them one on a tied base, and apart on one with a head of its own."""
    head, table = output_head(adapter.replaced), token_table(adapter.replaced)
    has_lora = any(set(name.split(".")) & HEADS for name in adapter.modules)
    return head is not None and table is not None and not has_lora and same_values(adapter.folder, head, table)


def _list(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []


def plain_name(file_name: str) -> str:
    """What a tensor of an adapter's file is called, without PEFT's prefix, wrappers and the adapter's own name."""
    name = unwrapped(unwrapped(file_name).removeprefix(PEFT_PREFIX))
    if match := _LORA_TENSOR.fullmatch(name):
        return f"{match['module']}.{match['kind']}{match['leaf'] or ''}"
    return name


def _check_one_adapter(where: str, tensors: Iterable[str]) -> None:
    names = {m["adapter"] for name in tensors if (m := _LORA_TENSOR.fullmatch(name)) and m["adapter"]}
    if len(names) > 1:
        raise CheckpointError(
            f"{where}: holds {len(names)} adapters ({some(names)}); save one with PEFT's "
            "save_pretrained(OUT, selected_adapters=[NAME])"
        )


def _lora_module(declared: DeclaredValues, module: str, roles: dict[str, TensorInfo]) -> LoraModule:
    where, config = declared.where, declared.config
    embedding = "embedding_A" in roles or "embedding_B" in roles
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if lost := [n for n in names if n not in roles]:
        there = ", ".join(f"lora_{n}" for n in sorted(roles))
        raise CheckpointError(f"{where}: module {module} has only {there}; lora_{lost[0]} is missing")
    for role, field in (("magnitude", "use_dora"), ("bias", "lora_bias")):
        if (role in roles) != bool(config.get(field)):
            raise CheckpointError(
                f"{where}: module {module} {'has a' if role in roles else 'lacks the'} {role} tensor, but "
                f"adapter_config.json says {field}={config.get(field)!r}; save the adapter again with PEFT"
            )
    a, b = roles[names[0]], roles[names[1]]
    rank = a.shape[0]
    if rank == 0:
        raise CheckpointError(f"{where}: module {module}: lora_A is {a.shape}, an update of rank 0")
    declared_rank = declared.rank(module)
    if b.shape[1] != rank or rank != declared_rank:
        raise CheckpointError(
            f"{where}: module {module}: lora_A is {a.shape} and lora_B is {b.shape}, but adapter_config.json says "
            f"rank {declared_rank}"
        )
    magnitude, bias = roles.get("magnitude"), roles.get("bias")
    for role, info in (("magnitude", magnitude), ("bias", bias)):
        if info is not None and info.shape != b.shape[:1]:
            raise CheckpointError(f"{where}: module {module}: the {role} is {info.shape}, but lora_B is {b.shape}")
    return LoraModule(a, b, declared.scale(module, rank), magnitude, embedding, bias)
