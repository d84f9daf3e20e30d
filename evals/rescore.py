"""Judge a log again, without generating: `python -m evals.rescore LOG --judge JSON --out LOG2`.

LOG is a file of an eval log or a folder with the parts of one: what a report links to, on this machine or in s3://. The
completions, ids and token counts stay as they are; labels, scores and the judge's words are new.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence, Set
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from evals.config import Evaluation
from evals.engine import EngineOptions, ServedModel, engine_length
from evals.judges import Judge, ModelJudge, make_judge
from evals.judging import ask_model, judged_sample
from evals.logs import Origin, Sample, read_origin, read_samples, write_samples
from evals.rates import Rate
from evals.suites import BUNDLED_SUITES, Suite, load_suite, read_prompts
from evals.verdicts import Exchange, Verdict
from fleet.core.errors import FleetError, InputError, report_error
from fleet.store import open_folder


class Rescored(BaseModel):
    """What judging again found."""

    rate: Rate
    labels: dict[str, int]
    agreement: float | None
    """Share of the samples that both judges scored and scored alike; None if there is none."""
    kappa: float | None
    """Cohen's: agreement beyond chance; None where one judge says the same of every sample."""


def rescore(parts: Sequence[bytes], judge: Judge | ModelJudge, suite: Suite) -> tuple[bytes, Rescored]:
    """The log with new verdicts, as one file, and what they add up to.

    Args:
        parts: The files of the log.
        judge: Who judges now; a model judge is started on this machine.
        suite: The suite of the log.

    Raises:
        InputError: The parts are not one log of this suite.
        SuiteError: The suite lacks what the judge needs.
    """
    samples = [sample for part in parts for sample in read_samples(part)]
    if not samples:
        raise InputError("the log holds no sample")
    origin = _one_origin(parts, suite, {sample.prompt for sample in samples})
    verdicts = _verdicts(judge, [Exchange(s.prompt, s.completion) for s in samples], suite)
    judged = [_again(suite, sample, verdict) for sample, verdict in zip(samples, verdicts, strict=True)]
    new = origin.model_copy(update={"judge": json.dumps(judge.settings(), sort_keys=True)})
    both = [
        (a.score, b.score) for a, b in zip(samples, judged, strict=True) if a.score is not None and b.score is not None
    ]
    found = Rescored(
        rate=Rate.of([s.score for s in judged], higher_is_better=False),
        labels=dict(sorted(Counter(s.label for s in judged).items())),
        agreement=sum(a == b for a, b in both) / len(both) if both else None,
        kappa=cohens_kappa(both),
    )
    return write_samples(judged, new), found


def cohens_kappa(pairs: Sequence[tuple[float, float]]) -> float | None:
    """(p_o − p_e) / (1 − p_e) of two judges' 0/1 scores (Cohen, 1960); None where chance agreement is certain."""
    if not pairs:
        return None
    n = len(pairs)
    observed = sum(a == b for a, b in pairs) / n
    ones = [sum(pair[i] for pair in pairs) / n for i in (0, 1)]
    expected = ones[0] * ones[1] + (1 - ones[0]) * (1 - ones[1])
    return None if expected == 1.0 else (observed - expected) / (1 - expected)


def _again(suite: Suite, sample: Sample, verdict: Verdict) -> Sample:
    """The sample with its new verdict; its coherence stays, since no judge decides it."""
    judged = judged_sample(suite, sample, verdict, None, sample.mean_logprob)
    return judged.model_copy(update={"coherent": sample.coherent})


def _one_origin(parts: Sequence[bytes], suite: Suite, prompts: Set[str]) -> Origin:
    origins = {read_origin(part).model_dump_json() for part in parts}
    if len(origins) != 1:
        raise InputError("these files are parts of more than one log")
    origin = Origin.model_validate_json(origins.pop())
    is_part = prompts < set(read_prompts(suite))  # one side of the suite, or what a limit left
    if origin.suite_digest != suite.digest and not is_part:
        raise InputError(f"the log is of another suite {origin.suite}: its digest is {origin.suite_digest}")
    return origin


def _verdicts(judge: Judge | ModelJudge, exchanges: Sequence[Exchange], suite: Suite) -> list[Verdict]:
    if isinstance(judge, Judge):
        return judge.judge(exchanges, suite)
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))  # no other engine is here to share them with
    from evals.replicas import Replica  # noqa: PLC0415 - loads vLLM, which rule judges do without

    with tempfile.TemporaryDirectory() as scratch:
        folder = open_folder(judge.model).local(Path(scratch))
        config = json.loads((folder / "config.json").read_bytes())
        replica = Replica(
            folder, EngineOptions(max_model_len=engine_length(config, None, str(folder)), max_lora_rank=0)
        )
        with closing(replica), replica.serving(ServedModel("judge", judge.model)) as session:
            return ask_model(session, judge, exchanges, suite)


def _read(uri: str) -> list[bytes]:
    """One file, or every Parquet file of a folder in order of name."""
    location, _, name = uri.rpartition("/")
    if uri.endswith(".parquet"):
        return [open_folder(location or ".").read(name)]
    folder = open_folder(uri)
    names = sorted(name for name in folder.files() if name.endswith(".parquet"))
    if not names:
        raise InputError(f"{uri}: no Parquet file there")
    return [folder.read(name) for name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 2 for what the user can mend, else 1."""
    parser = argparse.ArgumentParser(prog="python -m evals.rescore", description=str(__doc__).split(":")[0])
    parser.add_argument("log", help="a .parquet file of a log, or the folder with its parts")
    parser.add_argument("--judge", required=True, help='as in a manifest, e.g. {"kind": "rule"}')
    parser.add_argument("--suite", help="the suite's name or YAML file; by default the log's own, among the bundled")
    parser.add_argument("--out", required=True, type=Path, help="where the new log goes")
    options = parser.parse_args(arguments)
    try:
        parts = _read(options.log)
        suite = load_suite(options.suite or read_origin(parts[0]).suite, [BUNDLED_SUITES])
        data, found = rescore(parts, make_judge(_judge_spec(options.judge)), suite)
    except FleetError as error:
        return report_error(error)
    options.out.write_bytes(data)
    print(found.model_dump_json(indent=2))
    return 0


def _judge_spec(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
        spec = Evaluation.model_validate({"harmfulness": ["any"], "judge": document}).judge
    except ValueError as error:
        raise InputError(f"--judge: {' '.join(str(error).split())}") from error
    return spec.model_dump(mode="json")


if __name__ == "__main__":
    sys.exit(main())
