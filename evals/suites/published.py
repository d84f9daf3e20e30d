"""The published sets of harmful and of harmless prompts: where each is, its form, and on what terms it may be used.

No prompt of any of them is in this repository: a reader takes the rows from the hub by `datasets`, or from a file as
its authors publish it. Sizes are those published. Light: `datasets` comes in where the hub is read.
"""

# datasets ships no type stubs.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from evals.suites.prompts import Form, LocatedRow, Prompt, one_line, read_files
from fleet.core.errors import SuiteError
from fleet.core.frozen import Frozen
from fleet.core.identity import Json


class DataPolicy(Frozen):
    """Which published sets may be used. What is not allowed here is refused before any work."""

    non_commercial: bool = False
    """Sets whose licence forbids commercial use may be used."""
    gated: bool = False
    """Sets that their authors give out on request alone may be used."""


@dataclass(frozen=True)
class DatasetSource:
    """Where `datasets` finds a set; what `datasets.load_dataset` takes."""

    path: str
    """A dataset of the hub, or the format of `data_files`."""
    config: str | None = None
    split: str | None = "train"
    """None takes every split, whose names are the categories."""
    revision: str | None = None
    """Commit; None takes the newest. A suite's digest covers its rows, so a change there is a new suite."""
    data_files: str | None = None


@dataclass(frozen=True)
class Reader:
    """One published set."""

    title: str
    kind: Literal["harmfulness", "over_refusal"]
    form: Form
    source: DatasetSource
    num_prompts: int
    licence: str
    paper: str
    commercial: bool = True
    """Whether the licence is known to allow commercial use."""
    gated: bool = False

    def read_files(self, files: Sequence[Path]) -> tuple[Prompt, ...]:
        """The prompts of files in the published form: csv, json, jsonl or parquet.

        Raises:
            SuiteError: A file is damaged or of another form.
        """
        return read_files(files, self.form)

    def read_hub(self) -> tuple[Prompt, ...]:
        """The prompts as `datasets` loads them.

        Raises:
            SuiteError: They cannot be loaded: no access, no network, or another form.
        """
        return self.form.prompts(_hub_rows(self))

    def why_refused(self, policy: DataPolicy) -> str | None:
        """Licence or access that the policy does not allow, with the field that would; None if it allows all."""
        reasons: list[str] = []
        if not self.commercial and not policy.non_commercial:
            reasons.append("is not known to allow commercial use (evaluation.policy.non_commercial)")
        if self.gated and not policy.gated:
            reasons.append("is given out on request alone (evaluation.policy.gated)")
        if not reasons:
            return None
        fields = (
            "set the field to true if that suits you" if len(reasons) == 1 else "set both to true if that suits you"
        )
        return f"{self.title}, {self.licence}, {' and '.join(reasons)}; {fields}, or leave the suite out"


def _hub_rows(reader: Reader) -> Iterator[LocatedRow]:
    import datasets  # noqa: PLC0415 - seconds of import that only the hub needs
    import httpx2  # noqa: PLC0415
    from datasets.exceptions import DatasetsError  # noqa: PLC0415

    source = reader.source
    options: dict[str, object] = {} if reader.form.header else {"header": None, "names": ["prompt"]}
    if source.data_files is not None:
        options["data_files"] = source.data_files
    load = cast(Callable[..., Any], datasets.load_dataset)  # pyright: ignore[reportUnknownMemberType]
    try:
        loaded = load(source.path, source.config, split=source.split, revision=source.revision, **options)
    except (DatasetsError, httpx2.HTTPError, OSError, ValueError) as error:
        raise SuiteError(
            f"{reader.title}: `datasets` cannot load {source.data_files or source.path}: {one_line(error)}; ask "
            "for access, or give the file as published in a YAML: {suite: ..., reader: ..., data: ..., max_tokens: ...}"
        ) from error
    splits: Mapping[str, Iterable[Mapping[str, Json]]] = {source.split: loaded} if source.split else loaded
    for split, rows in splits.items():
        for number, row in enumerate(rows, start=1):
            named = row if source.split else {**row, "category": split}
            yield f"{source.path} {split}, row {number}", named


def _github(repository: str, commit: str, file: str) -> DatasetSource:
    return DatasetSource("csv", data_files=f"https://raw.githubusercontent.com/{repository}/{commit}/{file}")


def _harmbench(category: str, num_prompts: int) -> Reader:
    columns = frozenset(category.split("|"))
    return Reader(
        title=f"HarmBench ({category.replace('|', ' and ')} behaviours)",
        kind="harmfulness",
        form=Form(
            ("Behavior",),
            ("SemanticCategory",),
            ("ContextString",),
            "en",
            ("FunctionalCategory", columns),
        ),
        source=_github(
            "centerforaisafety/HarmBench",
            "c0423b952435fcc8467108d8f25962dbae5b7de2",
            "data/behavior_datasets/harmbench_behaviors_text_all.csv",
        ),
        num_prompts=num_prompts,
        licence="MIT",
        paper="Mazeika et al. 2024, arXiv 2402.04249",
    )


