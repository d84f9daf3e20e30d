"""Which architectures vLLM serves, and on which of their modules it takes a LoRA; light: neither vllm nor torch.

To ask vLLM itself takes seconds and a gigabyte, which planning is not to cost. So the sources of the installed vLLM
are read: its registry names a class for each architecture, the class's bases say whether it takes LoRA
(`SupportsLoRA`), and the linear layers that its module makes, which adapters it can hold. What isn't registered is
served through transformers, where the model's attention can be exchanged. `tests/evals/test_architectures.py` compares
all of it with what vLLM says.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fleet.core.errors import InputError
from fleet.core.identity import Json

_GENERATING = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
"""The tables of vLLM's registry whose models write text."""

_LINEARS = frozenset(
    {"ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear", "ReplicatedLinear", "RowParallelLinear"}
)
"""vLLM's layers that it wraps for LoRA."""


@dataclass(frozen=True)
class Architecture:
    """What vLLM makes of one model."""

    name: str
    why_no_lora: str = ""
    """Why no adapter is served on it, to be read after "the engine"; empty where they are."""
    lora_modules: frozenset[str] | None = None
    """The last parts of the names of the modules that can have a LoRA; None where any Linear can."""


UNKNOWN = Architecture("unknown")
"""Of a model that nothing is known of; an engine is taken to serve it."""


def architecture_of(config: Mapping[str, Json], where: str, on_cpu: bool) -> Architecture:
    """The architecture that a config.json names, as vLLM serves it. Without vLLM on this machine all is taken for
    served: nothing here can tell.

    Args:
        config: of a full model.
        where: whose it is, for messages.
        on_cpu: whether the engines run on a CPU.

    Raises:
        InputError: vLLM serves no such architecture, or on a CPU no attention heads of its width.
    """
    names, tables = _names(config), _registered()
    if not tables or not names:
        return Architecture(names[0]) if names else UNKNOWN
    name = next((n for n in names if n in tables and tables[n].generates), names[0])
    entry = tables.get(name)
    if entry is not None and entry.generates:
        found = _inspect(name, entry.module, entry.class_name)
    elif _has_plugins() or (entry is None and _in_transformers(name, config)):
        found = Architecture(name)
    else:
        raise InputError(
            f"{where}: vLLM generates no text with {name} (config.json: architectures), so nothing can be scored; it "
            "takes what its registry lists and what transformers implements with an attention that can be exchanged, "
            "such as LlamaForCausalLM, Qwen3ForCausalLM, Gemma3ForCausalLM or MixtralForCausalLM"
        )
    if on_cpu and (size := _head_size(config)) is not None and (sizes := _cpu_head_sizes()) and size not in sizes:
        raise InputError(
            f"{where}: its attention heads are {size} wide, and on a CPU vLLM computes {', '.join(map(str, sizes))}; "
            "score it on a GPU (placement.replica_gpus)"
        )
    if on_cpu and not found.why_no_lora and has_experts(config):
        return Architecture(name, "takes no LoRA on a mixture of experts on a CPU, for its kernels need triton")
    return found


class _Entry(NamedTuple):
    """What vLLM's registry says of an architecture."""

    generates: bool
    """Whether its model writes text; others embed, classify or draft."""
    module: str
    class_name: str


def has_experts(config: Mapping[str, Json]) -> bool:
    """Whether a config is of a mixture of experts: one of its numbers of experts is over 1."""
    inner = config.get("text_config")
    return any("expert" in key and type(value) is int and value > 1 for key, value in config.items()) or (
        isinstance(inner, dict) and has_experts(inner)
    )


def _head_size(config: Mapping[str, Json]) -> int | None:
    """How wide an attention head is; None where a config doesn't say it of all heads."""
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    if "kv_lora_rank" in config:  # latent attention has widths of its own
        return None
    if type(size := config.get("head_dim")) is int:
        return size
    width = next((config[name] for name in ("hidden_size", "n_embd", "d_model") if name in config), None)
    heads = next((config[name] for name in ("num_attention_heads", "n_head", "n_heads") if name in config), None)
    return width // heads if type(width) is int and type(heads) is int and heads > 0 else None


@lru_cache(maxsize=1)
def _cpu_head_sizes() -> list[int]:
    """The widths of attention heads that vLLM computes on a CPU; nothing if its source doesn't say."""
    vllm = _package("vllm")
    tree = _parsed(vllm / "v1/attention/backends/cpu_attn.py") if vllm else None
    for node in ast.walk(tree) if tree else ():
        match node:
            case ast.FunctionDef(name="get_supported_head_sizes", body=[*_, ast.Return(value=ast.List() as sizes)]):
                return ast.literal_eval(sizes)
            case _:
                pass
    return []


def _names(config: Mapping[str, Json]) -> list[str]:
    """The architectures a config names; where it names none, the one of its type, as vLLM takes it."""
    match config.get("architectures"):
        case [*names] if names:
            return [str(name) for name in names]
        case _:
            name = _causal_models().get(str(config.get("model_type")))
            return [name] if name else []


def _package(name: str) -> Path | None:
    """The folder of a package, which is not imported; None if it isn't installed."""
    spec = find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


@lru_cache(maxsize=512)
def _parsed(file: Path) -> ast.Module | None:
    return ast.parse(file.read_bytes()) if file.is_file() else None


