"""What to do about a folder that holds no safetensors weights of the kind looked for: trainers leave many."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from fleet.core.errors import some

_CHECKPOINT = re.compile(r"(?P<folder>(.*/)?checkpoint-(?P<step>\d+))/")
_NO_WEIGHTS = re.compile(r"(.*/)?(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)|.*_states\.pt")
"""What trainers pickle beside weights."""
_PICKLE = re.compile(r"[^/]+\.(bin|pt|pth|ckpt)")
_SAFE_SAVE = "transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT)"


def advice(what: str, files: Collection[str]) -> str:
    """How weights come out of what is there, in a line's end; what was found, where nothing is known.

    Args:
        what: `model` or `adapter`.
        files: the names of the folder's files.
    """
    return next(_known(what, files), f"found: {some(files) or 'nothing'}")


def _known(what: str, files: Collection[str]) -> Iterator[str]:
    yield from _below(files)
    yield from _sharded(files)
    yield from _pickled(what, files)
    yield from _other_formats(files)
    yield from _misnamed(what, files)


def _misnamed(what: str, files: Collection[str]) -> Iterator[str]:
    """Weights that are there, under a name or without a config that would tell them."""
    weights = sorted(name for name in files if "/" not in name and name.lower().endswith(".safetensors"))
    if not weights:
        return
    if upper := [name for name in weights if not name.endswith(".safetensors")]:
        yield f"{upper[0]} is looked for in lower case; rename it to {upper[0].lower()}"
    if what == "adapter" and len(weights) == 1:
        yield (
            f"adapter_config.json is there, but not adapter_model.safetensors; rename {weights[0]} to it if that is "
            "the adapter, or take adapter_config.json away if that is a full model"
        )
    elif what == "model" and "adapter_model.safetensors" in weights:
        yield "adapter_model.safetensors is there; copy the adapter_config.json it was trained with beside it"
    elif what == "model" and "config.json" not in files:
        yield f"{some(weights, 1)} is there; copy the config.json of the model it was trained from beside it"


def _below(files: Collection[str]) -> Iterator[str]:
    """Weights in a folder below: a trainer's last checkpoint, a cache's snapshot."""
    holds = {
        name.rpartition("/")[0]
        for name in files
        if "/" in name and name.endswith(".safetensors") and not name.endswith("optimizer.safetensors")
    }
    holds = {f for f in holds if f"{f}/config.json" in files or f"{f}/adapter_config.json" in files}
    steps = {int(m["step"]): m["folder"] for f in holds if (m := _CHECKPOINT.fullmatch(f"{f}/"))}
    if steps:
        more = f", the last of {len(steps)} checkpoints" if len(steps) > 1 else ""
        yield f"point the source at the folder's {steps[max(steps)]}{more}"
    elif holds:
        yield f"point the source at one of the folders below it that hold a model: {some(holds)}"


def _sharded(files: Collection[str]) -> Iterator[str]:
    """Checkpoints that training frameworks shard by process."""
    if shards := sorted(name.rpartition("/")[0] for name in files if name.endswith(".distcp")):
        of_model = [f for f in shards if "optim" not in f]
        folder = "/".join(part for part in ("FOLDER", (of_model or shards)[0]) if part)
        yield (
            f"these are FSDP's shards (.distcp); run `accelerate merge-weights {folder} OUT`, which writes "
            "OUT/model.safetensors, and copy config.json and the tokenizer's files beside it"
        )
    if any(re.search(r"(^|/)global_step\d+/|(^|/)zero_to_fp32\.py$|_optim_states\.pt$", name) for name in files):
        where = next((name.rpartition("/")[0] for name in files if name.endswith("zero_to_fp32.py")), "")
        there = "/".join(part for part in ("FOLDER", where) if part)
        yield (
            f"this is DeepSpeed's own checkpoint; run `python zero_to_fp32.py . OUT --safe_serialization` in {there}, "
            "and copy config.json and the tokenizer's files into OUT"
        )


def _pickled(what: str, files: Collection[str]) -> Iterator[str]:
    """Pickles, which can run code when loaded."""
    refused = "is a pickle, which can run code when loaded, so it is refused; convert it once, where you trust it, with"
    pickles = [name for name in files if _PICKLE.fullmatch(name) and not _NO_WEIGHTS.fullmatch(name)]
    if what == "adapter" and "adapter_model.bin" in pickles:
        yield (
            f"adapter_model.bin {refused} "
            "peft: PeftModel.from_pretrained(base, FOLDER).save_pretrained(OUT, safe_serialization=True)"
        )
    metas = [name for name in pickles if re.fullmatch(r"consolidated.*\.pth", name)]
    if metas:
        yield (
            f"{metas[0]} is Meta's own layout of a Llama, and a pickle; give the repository in transformers' layout, "
            "or convert it once with convert_llama_weights_to_hf.py of transformers 4"
        )
    loaded = [name for name in pickles if re.fullmatch(r"pytorch_model.*\.bin", name)]
    if loaded:
        yield f"{loaded[0]} {refused} {_SAFE_SAVE}, and the same with AutoTokenizer"
    if pickles:
        yield (
            f"{pickles[0]} {refused} model.load_state_dict(torch.load(FILE, weights_only=True)) on a "
            "transformers' model of its class, then model.save_pretrained(OUT)"
        )


def _other_formats(files: Collection[str]) -> Iterator[str]:
    ggufs = [name for name in files if name.lower().endswith(".gguf")]
    if ggufs:
        yield (
            f"{some(ggufs, 1)} is llama.cpp's format; give the safetensors model it was made from, or convert it with "
            f'transformers: AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file="{ggufs[0]}").save_pretrained(OUT), '
            "and the same with AutoTokenizer (needs the gguf package; a quantised GGUF stays rounded)"
        )
    if any(re.fullmatch(r"consolidated.*\.safetensors", name) for name in files):
        yield (
            "consolidated.safetensors is Mistral's own layout; give the repository in transformers' layout, or convert "
            "it once with convert_mistral_weights_to_hf.py of transformers 4"
        )
    others = [name for name in files if name.endswith((".h5", ".msgpack", ".npz", ".onnx"))]
    if others:
        yield f"{some(others, 1)} is another framework's; save the model from PyTorch: {_SAFE_SAVE}"
