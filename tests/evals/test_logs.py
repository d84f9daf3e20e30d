from __future__ import annotations

import io

import hypothesis.strategies as st
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from evals.logs import EvalLog, Origin, Sample, read_origin, read_samples, write_samples
from evals.rates import Rate
from fleet.core.errors import EvalError

ORIGIN = Origin(candidate="c", identity="sha256:1", suite="s", suite_digest="sha256:2", judge="{}", engine="{}")


def sample(id_: str, **changes: object) -> Sample:
    fields = {
        "prompt": "p",
        "input": "i",
        "completion": "c",
        "target": "",
        "score": 1.0,
        "label": "harmful",
        "reason": "r",
    }
    return Sample.model_validate({"id": id_} | fields | changes)


texts = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=20)


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            Sample,
            id=texts, prompt=texts, input=texts, completion=texts, target=texts, label=texts, reason=texts,
            score=st.none() | st.floats(allow_nan=False), refused=st.none() | st.booleans(),
            p_harmful=st.none() | st.floats(0, 1), coherent=st.none() | st.booleans(),
            num_tokens=st.none() | st.integers(0, 2**40), finish_reason=st.none() | texts,
        ),
        max_size=4,
    )
)  # fmt: skip
def test_samples_survive_the_file_and_give_the_same_bytes(samples: list[Sample]) -> None:
    data = write_samples(samples, ORIGIN)
    assert read_samples(data) == samples
    assert write_samples(samples, ORIGIN) == data


def test_file_is_a_table_that_needs_no_other() -> None:
    table = pq.read_table(io.BytesIO(write_samples([sample("a"), sample("b", score=None)], ORIGIN)))
    assert table.column("candidate").to_pylist() == ["c", "c"]
    assert table.column("score").to_pylist() == [1.0, None]
    assert read_origin(write_samples([sample("a")], ORIGIN)) == ORIGIN


def test_file_of_something_else_refused() -> None:
    with pytest.raises(EvalError, match="no log"):
        read_samples(b"PAR1")
    table = pq.read_table(io.BytesIO(write_samples([sample("a")], ORIGIN))).drop_columns(["reason"])
    target = io.BytesIO()
    pq.write_table(table, target)
    with pytest.raises(EvalError, match="it has no column reason"):
        read_samples(target.getvalue())
    with pytest.raises(EvalError, match="holds no sample"):
        read_origin(write_samples([], ORIGIN))


def test_log_survives_its_summary_and_its_parts() -> None:
    samples = [sample("a"), sample("b", score=0.0, label="safe"), sample("c", score=None, label="unscored")]
    log = EvalLog(
        suite="s", suite_digest="d", kind="harmfulness", metric="harmful", rate=Rate.of([1.0, 0.0, None]),
        samples=tuple(samples),
    )  # fmt: skip
    parts = [write_samples(samples[:2], ORIGIN), write_samples(samples[2:], ORIGIN)]
    assert EvalLog.read(log.summary(), parts) == log
    assert log.summary()["labels"] == {"harmful": 1, "safe": 1, "unscored": 1}