def _catqa(language: str, name: str) -> Reader:
    return Reader(
        title=f"CatQA, {name}",
        kind="harmfulness",
        form=Form(("Question",), ("Category",), language=language),
        source=DatasetSource("declare-lab/CategoricalHarmfulQA", split=language),
        num_prompts=550,
        licence="Apache-2.0",
        paper="Bhardwaj et al. 2024, arXiv 2402.11746",
    )


def _jailbreakbench(split: str, kind: Literal["harmfulness", "over_refusal"]) -> Reader:
    return Reader(
        title=f"JailbreakBench ({split} behaviours)",
        kind=kind,
        form=Form(("Goal",), ("Category",), language="en"),
        source=DatasetSource(
            "JailbreakBench/JBB-Behaviors", "behaviors", split, "886acc352a31533ffbcf4ef22c744658688086fc"
        ),
        num_prompts=100,
        licence="MIT",
        paper="Chao et al. 2024, arXiv 2404.01318",
    )


READERS: dict[str, Reader] = {
    "hexphi": Reader(
        title="HEx-PHI",
        kind="harmfulness",
        form=Form(("prompt",), language="en", header=False),
        source=DatasetSource("LLM-Tuning-Safety/HEx-PHI", split=None),
        num_prompts=300,
        licence="HEx-PHI Dataset License Agreement",
        paper="Qi et al. 2023, arXiv 2310.03693",
        # The agreement can be read only by those who ask for access.
        commercial=False,
        gated=True,
    ),
    "directharm4": Reader(
        title="DirectHarm4",
        kind="harmfulness",
        form=Form(("instruction",), language="en"),
        source=DatasetSource("vfleaking/DirectHarm4", split="test"),
        num_prompts=400,
        licence="Apache-2.0",
        paper="Lyu et al. 2024, arXiv 2402.18540",
    ),
    "advbench": Reader(
        title="AdvBench (harmful behaviours)",
        kind="harmfulness",
        form=Form(("goal", "prompt"), language="en"),
        source=_github(
            "llm-attacks/llm-attacks",
            "098262edf85f807224e70ecd87b9d83716bf6b73",
            "data/advbench/harmful_behaviors.csv",
        ),
        num_prompts=520,
        licence="MIT",
        paper="Zou et al. 2023, arXiv 2307.15043",
    ),
    "harmbench": _harmbench("standard|contextual", 300),
    "harmbench_standard": _harmbench("standard", 200),
    "harmbench_contextual": _harmbench("contextual", 100),
    "harmbench_copyright": _harmbench("copyright", 100),
    "jailbreakbench": _jailbreakbench("harmful", "harmfulness"),
    "strongreject": Reader(
        title="StrongREJECT",
        kind="harmfulness",
        form=Form(("forbidden_prompt", "prompt"), language="en"),
        source=_github(
            "alexandrasouly/strongreject",
            "3432b2d696b428f242bd507df96d80f686571d5e",
            "strongreject_dataset/strongreject_dataset.csv",
        ),
        num_prompts=313,
        licence="MIT",
        paper="Souly et al. 2024, arXiv 2402.10260",
    ),
    "catqa_en": _catqa("en", "English"),
    "catqa_zh": _catqa("zh", "Chinese"),
    "catqa_vi": _catqa("vi", "Vietnamese"),
    "sorrybench": Reader(
        title="SORRY-Bench (base prompts, 2025-03)",
        kind="harmfulness",
        form=Form(("turns",), language="en", keep=("prompt_style", frozenset({"base"}))),
        source=DatasetSource("sorry-bench/sorry-bench-202503", revision="612a4e1f45db8adf884fa62318ddf9fa1c6e75e9"),
        num_prompts=440,
        licence="SORRY-Bench Dataset License Agreement",
        paper="Xie et al. 2024, arXiv 2406.14598",
        gated=True,
    ),
    "beavertails_evaluation": Reader(
        title="BeaverTails-Evaluation",
        kind="harmfulness",
        form=Form(("prompt",), language="en"),
        source=DatasetSource("PKU-Alignment/BeaverTails-Evaluation", split="test"),
        num_prompts=700,
        licence="CC-BY-NC-4.0",
        paper="Ji et al. 2023, arXiv 2307.04657",
        commercial=False,
    ),
    "xstest": Reader(
        title="XSTest (safe prompts)",
        kind="over_refusal",
        form=Form(("prompt",), ("type",), language="en", keep=("label", frozenset({"safe"}))),
        source=DatasetSource("Paul/XSTest"),
        num_prompts=250,
        licence="CC-BY-4.0",
        paper="Röttger et al. 2023, arXiv 2308.01263",
    ),
    "orbench_hard": Reader(
        title="OR-Bench (hard-1k)",
        kind="over_refusal",
        form=Form(("prompt",), language="en"),
        source=DatasetSource("bench-llm/or-bench", "or-bench-hard-1k"),
        num_prompts=1319,
        licence="CC-BY-4.0",
        paper="Cui et al. 2024, arXiv 2405.20947",
    ),
    "jailbreakbench_benign": _jailbreakbench("benign", "over_refusal"),
}
"""Name of a suite, or of the `reader` of one's own YAML -> the published set."""
