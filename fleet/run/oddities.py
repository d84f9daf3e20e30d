"""What planning finds odd in an input that can be used: each said once, where a person sees it before any work."""

from __future__ import annotations

from collections.abc import Mapping

from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.base_name import why_other_base
from fleet.core.errors import shown, some
from fleet.steps.context import PlanContext
from fleet.steps.fuse import FuseStep
from fleet.steps.sources import Source
from fleet.store import open_folder

_LONGEST_NAME = 200


def warn_of_oddities(context: PlanContext) -> None:
    """Add to the context's warnings; once its steps are made."""
    _warn_of_other_bases(context)
    _warn_of_weights_beside_adapters(context)
    _warn_of_templates(context)
    if bare := [model.name for model in context.manifest.models if not model.suites]:
        context.warn(
            f"models: {', '.join(bare)}: no suites are given, so no task is measured, and no gate sees what they lose"
        )


def _warn_of_other_bases(context: PlanContext) -> None:
    """Adapters that name another base model than the aligned one; those that name the same are said together."""
    aligned, address = context.bases.aligned_model, context.manifest.base.aligned
    adapters: Mapping[str, Source | None] = {
        **{f"models: {name}": source for name, source in context.models.items()},
        "base.safety": context.bases.safety,
        "base.harmful": context.bases.harmful,
    }
    found: dict[tuple[str, str], list[str]] = {}
    for where, source in adapters.items():
        if source is None or not isinstance(source.model, Adapter):
            continue
        if reason := why_other_base(source.model, aligned, address):
            declared = str(source.model.config.get("base_model_name_or_path"))
            found.setdefault((declared, reason), []).append(where)
    for (declared, reason), where in found.items():
        context.warn(
            f"{'; '.join(where)}: adapter_config.json names the base model {_brief(declared)}, {reason}: an adapter "
            "means nothing on another model than it was trained on"
        )


def _warn_of_weights_beside_adapters(context: PlanContext) -> None:
    """Folders that hold an adapter and a full model: which of the two is meant, nothing says."""
    for model in context.manifest.models:
        if isinstance(context.models[model.name].model, Adapter):
            files = open_folder(model.source).files()
            weights = [f for f in files if f.endswith(".safetensors") and "/" not in f and not f.startswith("adapter_")]
            if weights and "config.json" in files:
                context.warn(
                    f"models: {model.name}: {model.source} holds an adapter and a full model ({some(weights, 2)}); the "
                    "adapter is read, as transformers does; give the full model a folder of its own if that is meant"
                )


def _brief(name: str) -> str:
    """A model's name as it is, where it looks like one."""
    return name if len(name) <= _LONGEST_NAME and name.isprintable() else shown(name)


def _warn_of_templates(context: PlanContext) -> None:
    """Fusions whose members have other chat templates than what is written, which is the aligned model's."""
    template = context.bases.aligned.chat_template
    members = {n for step in context.steps.values() if isinstance(step, FuseStep) for n in step.members}
    own = {name: source.chat_template for name, source in context.models.items() if name in members}
    text = template.text if template is not None else None
    if other := [name for name, found in own.items() if found is not None and found.text != text]:
        has = "the aligned model's chat template" if template is not None else "no chat template, as the aligned model,"
        context.warn(
            f"models: {', '.join(other)}: their chat template is another than the aligned model's; what is fused of "
            f"them has {has}"
        )
