"""Models whose vocabularies grew, were padded or number their tokens otherwise."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fleet.checkpoint.headers import plan_shards, shard_name
from fleet.checkpoint.opened import open_model_folder
from fleet.checkpoint.shards import Output, Shard
from fleet.core.errors import CheckpointError, ManifestError
from fleet.fusion import AnyFusionMethod, Dare, TaskArithmetic, Ties, WeightAverage, streaming
from fleet.fusion.member import Member
from fleet.manifest import load_manifest
from fleet.methods import WiseFt
from fleet.run.plan import Plan, make_plan
from fleet.store import open_store
from fleet.work.fusing import FuseUnit
from fleet.work.realigning import RealignUnit
from fleet.work.tensor_worker import TensorWorker
from tests.catalogue import manifest_document, write_manifest
from tests.pico import HIDDEN_SIZE, VOCAB_SIZE, make_adapter, make_model
from tests.work.test_workers import weights_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
AVERAGE = WeightAverage(method="weight_average")
SUM = TaskArithmetic(method="task_arithmetic", scale=0.5)
TIES = Ties(method="ties", density=0.5, scale=1.0)
DARE = Dare(method="dare", drop_rate=0.5, scale=1.0)


def edit_model(
    folder: Path, start: Path, new: Sequence[str] = (), padding: int = 0, order: random.Random | None = None
) -> Path:
    """Write the model at `start` with tokens added, then rows of padding, then numbered anew if `order` is given."""
    shutil.copytree(start, folder)
    tensors, path = load_file(folder / "model.safetensors"), folder / "tokenizer.json"
    tokenizer, generator = json.loads(path.read_text()), torch.Generator().manual_seed(len(new))
    fields = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    rows = VOCAB_SIZE + len(new) + padding
    ids = list(range(rows))
    tokenizer["added_tokens"] += [{"id": VOCAB_SIZE + i, "content": t, **fields} for i, t in enumerate(new)]
    if order is not None:
        order.shuffle(ids)
        # The library gives ids of its own to added tokens that the model's vocabulary doesn't have.
        vocab = tokenizer["model"]["vocab"] | {t: VOCAB_SIZE + i for i, t in enumerate(new)}
        tokenizer["model"]["vocab"] = {t: ids[i] for t, i in sorted(vocab.items(), key=lambda item: ids[item[1]])}
        for entry in tokenizer["added_tokens"]:
            entry["id"] = ids[entry["id"]]
        tokenizer["added_tokens"].sort(key=lambda entry: entry["id"])
        bos = tokenizer["post_processor"]["special_tokens"]["<s>"]
        bos["ids"] = [ids[i] for i in bos["ids"]]
    path.write_text(json.dumps(tokenizer))
    for name in (EMBEDDING, HEAD):
        if name in tensors:
            more = torch.randn(rows - VOCAB_SIZE, HIDDEN_SIZE, generator=generator) * 0.2
            table = torch.cat([tensors[name].float(), more])
            tensors[name] = torch.empty_like(table).index_copy_(0, torch.tensor(ids), table).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "generation_config.json"):
        config = json.loads((folder / file).read_text())
        config |= {k: ids[v] for k, v in config.items() if k.endswith("_token_id") and isinstance(v, int)}
        config |= {"vocab_size": rows} if file == "config.json" else {}
        (folder / file).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`aligned` and `unaligned`; `one` and `two`, fine-tuned; and these with other vocabularies."""
    root = tmp_path_factory.mktemp("fleet")
    for seed, name in enumerate(("unaligned", "aligned", "one", "two")):
        make_model(root / name, seed, tie=bool(request.param))
    edit_model(root / "shuffled", root / "two", order=random.Random(0))
    edit_model(root / "padded", root / "two", padding=9)
    edit_model(root / "tools", root / "one", ("<tool>", "<end>"))
    edit_model(root / "ends", root / "two", ("<end>", "<begin>"), padding=3, order=random.Random(1))
    make_adapter(root / "lora", root / "aligned", 5)
    return root


