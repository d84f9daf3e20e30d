"""What `fisher` and `regmean` have to know of a model, from examples of its task.

The whole model is in float32 on one device, and sees one example at a time.

    fisher: the mean over examples of (∂ log p(response | prompt) / ∂w)², of every weight w (Matena & Raffel, 2022,
            equation 4, with the examples' own responses)
    gram:   XᵀX / n of the inputs X (n tokens, d_in) of every Linear but the output head (Jin et al., 2023, section 3.2)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from fleet.checkpoint.belongs import check_belongs
from fleet.checkpoint.curvature import CurvatureKind
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import TensorLayout
from fleet.checkpoint.model import Model, require_full_model, touched_tensors
from fleet.checkpoint.opened import open_model
from fleet.checkpoint.task_vectors import read_delta, read_weight, to_stored
from fleet.checkpoint.tensors import write_tensors
from fleet.core.errors import ManifestError
from fleet.manifest import Manifest
from fleet.masks.batches import Batch, collate, encode
from fleet.masks.masked_model import ALONE, named_parameters
from fleet.masks.network import build_network
from fleet.masks.objective import reply_log_probs
from fleet.masks.texts import Row, open_texts
from fleet.masks.training import load_tokenizer
from fleet.store import open_store

logger = logging.getLogger(__name__)


class Subject(NamedTuple):
    """A model, and the examples it is measured on."""

    name: str
    model: Model
    rows: Sequence[Row]
    """Of prompt and response."""


def open_subjects(manifest: Manifest, names: Sequence[str] | None, examples: int) -> tuple[FullModel, list[Subject]]:
    """The aligned model, and the models of these names (all, if None) with at most `examples` of their prompts.

    Raises:
        InputError: a name that the manifest doesn't have, a model without prompts, or one that doesn't belong here.
    """
    known = [spec.name for spec in manifest.models]
    if unknown := sorted(set(names or ()) - set(known)):
        raise ManifestError(f"--models: the manifest has no {', '.join(unknown)}; it has {', '.join(known)}")
    specs = [spec for spec in manifest.models if names is None or spec.name in names]
    if bare := [spec.name for spec in specs if spec.prompts is None]:
        raise ManifestError(f"models: {', '.join(bare)}: nothing to measure on; set models.prompts, or name --models")
    aligned = require_full_model(open_model(manifest.base.aligned), "base.aligned")
    subjects: list[Subject] = []
    for spec in specs:
        model = open_model(spec.source)
        check_belongs(model, aligned)
        texts, data = open_texts("prompts", str(spec.prompts), f"models: {spec.name}: prompts")
        subjects.append(Subject(spec.name, model, texts.rows(data)[:examples]))
    return aligned, subjects


def measure(aligned: FullModel, subject: Subject, kinds: Sequence[CurvatureKind], output: str, max_tokens: int) -> None:
    """Write `{output}/{kind}/{model}/model.safetensors`, float32, of each kind.

    Raises:
        CheckpointError: transformers can't build the model, it has no tokenizer, or a value came out as NaN or Inf.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, tokenizer, store = network_of(aligned, subject.model, device), load_tokenizer(aligned), open_store(output)
    texts = [encode(tokenizer, row["prompt"], row["response"], max_tokens) for row in subject.rows]
    batches = [collate([text], device) for text in texts]
    for kind in kinds:
        found = (fisher if kind == "fisher" else gram)(network, batches)
        layout = [TensorLayout(name, "F32", tuple(values.shape)) for name, values in found.items()]
        key = f"{kind}/{subject.name}"
        write_tensors(store, f"{key}/model.safetensors", layout, ([values.cpu()] for values in found.values()))
        logger.info("%s of %s on %d examples: %s/%s", kind, subject.name, len(batches), store.uri, key)


def network_of(aligned: FullModel, model: Model, device: torch.device) -> Any:
    """The model that a full model is, or an adapter makes of the aligned one, in float32, without dropout."""
    network = build_network(aligned, torch.float32, device, ALONE, activation_checkpointing=False)
    parameters = named_parameters(network)
    with torch.no_grad():
        for name in touched_tensors(model):
            weight = read_weight(aligned, name)
            if name in parameters and (delta := read_delta(model, name, weight)) is not None:
                parameters[name].copy_(to_stored(aligned, name, weight + delta.dense()))
    return network


def fisher(network: Any, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """The diagonal of the Fisher information of every parameter, by its name in the checkpoint, float32."""
    network.requires_grad_(True)
    parameters = named_parameters(network)
    found = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for batch in batches:
        network.zero_grad(set_to_none=True)
        reply_log_probs(network, batch).sum().backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                found[name].addcmul_(parameter.grad, parameter.grad, value=1.0 / len(batches))
    network.requires_grad_(False)
    network.zero_grad(set_to_none=True)
    return found


def gram(network: Any, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """XᵀX / n of the inputs of every Linear but the output head, by its weight's name in the checkpoint, float32."""
    found: dict[str, torch.Tensor] = {}
    tokens = sum(batch.input_ids.numel() for batch in batches)
    with _watched(network, found, tokens), torch.no_grad():
        for batch in batches:
            network(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return found


@contextmanager
def _watched(network: Any, found: dict[str, torch.Tensor], tokens: int) -> Iterator[None]:
    """While open, what goes into a Linear is added to `found`."""

    def watch(weight: str) -> Any:
        def add(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2)
            product = x.T @ x / tokens
            found[weight] = found[weight] + product if weight in found else product

        return add

    hooks = [
        module.register_forward_pre_hook(watch(f"{name}.weight"))
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not network.get_output_embeddings()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
