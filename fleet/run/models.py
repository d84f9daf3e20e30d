"""The models that a manifest names, opened: headers alone, joined by name, head and vocabulary, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from evals.architectures import architecture_of
from evals.engine import engine_length
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.belongs import check_belongs, check_config, check_head
from fleet.checkpoint.chat_templates import read_chat_template
from fleet.checkpoint.companions import is_vocabulary
from fleet.checkpoint.configs import prepare_differences
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.heads import with_head_of
from fleet.checkpoint.joined import joined_address
from fleet.checkpoint.model import content_identity, read_model, require_full_model
from fleet.checkpoint.opened import open_model_folder
from fleet.checkpoint.tokens import renumbered
from fleet.checkpoint.vocabulary import chosen_vocabulary, is_in
from fleet.core.errors import CheckpointError, ManifestError
from fleet.manifest import Manifest
from fleet.steps.sources import Bases, Source

_READERS = 16
"""Threads that read headers; they wait for storage, not for a core."""


def open_models(manifest: Manifest) -> tuple[Bases, dict[str, Source]]:
    """The base models, and those of the catalogue by name, as the run reads them.

    Raises:
        InputError: one can't be read, doesn't fit the aligned model, or can't be served.
    """
    base = manifest.base
    uris = [*base.sources, *(m.source for m in manifest.models)]
    with ThreadPoolExecutor(_READERS) as pool:
        sources = dict(zip(uris, pool.map(open_source, uris), strict=True))
    _check_base_dtypes({role: sources[uri] for role, uri in base.models.items()})
    sources = _with_heads_alike(base.aligned, _under_aligned_names(base.aligned, sources))
    sources = _on_engines(manifest, _in_one_vocabulary(manifest, sources))
    unaligned, safety, harmful = (
        sources[uri] if uri is not None else None for uri in (base.unaligned, base.safety, base.harmful)
    )
    bases = Bases(sources[base.aligned], unaligned, safety, harmful)
    models = {m.name: sources[m.source] for m in manifest.models}
    _check_sources(bases, models)
    return bases, models


def open_source(uri: str) -> Source:
    """
    Raises:
        SourceError: nothing can be read there.
        CheckpointError: it is no model, or none that can be read.
    """
    folder = open_model_folder(uri)
    return Source(uri, read_model(folder), content_identity(folder), read_chat_template(folder))


def _under_aligned_names(aligned: str, sources: Mapping[str, Source]) -> dict[str, Source]:
    """The sources by their address, each read under the aligned model's names; the aligned one under its class's.

    Raises:
        CheckpointError: the aligned model is an adapter, or two tensors of a source are one of the aligned model's.
    """
    base = _joined(sources[aligned], sources[aligned])
    return {uri: base if uri == aligned else _joined(source, base) for uri, source in sources.items()}


def _joined(source: Source, aligned: Source) -> Source:
    base = require_full_model(aligned.model, "base.aligned")
    uri = joined_address(source.uri, source.model, aligned.uri, base)
    return source if uri == source.uri else open_source(uri)


def _with_heads_alike(aligned: str, sources: Mapping[str, Source]) -> dict[str, Source]:
    """The sources by their address, full models read as tied or untied as the aligned one, where that is the same.

    Raises:
        CheckpointError: the aligned model is an adapter, or its head or its sizes are not what its config says.
    """
    base = require_full_model(sources[aligned].model, "base.aligned")
    check_config(base)
    check_head(base)
    return {uri: _with_head_alike(base, source) for uri, source in sources.items()}


def _with_head_alike(aligned: FullModel, source: Source) -> Source:
    if not isinstance(source.model, FullModel):
        return source
    uri = with_head_of(aligned, source.model, source.uri)
    return source if uri == source.uri else open_source(uri)


def _in_one_vocabulary(manifest: Manifest, sources: Mapping[str, Source]) -> dict[str, Source]:
    """The sources as the run reads them, by their address: full models in the manifest's vocabulary.

    Raises:
        ManifestError: the vocabulary is an adapter's.
        CheckpointError: a model's tokens can't be told.
    """
    choice, aligned = manifest.checkpoint.vocabulary, sources[manifest.base.aligned].uri
    if choice == "refuse":
        return {**sources}
    full = {uri: source.uri for uri, source in sources.items() if isinstance(source.model, FullModel)}
    named = None
    if not isinstance(choice, str):
        named = full.get(next(m.source for m in manifest.models if m.name == choice.model))
        if named is None:
            raise ManifestError(
                f"checkpoint.vocabulary: {choice.model} is an adapter, which has no vocabulary of its own; "
                'name a full model, or say "aligned"'
            )
    kind = choice if isinstance(choice, str) else "model"
    models = [full[m.source] for m in manifest.models if m.source in full]
    vocabulary = chosen_vocabulary(kind, aligned, models, named)
    changed = {uri: open_source(vocabulary.address(own)) for uri, own in full.items() if not is_in(vocabulary, own)}
    return {**sources, **changed}


def _on_engines(manifest: Manifest, sources: Mapping[str, Source]) -> dict[str, Source]:
    """The sources, each with what the engines make of the aligned model.

    Raises:
        InputError: they can't serve it, or not at the length that is asked for.
    """
    aligned = require_full_model(sources[manifest.base.aligned].model, "base.aligned")
    where = f"base.aligned: {aligned.folder.uri}"
    architecture = architecture_of(aligned.config, where, on_cpu=not manifest.placement.replica_gpus)
    require_tokenizer(aligned, where)
    engine_length(aligned.config, manifest.evaluation.max_model_len, where)
    return {uri: replace(source, architecture=architecture) for uri, source in sources.items()}


def require_tokenizer(model: FullModel, where: str) -> None:
    """
    Raises:
        CheckpointError: an engine would find no tokenizer beside the model.
    """
    if not any(map(is_vocabulary, model.folder.files())):
        raise CheckpointError(
            f"{where}: no tokenizer is there (tokenizer.json, tokenizer.model, vocab.json …), so nothing can be asked; "
            "save one beside it: AutoTokenizer.from_pretrained(ORIGIN).save_pretrained(FOLDER)"
        )


def _check_base_dtypes(models: Mapping[str, Source]) -> None:
    for role, source in models.items():
        if source.is_quantised:
            raise CheckpointError(
                f"base.{role}: {source.uri} is fp8; give the base models in the dtype outputs are to have"
            )


def _check_sources(bases: Bases, models: Mapping[str, Source]) -> None:
    aligned = bases.aligned_model
    full = [s.model for s in (bases.unaligned, *models.values()) if s is not None and isinstance(s.model, FullModel)]
    prepare_differences([model.config for model in full], aligned.config)
    if bases.unaligned is not None:
        check_belongs(require_full_model(bases.unaligned.model, "base.unaligned"), aligned)
        if bases.aligned.identity == bases.unaligned.identity:
            raise ManifestError("base: aligned and unaligned hold the same weights, so nothing tells safety apart")
    for role, source in (("safety", bases.safety), ("harmful", bases.harmful)):
        if source is None:
            continue
        if not isinstance(source.model, Adapter):
            raise CheckpointError(f"base.{role}: {source.uri} is a full model; give a LoRA on the aligned model")
        if reason := source.model.why_not_lora():
            raise CheckpointError(f"base.{role}: {source.uri}: the adapter {reason}; give a LoRA on Linears alone")
        check_belongs(source.model, aligned)
    for source in models.values():
        check_belongs(source.model, aligned)
        if isinstance(source.model, FullModel) and (moved := renumbered(source.model.folder, aligned.folder)):
            raise CheckpointError(
                f"{source.uri}: its tokenizer numbers {len(moved)} tokens unlike the aligned model's ({moved[:3]}), so "
                'their rows can\'t be fused; set checkpoint.vocabulary to "aligned", "union" or {"model": NAME}'
            )