def plan_of(root: Path | str, work: Path, vocabulary: object, models: Sequence[str]) -> Plan:
    """Of the models below a folder or an address."""
    document = manifest_document(
        work,
        work,
        base={name: f"{root}/{name}" for name in ("unaligned", "aligned")},
        models=[{"name": name, "source": f"{root}/{name}"} for name in models],
        variants=[{"name": "v", "realign": None, "fuse": {"method": "weight_average"}}],
        evaluation={"harmfulness": ["lm_harm"], "references": ["aligned"], "folders": [str(work)]},
        checkpoint={} if vocabulary is None else {"vocabulary": vocabulary},
    )
    (work / "lm_harm.yaml").write_text(
        "suite: lm_harm\nkind: harmfulness\ndata: h.jsonl\nmax_tokens: 1\nrules: {refusal: ['a'], compliance: ['b']}\n"
    )
    (work / "h.jsonl").write_text('{"prompt": "x"}\n')
    return make_plan(load_manifest(write_manifest(work / "models.json", document)))


def shards_of(plan: Plan, shard_bytes: int) -> list[Shard]:
    groups = plan_shards(plan.bases.aligned_model.tensors.values(), shard_bytes)
    files = [shard_name(i, len(groups)) for i in range(len(groups))]
    index = {n: f for f, names in zip(files, groups, strict=True) for n in names}
    return [Shard(f, tuple(g), index if i == 0 else None) for i, (f, g) in enumerate(zip(files, groups, strict=True))]


def fused(
    plan: Plan,
    out: Path,
    method: AnyFusionMethod,
    weights: Mapping[str, float],
    shard_bytes: int = 10**9,
) -> Path:
    from fleet.steps.fuse import FuseStep
    from fleet.steps.sources import Source

    (step,) = (s for s in plan.steps if isinstance(s, FuseStep))
    members = {n: m for n, m in step.members.items() if n in weights and isinstance(m, Source)}
    units = tuple(Member(name, m.uri) for name, m in members.items())
    method = method.model_copy(update={"weights": dict(weights)})
    for shard in shards_of(plan, shard_bytes):
        unit = FuseUnit(plan.bases.aligned.uri, units, method, False, None, shard, Output(str(out), "m"))
        TensorWorker().run(unit)
    return out / "m"


def ids_of(folder: Path) -> dict[str, int]:
    return AutoTokenizer.from_pretrained(folder).get_vocab()


def rows_of(folder: Path, name: str = EMBEDDING) -> dict[str, torch.Tensor]:
    """Token -> its row, float32, by the library's reading of the folder's own tokenizer."""
    table = weights_of(folder)[name].float()
    return {token: table[i] for token, i in ids_of(folder).items()}


