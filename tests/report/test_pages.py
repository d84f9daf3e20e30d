"""What a page shows is text: nothing that a manifest, a suite, a judge or an error says becomes a tag or a script."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import pytest

from evals.rates import Rate
from fleet.report.gather import method_summaries
from fleet.report.model import CandidateRow, Report, Score
from fleet.report.pages import MODULE_COLUMNS, modules_html, report_html
from fleet.work.module_rows import ModuleRow

HOSTILE = """</script><script>alert("&'")</script><b>"""
"""Ends a script, starts one, leaves an attribute of either quote, and opens a tag."""

HARM = Rate.of([1.0, 0.0])


class Page(HTMLParser):
    """What a browser makes of a page: its tags with the names of their attributes, and everything a reader can see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        self.texts += [value for _, value in attrs if value is not None]
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))
        self._in_script = False

    def handle_data(self, data: str) -> None:
        (self.scripts if self._in_script else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def report_of(end: str) -> Report:
    """A report all of whose texts end like this, each beginning with where it stands."""

    def score(suite: str) -> Score:
        return Score(suite=f"{suite}{end}", kind="harmfulness", rate=HARM, samples=f"samples{end}", prompts=9)

    def row(name: str, role: Any) -> CandidateRow:
        return CandidateRow(
            name=f"{name}{end}", role=role, models=(f"model{end}",), parameters={f"key{end}": f"value{end}"},
            weights=f"weights{end}", identity=f"identity{end}", gate="fail", reasons=(f"reason{end}",),
            warning=f"warned{end}", edited=f"edited{end}", incoherent=HARM,
            scores=(score("suite"), score("other"), task),
        )  # fmt: skip

    task = Score(suite=f"task{end}", kind="task", rate=HARM, samples=f"samples{end}")
    rows = (row("tuned", "finetuned"), row("m.label", "realigned"), row("variant", "fused"))
    return Report(
        run_id=f"run{end}", name=f"name{end}", rows=rows, methods=tuple(method_summaries(rows)), computed=0, cached=0,
        failures={f"step{end}": f"error{end}"}, seconds=0.0, artifacts=f"artifacts{end}", best=f"best{end}",
        published=f"version{end}", warnings=(f"because{end}",),
    )  # fmt: skip


SHOWN = (
    "name", "run", "best", "version", "because", "step", "error", "suite", "other", "task", "tuned", "m.label",
    "variant", "label", "edited", "weights", "identity", "warned", "reason", "samples",
)  # fmt: skip


def test_report_page_shows_hostile_text_and_gains_no_tag() -> None:
    hostile = Page(report_html(report_of(HOSTILE)))
    assert hostile.tags == Page(report_html(report_of(""))).tags
    assert [where for where in SHOWN if f"{where}{HOSTILE}" not in hostile.text] == []
    assert json.dumps({f"key{HOSTILE}": f"value{HOSTILE}"}) in hostile.text
    assert not any(HOSTILE in script for script in hostile.scripts)


def test_report_page_chart_draws_no_tag_of_a_hostile_name_and_its_script_goes_on() -> None:
    """plotly draws `<b>` in a name as bold and reads `&lt;` as `<`; `<` itself must not be in the script either."""
    drawn = HOSTILE.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    written = drawn.replace("/", r"\u002f").replace('"', r"\"")
    scripts = "".join(Page(report_html(report_of(HOSTILE))).scripts)
    assert [name for name in ("tuned", "m.label", "variant", "label") if f'"{name}{written}"' not in scripts] == []


def tables_of(end: str) -> dict[str, list[ModuleRow]]:
    edited = ModuleRow(module=f"module{end}", edit=True, reason=f"reason{end}", rank=4, directions=((0.5, 0.25),))
    return {f"candidate{end}": [edited], f"another{end}": [ModuleRow(module="m", edit=False, reason="r", lift=2.5)]}


def test_modules_page_shows_hostile_text_and_gains_no_tag() -> None:
    page = modules_html(f"title{HOSTILE}", tables_of(HOSTILE))
    hostile = Page(page)
    assert hostile.tags == Page(modules_html("title", tables_of(""))).tags
    for where in ("title", "candidate", "another"):
        assert f"{where}{HOSTILE}" in hostile.text
    assert not any(HOSTILE in script for script in hostile.scripts)
    assert page.count("<script") == page.count("</script>") == 2


def test_modules_page_holds_every_row_as_json_in_the_order_of_its_headings() -> None:
    data, _ = Page(modules_html("t", tables_of(HOSTILE))).scripts
    (candidate, ((module, edited, reason, *values),)), (another, (row,)) = json.loads(data).items()
    assert (candidate, module, reason) == tuple(f"{where}{HOSTILE}" for where in ("candidate", "module", "reason"))
    assert (edited, values) == ("yes", [None] * 4 + [4, None, "50.0 → 25.0"])
    assert another == f"another{HOSTILE}"
    assert row == ["m", "no", "r", 2.5] + [None] * 5


def test_modules_page_has_a_heading_for_every_direction_that_some_module_has() -> None:
    page = Page(modules_html("t", tables_of("")))
    assert [tag[0] for tag in page.tags].count("th") == len(MODULE_COLUMNS) - 3 + 1
    assert "u1" in page.texts and "u2" not in page.texts


def test_modules_page_has_no_column_for_what_was_not_measured() -> None:
    rows = [ModuleRow(module=name, edit=False, reason="r", cosine=value) for name, value in (("a", None), ("b", 0.0))]
    page = Page(modules_html("t", {"c": rows}))
    assert "cos" in page.texts and not {"lift", "ρ", "ρ, z", "u1"} & set(page.texts)
    assert not any("output directions" in text for text in page.texts)
    ((_, (_, second)),) = json.loads(page.scripts[0]).items()
    assert second == ["b", "no", "r", 0.0, *[None] * 5]


def test_attribution_page_escapes_what_it_shows() -> None:
    row = ModuleRow(module="</script><b>", edit=True, reason="a < b", directions=((0.5, 0.25),))
    page = modules_html("<t>", {"<m>": [row]})
    assert "</script><b>" not in page and "<t>" not in page and "<m>" not in page
    assert "50.0 → 25.0" in page


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"best": None}, "No fused variant passed."),
        ({"published": "3"}, "held against version"),
        ({"warnings": ("odd",)}, "Warnings"),
        ({"failures": {"fuse/a": "E: x"}}, "Failures"),
    ],
)
def test_report_page_says_so_only_where_it_is_so(change: dict[str, Any], shown: str) -> None:
    plain = report_of("").model_copy(update={"published": None, "failures": {}, "warnings": ()})
    assert shown in Page(report_html(plain.model_copy(update=change))).text
    assert shown not in Page(report_html(plain)).text


def test_same_report_gives_the_same_page() -> None:
    assert report_html(report_of("")) == report_html(report_of(""))
