"""What a model is, read from its headers and JSON alone: a full model, or a LoRA adapter on one.

Models are joined by canonical name: a module is named by its base tensor without `.weight`
(`model.layers.0.self_attn.q_proj`), whatever prefix PEFT or a wrapper puts before it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from fleet.checkpoint.adapter import Adapter, read_adapter
from fleet.checkpoint.advice import advice
from fleet.checkpoint.companions import own_files
from fleet.checkpoint.full_model import FullModel, read_full_model
from fleet.checkpoint.headers import INDEX_FILE
from fleet.core.errors import CheckpointError
from fleet.core.identity import digest
from fleet.store import Folder

Model: TypeAlias = FullModel | Adapter


def read_model(folder: Folder) -> Model:
    """A folder's model, told apart by its own files.

    Raises:
        CheckpointError: neither `config.json` nor `adapter_config.json`, damaged files, a quantised model, unsupported
            dtypes or LoRA options.
    """
    files = folder.files()
    if "adapter_config.json" in files:
        return read_adapter(own_files(folder, files))
    if "config.json" in files:
        return read_full_model(own_files(folder, files))
    raise CheckpointError(
        f"{folder.uri}: neither config.json (a model) nor adapter_config.json (an adapter) is there; "
        f"{advice('model', files)}"
    )


def content_identity(folder: Folder) -> str:
    """Digest of the files that decide what a model does: notes, cards and a trainer's state beside them may change.

    Args:
        folder: a model's own files, as `open_model_folder` gives them.
    """
    return digest({name: found for name, found in folder.digests().items() if name != INDEX_FILE})


def require_full_model(model: Model, role: str) -> FullModel:
    """The model itself, or a CheckpointError saying which role (`base.aligned`) needs a full one."""
    if isinstance(model, FullModel):
        return model
    raise CheckpointError(f"{role}: {model.folder.uri} is an adapter, but this has to be a full model")


def written_like(model: Model, aligned: FullModel) -> FullModel:
    """What a realigned full model takes its dtypes and small files from: its own, but a view's dtypes are no file's."""
    if not isinstance(model, FullModel):
        return aligned
    if not model.is_view:
        return model
    return replace(model, tensors=aligned.tensors)


def lora_rank(model: Model | None, module: str) -> int:
    """The rank of an adapter's LoRA on one module; 0 where it has none, and for everything that is no adapter."""
    return model.modules[module].rank if isinstance(model, Adapter) and module in model.modules else 0


def touched_tensors(model: Model) -> list[str]:
    """Names of the base tensors a model has a task vector in, sorted."""
    if isinstance(model, FullModel):
        return sorted(model.tensors)
    weights = {f"{name}.weight" for name in model.modules}
    biases = {f"{name}.bias" for name, module in model.modules.items() if module.bias is not None}
    return sorted(weights | biases | set(model.replaced))