def tables(folder: Path) -> list[str]:
    return [name for name in (EMBEDDING, HEAD) if name in weights_of(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_generates(folder: Path, prompt: str) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    assert len(tokenizer) <= model.config.vocab_size
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    tied = model.get_input_embeddings().weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert tied == (HEAD not in weights_of(folder))
    text: Any = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    found = model.generate(**text, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert found.shape[1] == text["input_ids"].shape[1] + 4
    assert tokenizer.decode(text["input_ids"][0]).endswith(prompt)


def test_vocabulary_that_grew_is_refused_with_the_way_out_unless_asked_for(fleet: Path, tmp_path: Path) -> None:
    for vocabulary in (None, "refuse"):
        with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is .*set checkpoint\.vocabulary"):
            plan_of(fleet, tmp_path, vocabulary, ["one", "tools"])


def test_vocabulary_of_the_same_size_numbered_otherwise_refused_unless_asked_for(fleet: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"shuffled: its tokenizer numbers .*set checkpoint\.vocabulary"):
        plan_of(fleet, tmp_path, None, ["one", "shuffled"])
    assert plan_of(fleet, tmp_path, "aligned", ["one", "shuffled"]).steps


@pytest.mark.parametrize("method", [AVERAGE, SUM, TIES, DARE], ids=lambda m: m.method)
@pytest.mark.parametrize("other", ["shuffled", "padded"])
def test_vocabulary_aligned_of_the_same_tokens_gives_the_same_bytes(
    fleet: Path, tmp_path: Path, other: str, method: AnyFusionMethod
) -> None:
    """A model numbered otherwise, or padded, fuses as the same model numbered as the aligned one."""
    method = method.model_copy(update={"seed": 3}) if method is DARE else method
    plan = plan_of(fleet, tmp_path, "aligned", ["one", other])
    twin = tmp_path / "twin"
    shutil.copytree(fleet, twin)
    shutil.rmtree(twin / other)
    (twin / "two").rename(twin / other)
    plain = plan_of(twin, tmp_path, "aligned", ["one", other])
    weights = {"one": 0.25, other: 0.75}
    ours, theirs = fused(plan, tmp_path / "a", method, weights), fused(plain, tmp_path / "b", method, weights)
    assert contents(ours) == contents(theirs)
    assert not plain.bases.aligned.uri.startswith("vocabulary:")


def test_vocabulary_aligned_drops_added_tokens_and_keeps_the_aligned_files(fleet: Path, tmp_path: Path) -> None:
    plan = plan_of(fleet, tmp_path, "aligned", ["tools", "ends"])
    folder = fused(plan, tmp_path / "out", SUM, {"tools": 1.0, "ends": 1.0})
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / file).read_bytes() == (fleet / "aligned" / file).read_bytes()
    for table in tables(folder):
        aligned, tools, ends = (rows_of(fleet / name, table) for name in ("aligned", "tools", "ends"))
        found = rows_of(folder, table)
        assert found.keys() == aligned.keys()
        for token, row in found.items():
            expected = aligned[token] + 0.5 * (tools[token] - aligned[token]) + 0.5 * (ends[token] - aligned[token])
            torch.testing.assert_close(row, expected.bfloat16().float(), rtol=1e-2, atol=1e-3)
    assert_generates(folder, "do 1")


def test_vocabulary_union_appends_added_tokens_by_model_then_id(fleet: Path, tmp_path: Path) -> None:
    plan = plan_of(fleet, tmp_path, "union", ["tools", "ends"])
    folder = fused(plan, tmp_path / "out", AVERAGE, {"tools": 0.25, "ends": 0.75})
    assert {t: i for t, i in ids_of(folder).items() if i >= VOCAB_SIZE} == {
        "<tool>": VOCAB_SIZE, "<end>": VOCAB_SIZE + 1, "<begin>": VOCAB_SIZE + 2,
    }  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == VOCAB_SIZE + 3
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("a<end>", add_special_tokens=False) == [ids_of(folder)["a"], VOCAB_SIZE + 1]
    assert (folder / "chat_template.jinja").read_bytes() == (fleet / "aligned" / "chat_template.jinja").read_bytes()
    for table in tables(folder):
        tools, ends = (rows_of(fleet / name, table) for name in ("tools", "ends"))
        found = rows_of(folder, table)
        assert torch.equal(found["<tool>"], tools["<tool>"])
        assert torch.equal(found["<begin>"], ends["<begin>"])
        for token in ("<end>", "a", "</s>"):
            expected = 0.25 * tools[token] + 0.75 * ends[token]
            torch.testing.assert_close(found[token], expected.bfloat16().float(), rtol=1e-2, atol=2e-3)
    assert_generates(folder, "do<tool>1<begin>")


def nest(folder: Path) -> None:
    """Put the language model's fields where a vision-language model's `config.json` has them."""
    text = json.loads((folder / "config.json").read_text())
    outer = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "eos_token_id": 2}
    outer["tie_word_embeddings"] = text["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(outer | {"text_config": text}))


def test_vocabulary_is_written_where_a_nested_config_has_it(fleet: Path, tmp_path: Path) -> None:
    root = tmp_path / "nested"
    for name in ("unaligned", "aligned", "tools"):
        nest(Path(shutil.copytree(fleet / name, root / name)))
    plan = plan_of(root, tmp_path, "union", ["tools"])
    written = json.loads(
        (
            fused(plan, tmp_path / "out", WeightAverage(method="weight_average"), {"tools": 1}) / "config.json"
        ).read_text()
    )
    assert written["text_config"]["vocab_size"] == VOCAB_SIZE + 2
    assert written.keys() == {"architectures", "model_type", "eos_token_id", "tie_word_embeddings", "text_config"}


def untie(folder: Path, start: Path) -> None:
    """What PEFT's merge leaves of a tied model: a head of its own, equal to the embedding."""
    shutil.copytree(start, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


@pytest.mark.parametrize("vocabulary", [None, "union"])
def test_model_that_was_untied_fuses_to_the_bytes_of_the_tied_one(tmp_path: Path, vocabulary: str | None) -> None:
    for seed, name in enumerate(("unaligned", "aligned", "one")):
        make_model(tmp_path / "t" / name, seed)
    if vocabulary is not None:
        edit_model(tmp_path / "t" / "more", tmp_path / "t" / "one", ("<tool>",))
    model = "one" if vocabulary is None else "more"
    shutil.copytree(tmp_path / "t", tmp_path / "u", ignore=shutil.ignore_patterns(model))
    untie(tmp_path / "u" / model, tmp_path / "t" / model)
    written: dict[str, Path] = {}
    for root in ("t", "u"):
        plan, average = plan_of(tmp_path / root, tmp_path, vocabulary, [model]), WeightAverage(method="weight_average")
        written[root] = fused(plan, tmp_path / f"out-{root}", average, {model: 1})
    assert contents(written["t"]) == contents(written["u"])


@pytest.mark.parametrize("method", [SUM, TIES, DARE], ids=lambda m: m.method)
def test_vocabulary_union_keeps_the_row_of_a_token_that_one_model_added(
    fleet: Path, tmp_path: Path, method: AnyFusionMethod
) -> None:
    plan = plan_of(fleet, tmp_path, "union", ["one", "tools", "ends"])
    folder = fused(plan, tmp_path / "out", method, {"one": 1.0, "tools": 1.0, "ends": 1.0})
    for table in tables(folder):
        found = rows_of(folder, table)
        assert torch.equal(found["<tool>"], rows_of(fleet / "tools", table)["<tool>"])
        assert torch.equal(found["<begin>"], rows_of(fleet / "ends", table)["<begin>"])


def test_vocabulary_of_a_model_has_its_numbering_and_its_files(fleet: Path, tmp_path: Path) -> None:
    plan = plan_of(fleet, tmp_path, {"model": "ends"}, ["tools", "ends"])
    weights = {"tools": 0.25, "ends": 0.75}
    folder = fused(plan, tmp_path / "out", AVERAGE, weights)
    union = fused(plan_of(fleet, tmp_path, "union", ["tools", "ends"]), tmp_path / "union", AVERAGE, weights)
    assert ids_of(folder) == ids_of(fleet / "ends")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / file).read_bytes() == (fleet / "ends" / file).read_bytes()
    for table in tables(folder):
        found, other = rows_of(folder, table), rows_of(union, table)
        assert found.keys() == other.keys() - {"<tool>"}
        assert all(torch.equal(row, other[token]) for token, row in found.items())
    assert_generates(folder, "do<begin>1")


@pytest.mark.parametrize("vocabulary", ["aligned", "union", {"model": "tools"}], ids=str)
def test_vocabulary_of_a_model_read_under_other_names_gives_the_same_bytes(
    fleet: Path, tmp_path: Path, vocabulary: object
) -> None:
    """Its tensors are named as torch.compile leaves them, so it is a view of its files before it is read by tokens."""
    weights = {"one": 0.25, "tools": 0.75}
    plain = plan_of(fleet, tmp_path, vocabulary, ["one", "tools"])
    twin = tmp_path / "twin"
    shutil.copytree(fleet, twin)
    tensors = load_file(twin / "tools" / "model.safetensors")
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    save_file(compiled, twin / "tools" / "model.safetensors", metadata={"format": "pt"})
    plan = plan_of(twin, tmp_path, vocabulary, ["one", "tools"])
    ours, theirs = fused(plan, tmp_path / "a", AVERAGE, weights), fused(plain, tmp_path / "b", AVERAGE, weights)
    assert contents(ours) == contents(theirs)


@pytest.mark.parametrize("vocabulary", ["aligned", "union", {"model": "ends"}], ids=str)
def test_vocabulary_bytes_are_the_same_at_any_shards_and_runs(
    fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: object
) -> None:
    plan = plan_of(fleet, tmp_path, vocabulary, ["tools", "ends", "lora"])
    weights = {"tools": 0.5, "ends": 0.25, "lora": 0.25}
    one = fused(plan, tmp_path / "one", TIES, weights)
    many = fused(plan, tmp_path / "many", TIES, weights, 20_000)
    monkeypatch.setattr(streaming, "RUN_ENTRIES", 7 * HIDDEN_SIZE)
    short = fused(plan, tmp_path / "short", TIES, weights)
    assert contents(one) == contents(short)
    assert len(list(many.glob("*.safetensors"))) > 2
    assert weights_of(one).keys() == weights_of(many).keys()
    assert all(torch.equal(value, weights_of(many)[name]) for name, value in weights_of(one).items())
    small = {name: data for name, data in contents(one).items() if not name.startswith("model")}
    assert small.items() <= contents(many).items()


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["aligned", "union", {"model": "ends"}], ids=str)
def test_vocabulary_candidates_load_where_they_are_scored_in_one_vocabulary(
    fleet: Path, tmp_path: Path, vocabulary: object
) -> None:
    plan = plan_of(fleet, tmp_path, vocabulary, ["tools", "ends"])
    found: list[dict[str, int]] = []
    for uri in (plan.bases.aligned.uri, *(plan_source(plan, name) for name in ("tools", "ends"))):
        folder = open_model_folder(uri).local(tmp_path / "scratch")
        assert_generates(folder, "do 1")
        found.append(ids_of(folder))
    assert found[0] == found[1] == found[2]


def plan_source(plan: Plan, name: str) -> str:
    from fleet.steps.sources import Source

    (weights,) = (c.weights for c in plan.candidates if c.name == name)
    assert isinstance(weights, Source)
    return weights.uri


def test_vocabulary_union_model_realigned_keeps_its_rows_and_loads(fleet: Path, tmp_path: Path) -> None:
    plan = plan_of(fleet, tmp_path, "union", ["tools", "ends"])
    (shard,) = shards_of(plan, 10**9)
    unit = RealignUnit(
        aligned=plan.bases.aligned.uri, unaligned=plan.bases.unaligned.uri, model=plan_source(plan, "ends"),
        safety=None, harmful=None, displacement=str(tmp_path), projections=None,
        method=WiseFt(method="wise_ft", alpha=0.5), edited=frozenset(), targets={}, mask=None, name="ends",
        as_lora=False, shard=shard, output=Output(str(tmp_path / "out"), "m"),
    )  # fmt: skip
    TensorWorker().run(unit)
    folder = tmp_path / "out" / "m"
    found, ends, tools = (rows_of(f) for f in (folder, fleet / "ends", fleet / "tools"))
    aligned = rows_of(fleet / "aligned")
    # WiSE-FT takes the mean with the aligned model everywhere; of an added token that one has the mean of all.
    assert torch.equal(found["<begin>"], ends["<begin>"])
    assert torch.equal(found["<tool>"], tools["<tool>"])
    torch.testing.assert_close(found["a"], (0.5 * (aligned["a"] + ends["a"])).bfloat16().float(), rtol=1e-2, atol=1e-3)
    expected = 0.25 * tools["<end>"] + 0.75 * ends["<end>"]
    torch.testing.assert_close(found["<end>"], expected.bfloat16().float(), rtol=1e-2, atol=2e-3)
    assert_generates(folder, "do<begin>")


def test_vocabulary_identity_follows_contents_and_choice_alone(fleet: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(fleet, tmp_path / "moved"))

    def keys(root: Path, vocabulary: object, *models: str) -> dict[str, str]:
        plan = plan_of(root, tmp_path, vocabulary, models)
        return {s.key.rpartition("/")[0]: s.key for s in plan.steps if s.kind == "survey"}

    assert keys(fleet, "union", "tools", "ends") == keys(moved, "union", "tools", "ends")
    union, aligned = keys(fleet, "union", "tools", "ends"), keys(fleet, "aligned", "tools", "ends")
    assert not set(union.values()) & set(aligned.values())
    # Dropping tokens depends on nobody else's; appending them does, where the others have some.
    assert keys(fleet, "aligned", "tools")["survey/tools"] == aligned["survey/tools"]
    assert keys(fleet, "union", "tools")["survey/tools"] != union["survey/tools"]
    assert keys(fleet, "union", "tools", "one")["survey/tools"] == keys(fleet, "union", "tools")["survey/tools"]
    assert keys(fleet, "aligned", "one") == keys(fleet, "refuse", "one")


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


WORD_PIECE = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "continuing_subword_prefix": "##"}
WORD_PIECE["max_input_chars_per_word"] = 9