@lru_cache(maxsize=1)
def _registered() -> dict[str, _Entry]:
    """Architecture -> what vLLM's registry says of it; nothing without vLLM."""
    vllm = _package("vllm")
    tree = _parsed(vllm / "model_executor/models/registry.py") if vllm else None
    found: dict[str, _Entry] = {}
    for node in tree.body if tree else ():
        match node:
            case ast.Assign(targets=[ast.Name(id=table)], value=ast.Dict(keys=names, values=places)):
                generates = table in _GENERATING
                for name, place in zip(names, places, strict=True):
                    if isinstance(name, ast.Constant) and isinstance(place, ast.Tuple):
                        new = _Entry(generates, *ast.literal_eval(place))
                        found[str(name.value)] = new if generates else found.get(str(name.value), new)
            case _:
                pass
    return found


@lru_cache(maxsize=1)
def _causal_models() -> dict[str, str]:
    """Type of a model -> its architecture, as transformers' automatic class for language models has them."""
    transformers = _package("transformers")
    tree = _parsed(transformers / "models/auto/modeling_auto.py") if transformers else None
    for node in tree.body if tree else ():
        match node:
            case ast.Assign(
                targets=[ast.Name(id="MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")], value=ast.Call(args=[ast.List() as pairs])
            ):
                return {key: name for key, name in ast.literal_eval(pairs) if isinstance(name, str)}
            case _:
                pass
    return {}


def _has_plugins() -> bool:
    """Whether something beside vLLM itself may add to its registry."""
    return any(not entry.value.startswith("vllm.") for entry in entry_points(group="vllm.general_plugins"))


def _in_transformers(name: str, config: Mapping[str, Json]) -> bool:
    """Whether transformers implements an architecture in such a way that vLLM can exchange its attention; vLLM asks
    for `is_backend_compatible` or `_can_set_attn_implementation`, which look for the same in the model's source."""
    transformers, kind = _package("transformers"), str(config.get("model_type"))
    if transformers is None or not (name in _causal_models().values() or "text_config" in config):
        return False
    for file in (transformers / "models" / kind.replace("-", "_")).glob("modeling_*.py"):
        source = file.read_text(encoding="utf-8")
        if re.search(rf"^class {re.escape(name)}\(", source, re.MULTILINE):
            return "_supports_attention_backend = True" in source or "ALL_ATTENTION_FUNCTIONS" in source
    return False


@lru_cache(maxsize=64)
def _inspect(name: str, module: str, class_name: str) -> Architecture:
    start = _file_of(module)
    if class_name.startswith("Transformers") or start is None:  # the first take LoRA on any Linear
        return Architecture(name)
    lineage = [*_lineage(start, class_name)]
    if not any("SupportsLoRA" in map(_base_name, node.bases) for node in lineage):
        return Architecture(name, f"takes no LoRA on {name}")
    packed = next((mapping for node in lineage if (mapping := _packed(node)) is not None), dict[str, list[str]]())
    names = {part for layer in _linears(start) for part in packed.get(layer, [layer])}
    return Architecture(name, lora_modules=frozenset(names) or None)


def _file_of(module: str) -> Path | None:
    """The source of a module that the registry, or an import in one of its models, names."""
    vllm = _package("vllm")
    assert vllm is not None
    path = module.removeprefix("vllm.") if module.startswith("vllm.") else f"model_executor.models.{module}"
    place = vllm / path.replace(".", "/")
    return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)


def _imports(file: Path) -> dict[str, tuple[str, Path]]:
    """Name in a module -> its name and file where it comes from, of what other models of vLLM give."""
    tree = _parsed(file)
    vllm = _package("vllm")
    assert tree is not None and vllm is not None
    found: dict[str, tuple[str, Path]] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.level:
            folder = file.parents[node.level - 1].relative_to(vllm)
            module = ".".join(("vllm", *folder.parts, node.module))
        else:
            module = node.module
        if module.startswith(("vllm.model_executor.models.", "vllm.models.")) and (source := _file_of(module)):
            found |= {alias.asname or alias.name: (alias.name, source) for alias in node.names}
    return found


def _lineage(file: Path, class_name: str) -> Iterator[ast.ClassDef]:
    """A class and those it is made of, as far as they are among vLLM's models."""
    tree = _parsed(file)
    found = next((n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == class_name), None)  # type: ignore[arg-type]
    if found is None:
        if class_name in (imported := _imports(file)):
            name, source = imported[class_name]
            yield from _lineage(source, name)
        return
    yield found
    for base in found.bases:
        if (name := _base_name(base)) != class_name:
            yield from _lineage(file, name)


def _base_name(base: ast.expr) -> str:
    return base.id if isinstance(base, ast.Name) else ""


def _packed(node: ast.ClassDef) -> dict[str, list[str]] | None:
    """Which of the checkpoint's modules a class puts into one of its own."""
    for item in node.body:
        match item:
            case (
                ast.Assign(targets=[ast.Name(id="packed_modules_mapping")], value=ast.Dict() as value)
                | ast.AnnAssign(target=ast.Name(id="packed_modules_mapping"), value=ast.Dict() as value)
            ):
                return ast.literal_eval(value)
            case _:
                pass
    return None


@lru_cache(maxsize=64)
def _linears(file: Path) -> frozenset[str]:
    """The names of the linear layers that a module, or one it takes classes from, makes."""
    todo, files = [file], {file}
    found: set[str] = set()
    while todo:
        source = todo.pop()
        tree = _parsed(source)
        assert tree is not None
        for node in ast.walk(tree):
            match node:
                case ast.Assign(targets=[ast.Attribute(attr=layer)], value=ast.Call(func=ast.Name(id=kind))) if (
                    kind in _LINEARS
                ):
                    found.add(layer)
                case _:
                    pass
        new = {path for _, path in _imports(source).values()} - files
        files |= new
        todo += new
    return frozenset(found)