def change_kind(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": WORD_PIECE}))


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_tokenizer, r"no tokenizer\.json.*save_pretrained"),
        (change_kind, "tokenizer is WordPiece, the aligned model's WordLevel"),
        (break_tokenizer, "not valid JSON"),
    ],
)
def test_vocabulary_of_a_model_whose_tokens_cannot_be_told_refused(
    fleet: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    root = Path(shutil.copytree(fleet, tmp_path / "fleet"))
    change(root / "tools")
    with pytest.raises(CheckpointError, match=message):
        plan_of(root, tmp_path, "union", ["tools", "ends"])


def test_vocabulary_of_a_model_without_a_tokenizer_is_the_aligned_one_at_its_size(fleet: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(fleet, tmp_path / "fleet"))
    remove_tokenizer(root / "one")
    found, expected = (
        fused(plan_of(r, tmp_path, "union", ["one", "ends"]), tmp_path / n, AVERAGE, {"one": 0.5, "ends": 0.5})
        for r, n in ((root, "a"), (fleet, "b"))
    )
    assert contents(found) == contents(expected)


def test_vocabulary_named_after_no_full_model_refused(fleet: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"checkpoint\.vocabulary: lora is an adapter"):
        plan_of(fleet, tmp_path, {"model": "lora"}, ["one", "lora"])
    with pytest.raises(ManifestError, match=r"checkpoint\.vocabulary: no model is named five"):
        plan_of(fleet, tmp_path, {"model": "five"}, ["one", "lora"])


def test_vocabulary_union_takes_slots_that_pad_the_aligned_tables(fleet: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(fleet, tmp_path / "fleet"))
    shutil.rmtree(root / "aligned")
    edit_model(root / "aligned", fleet / "aligned", padding=2)
    plan = plan_of(root, tmp_path, "union", ["tools", "ends"])
    folder = fused(plan, tmp_path / "out", AVERAGE, {"tools": 0.5, "ends": 0.5})
    assert ids_of(folder)["<begin>"] == VOCAB_SIZE + 2
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == VOCAB_SIZE + 3
    assert torch.equal(rows_of(folder)["<begin>"], rows_of(fleet / "ends")["<begin>"])
    plan = plan_of(root, tmp_path, "union", ["tools"])
    folder = fused(plan, tmp_path / "two", AVERAGE, {"tools": 1.0})
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == VOCAB_SIZE + 2
    assert_generates(folder, "<tool>")


def test_vocabulary_of_several_dtypes_keeps_every_row_exact(fleet: Path, tmp_path: Path) -> None:
    """A bfloat16 model without a float32 aligned model's row takes it unrounded: no task vector where it has none."""
    root = Path(shutil.copytree(fleet, tmp_path / "fleet"))
    generator = torch.Generator().manual_seed(9)
    path = root / "aligned" / "model.safetensors"
    values = {n: torch.randn(t.shape, generator=generator) for n, t in load_file(path).items()}
    save_file(values, path, metadata={"format": "pt"})
    tokenizer = json.loads((root / "tools" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["é"] = vocab.pop("a")
    (root / "tools" / "tokenizer.json").write_text(json.dumps(tokenizer))
    folder = fused(plan_of(root, tmp_path, "union", ["tools"]), tmp_path / "out", SUM, {"tools": 1.0})
    assert torch.equal(rows_of(folder)["a"], rows_of(root / "aligned")["a"])
    assert torch.equal(rows_of(folder)["<tool>"], rows_of(fleet / "tools")["<tool>"])


def test_vocabulary_adapter_that_holds_a_table_of_another_size_refused_with_the_way_out(
    fleet: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(fleet, tmp_path / "fleet"))
    if HEAD not in weights_of(root / "aligned"):
        pytest.skip("an adapter may not change one use of a tied table at all")
    make_adapter(root / "saved", root / "aligned", 6, modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is .*merge_and_unload.*checkpoint\.vocabulary"):
        plan_of(root, tmp_path, "union", ["tools", "saved"])


def test_vocabulary_union_keeps_what_a_model_says_of_its_token_in_old_files_too(fleet: Path, tmp_path: Path) -> None:
    """transformers 4 lists added tokens in `tokenizer_config.json` again, and in `added_tokens.json`."""
    root = Path(shutil.copytree(fleet, tmp_path / "fleet"))
    path = root / "tools" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    (entry,) = (e for e in tokenizer["added_tokens"] if e["content"] == "<end>")
    entry |= {"special": True, "rstrip": True}
    path.write_text(json.dumps(tokenizer))
    known = json.loads((root / "aligned" / "tokenizer.json").read_text())["added_tokens"]
    config = json.loads((root / "aligned" / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in known}
    (root / "aligned" / "tokenizer_config.json").write_text(json.dumps(config))
    (root / "aligned" / "added_tokens.json").write_text(json.dumps({e["content"]: e["id"] for e in known}))
    folder = fused(plan_of(root, tmp_path, "union", ["tools", "one"]), tmp_path / "out", SUM, {"tools": 1.0})
    decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder[str(VOCAB_SIZE + 1)]["content"] == "<end>"
    assert json.loads((folder / "added_tokens.json").read_text())["<tool>"] == VOCAB_SIZE
    found = AutoTokenizer.from_pretrained(folder)
    ids = found.encode("a<end> <tool>", add_special_tokens=False)
    assert ids == [ids_of(folder)["a"], VOCAB_SIZE + 1, VOCAB_SIZE]
    assert found.decode(ids, skip_special_tokens=True) == "a<tool>"


def test_vocabulary_union_of_byte_level_tokenizers_splits_text_as_the_aligned_one(fleet: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    root = Path(shutil.copytree(fleet, tmp_path / "fleet"))
    byte_level: Any = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(vocab_size=80, special_tokens=["<s>", "</s>"], show_progress=False)
    byte_level.train_from_iterator(["the cat sat on the mat", "the hat"], trainer)
    for name in ("aligned", "unaligned"):
        byte_level.save(str(root / name / "tokenizer.json"))
    byte_level.add_tokens(["the dog"])
    byte_level.save(str(root / "one" / "tokenizer.json"))
    plan = plan_of(root, tmp_path, "union", ["one"])
    folder = fused(plan, tmp_path / "out", AVERAGE, {"one": 1.0})
    before, after = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (root / "aligned", folder))
    text = "the cat sat on that mat"
    assert before.encode(text).ids == after.encode(text).ids
    new = after.token_to_id("the dog")
    assert after.encode("the dog").ids == [new] == [before.get_vocab_size()]
    expected = weights_of(root / "one")[EMBEDDING]
    assert torch.equal(weights_of(folder)[EMBEDDING][new], expected[new])


def test_vocabulary_of_models_on_s3_gives_the_same_bytes(fleet: Path, tmp_path: Path, s3_bucket: str) -> None:
    names = ("unaligned", "aligned", "tools", "ends")
    store = open_store(f"s3://{s3_bucket}/fleet")
    for file in (f for name in names for f in (fleet / name).iterdir()):
        store.replace(f"{file.parent.name}/{file.name}", file.read_bytes())
    weights = {"tools": 0.5, "ends": 0.5}
    a, b = (
        fused(plan_of(root, tmp_path, "union", names[2:]), tmp_path / name, TIES, weights)
        for name, root in (("a", store.uri), ("b", fleet))
    )
    assert contents(a) == contents(b)
