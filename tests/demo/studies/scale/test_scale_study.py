"""The scale study: what it asks of the stages, how it measures, and what it makes of the figures."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file
from tokenizers import Tokenizer

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.checkpoint.layout import quantizable
from colqwen3.inspection import inspect_folder
from colqwen3.system.errors import UserError
from demo.studies.scale import frontier, study, summary
from demo.studies.scale.contenders import (
    ALL_CONTENDERS,
    CONTENDERS,
    FRONTIER,
    Run,
    byte_budgets,
    group_size,
    pipeline_params,
    plan,
)
from demo.studies.scale.losses import measure_losses, measure_search
from demo.studies.scale.stagehand import run_stage, run_stages
from demo.training.network import Retriever, initialise, published_config, save_published
from demo.training.shapes import SIZES, count_parameters
from stages.budget.knapsack import allocate, items_of
from stages.checking.params import Params
from stages.quantization.allocation import bytes_of, planned_tensors, uniform
from stages.tools.charts import svg


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("micro") / "model"
    tokenizer = Tokenizer.from_file("demo/model/tokenizer.json")
    retriever = Retriever(published_config(SIZES["micro"].shape, tokenizer), tokenizer)
    initialise(retriever, tokenizer, None, 1)
    save_published(retriever, tokenizer, folder)
    return folder


def base() -> dict[str, Any]:
    values: dict[str, Any] = YAML(typ="safe", pure=True).load(Path("params.yaml").read_text())
    return values


def test_later_seeds_run_the_main_contenders_alone() -> None:
    runs = plan(CONTENDERS, (4, 3), (1, 2))
    names = [run.name for run in runs]
    once = sum(contender.weights is not None for contender in CONTENDERS.values())
    assert len(set(names)) == len(names) == 2 * len(CONTENDERS) - once + 2 * 7
    assert names[:2] == ["rounding-w4", "rounding-w3"]
    later = {run.contender for run in runs if run.seed == 2}
    main = {"mixed", "text", "mixed-passages32", "gptq-e2e", "gptq-passages32-e2e"}
    assert later == main | {"gptq-model-e2e", "gptq-model-passages32-e2e"}


def test_params_are_valid_and_hold_every_recipe() -> None:
    runs = plan(CONTENDERS, (4, 3), (1, 2, 3))
    values = pipeline_params(base(), runs, "/model", "/data", 128, 200, 1, "cuda")
    params = Params.model_validate(values)
    assert list(params.recipes) == [run.name for run in runs]
    mixed = params.calibration.sets["mixed-seed1"]
    assert (mixed.queries, mixed.pages, mixed.passages, mixed.seed) == (96, 48, 0, 1)
    more = params.calibration.sets["mixed-passages32-seed3"]
    assert (more.queries, more.pages, more.passages, more.seed) == (96, 48, 32, 3)
    naive = values["recipes"]["naive-w3-seed1"]
    assert not naive["deepstack"] and naive["calibration"] == "mixed-seed1"
    assert values["recipes"]["text-w4-seed2"]["seed"] == 2
    gptq = params.recipes["gptq-passages32-w3-seed1"]
    assert (gptq.method, gptq.bits) == ("gptq", 3)
    assert gptq.calibration == "mixed-passages32-seed1"  # the very samples of AutoRound
    tuned, scales = (
        values["recipes"][f"{name}-w4-seed1"] for name in ("mixed-e2e", "mixed-e2e-scales")
    )
    assert tuned["calibration"] == "mixed-seed1"
    assert tuned["end_to_end"] == {"steps": 200, "seed": 1}
    assert scales["end_to_end"] == {"steps": 200, "seed": 1, "codes_lr": 0.0}
    assert "end_to_end" not in values["recipes"]["mixed-w4-seed1"]
    assert values["recipes"]["gptq-model-e2e-w3-seed1"]["hessian"] == "model"
    assert "hessian" not in values["recipes"]["gptq-e2e-w3-seed1"]


def test_the_frontier_is_tuned_as_the_default_and_differs_in_widths_alone() -> None:
    runs = plan(FRONTIER, (4, 3), (1,))
    assert [run.name for run in runs] == [f"{name}-seed1" for name in FRONTIER]
    budgets = {"bytes-w3": 30, "bytes-small": 20, "bytes-e4": 10}
    values = pipeline_params(base(), runs, "/m", "/d", 64, 200, 1, "cuda", budgets)
    params = Params.model_validate(values)
    assert {recipe.calibration for recipe in params.recipes.values()} == {"mixed-seed1"}
    assert (params.sensitivity.calibration, params.sensitivity.group_size) == ("mixed-seed1", 64)
    assert params.recipes["bytes-small-seed1"].bytes == 20
    assert params.recipes["b35-seed1"].has_budget and not params.recipes["w3-seed1"].has_budget
    small = params.recipes["small-seed1"]
    assert (small.token_embeddings, set(small.vision_bits.values())) == (8, {8})
    (mixed,) = plan(["mixed"], (4,), (1,))
    beside = pipeline_params(base(), [mixed], "/m", "/d", 64, 200, 1, "cuda")
    assert beside["recipes"][mixed.name] == values["recipes"]["w4-seed1"]
    assert beside["sensitivity"]["calibration"] == "none"


def test_budgets_in_bytes_are_what_other_recipes_take(model: Path) -> None:
    runs = plan(FRONTIER, (), (1,))
    expected = inspect_folder(model)[1]
    config = json.loads((model / "config.json").read_text())
    budgets = byte_budgets(runs, expected, config, 32)
    assert set(budgets) == {"bytes-w3", "bytes-small", "bytes-e4"}
    source = Checkpoint.read(model).tensors
    values = pipeline_params(base(), runs, "/m", "/d", 32, 200, 1, "cpu", budgets)
    recipes = Params.model_validate(values).recipes
    for name, budget in budgets.items():
        other = f"{name.removeprefix('bytes-')}-seed1"
        allocation = uniform(other, recipes[other], config)
        planned = bytes_of(planned_tensors(source, allocation, 32).values())
        assert planned < budget < planned + 100_000  # of headers
        wanted = {**dict.fromkeys(quantizable(config), 16), **allocation.modules}
        loses = {
            item: {"loss": {str(bits): dict.fromkeys(("pages", "queries"), float(bits != wanted[names[0]]))
                            for bits in (2, 3, 4, 8)}}
            for item, names in items_of(config).items()
        }  # fmt: skip
        chosen = allocate(name, recipes[f"{name}-seed1"], config, source, {"items": loses})
        if 16 not in wanted.values():  # else 16 bits, which lose nothing, tempt
            assert chosen.modules == allocation.modules


def test_shrunk_sets_keep_every_kind() -> None:
    runs = [Run("mixed-passages32", 4, 1)]
    values = pipeline_params(base(), runs, "/m", "/d", 64, 1, 1000, "cpu")
    counts = values["calibration"]["sets"]["mixed-passages32-seed1"]
    assert counts == {"queries": 1, "pages": 1, "passages": 1, "seed": 1}


@pytest.mark.parametrize("name", ALL_CONTENDERS)
def test_samples_asked_for_are_in_the_calibration_set(name: str) -> None:
    data = Path("demo/pages/calibration")
    held = {
        "queries": len((data / "queries.jsonl").read_text().splitlines()),
        "pages": len(list((data / "corpus").iterdir())),
        "passages": len((data / "texts.jsonl").read_text().splitlines()),
    }
    contender = ALL_CONTENDERS[name]
    asked = {kind: getattr(contender, kind) for kind in held}
    assert {kind: count for kind, count in asked.items() if count > held[kind]} == {}


@pytest.mark.parametrize(("widths", "group"), [((256, 512), 128), ((192, 512), 64), ((96, 32), 32)])
def test_largest_group_that_divides(widths: tuple[int, int], group: int) -> None:
    text = {"hidden_size": widths[0], "intermediate_size": widths[1]}
    config = {"text_config": {**text, "num_attention_heads": 4, "head_dim": 64}}
    assert group_size(config) == group


def test_the_group_fits_the_vision_tower_too_where_that_is_quantized() -> None:
    text = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "head_dim": 64}
    vision = {"hidden_size": 64, "intermediate_size": 256, "spatial_merge_size": 2}
    config = {"text_config": text, "vision_config": vision}
    assert (group_size(config), group_size(config, vision=True)) == (128, 64)


def test_no_group_divides() -> None:
    text = {"hidden_size": 80, "intermediate_size": 64, "num_attention_heads": 1, "head_dim": 64}
    with pytest.raises(ValueError, match="80"):
        group_size({"text_config": text})


def test_loss_is_of_tokens_and_search_of_pages(tmp_path: Path) -> None:
    one, other = torch.eye(4)[:2], torch.eye(4)[2:]
    before = {"query/a": one, "query/b": other, "page/x": one.clone(), "page/y": other.repeat(3, 1)}
    turned = before["page/y"].clone()
    turned[0] = torch.tensor([1.0, 0, 0, 0])  # of eight page tokens one is turned to the side
    save_file(before, tmp_path / "before")
    save_file({**before, "page/y": turned}, tmp_path / "after")
    losses = measure_losses(tmp_path / "before", tmp_path / "after")
    assert losses == {"pages": 0.125, "queries": 0.0}
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\na\tx\t1\nb\tx\t1\nb\ty\t0\n")
    found = measure_search(tmp_path / "before", tmp_path)
    assert (found["recall_at_1"], found["pages"], found["queries"]) == (0.5, 2, 2)
    save_file({"query/a": one}, tmp_path / "less")
    with pytest.raises(ValueError, match="other items"):
        measure_losses(tmp_path / "before", tmp_path / "less")


def recipe(contender: str, loss: float, seed: int | None = 1, bits: int = 4) -> dict[str, Any]:
    losses = {"set": {"pages": loss, "queries": 2 * loss}}
    return {"contender": contender, "bits": bits, "seed": seed, "loss": losses}


def test_ratios_are_to_the_same_bits_and_to_the_mean_of_text_seeds() -> None:
    recipes = {
        "rounding-w4": recipe("rounding", 0.8, None),
        "rounding-w3": recipe("rounding", 0.9, None, 3),
        "text-w4-seed1": recipe("text", 0.3),
        "text-w4-seed2": recipe("text", 0.5, 2),
        "mixed-w4-seed1": recipe("mixed", 0.2),
        "mixed-w3-seed1": recipe("mixed", 0.3, bits=3),
    }
    study.add_ratios(recipes)
    assert recipes["mixed-w4-seed1"]["ratio"]["to_rounding"]["set"]["pages"] == 0.25
    assert recipes["mixed-w4-seed1"]["ratio"]["to_text"]["set"]["queries"] == 0.5
    assert set(recipes["mixed-w3-seed1"]["ratio"]) == {"to_rounding"}


def results(shape: str, total: int) -> dict[str, Any]:
    recipes = {
        "rounding-w4": recipe("rounding", 0.8, None),
        "text-w4-seed1": recipe("text", 0.4),
        "mixed-w4-seed1": recipe("mixed", 0.1),
        "mixed-w4-seed2": recipe("mixed", 0.3, 2),
    }
    study.add_ratios(recipes)
    return {
        "shape": shape,
        "parameters": {"total": total},
        "depth": {"text_layers": 2, "text_hidden": 64, "vision_blocks": 2, "vision_hidden": 32},
        "training": {"wall_seconds": 60, "steps": 1234},
        "page_sets": {"set": {"ndcg_at_5": 0.5}},
        "recipes": recipes,
    }


def test_summary_has_the_means_of_seeds_and_draws_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "large.json", tmp_path / "small.json"]
    files[0].write_text(json.dumps(results("large", 9_000_000)))
    files[1].write_text(json.dumps(results("small", 1_000_000)))
    table, plot = tmp_path / "table.md", tmp_path / "plot.svg"
    command = ["summary", *map(str, files), "--table", str(table), "--plot", str(plot)]
    monkeypatch.setattr("sys.argv", command)
    summary.main()
    lines = table.read_text().splitlines()
    assert "| `small` | 1,000,000 | 2 x 64 | 2 x 32 | 60 s, 1,234 steps | 0.500 |" in lines
    row = "mixed (2 seeds) | 200,000 ± 140,000 | 0.25 | 400,000 ± 280,000 | 0.25 | 0.50 |"
    assert [line for line in lines if "`small`" in line and "mixed" in line] == [
        f"| `small` | {row}"
    ]
    assert "not the 4B model" in lines[0]
    assert lines.index("| `small` | rounding | 800,000 |  | 1,600,000 |  | 2.00 |") < lines.index(
        "| `large` | rounding | 800,000 |  | 1,600,000 |  | 2.00 |"
    )
    assert plot.read_text().startswith("<svg") and "mixed" in plot.read_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,230"), (51.26, "51.3"), (5.1261, "5.13"), (0.0512, "0.0512"),
     (999.6, "1,000"), (0.99951, "1.00"), (100, "100")],
)  # fmt: skip
def test_losses_have_three_significant_digits(value: float, text: str) -> None:
    assert summary.significant(value) == text


def test_committed_table_and_plot_are_of_the_committed_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [f"metrics/scale/{name}.json" for name in ("1m", "demo", "39m", "150m")]
    table, plot = tmp_path / "table.md", tmp_path / "plot.svg"
    command = ["summary", *files, "--table", str(table), "--plot", str(plot)]
    monkeypatch.setattr("sys.argv", command)
    summary.main()
    assert table.read_text() == Path("metrics/scale/table.md").read_text()
    assert plot.read_text() == Path("docs/images/scale.svg").read_text()


def frontier_results(total: int, sizes: dict[str, int]) -> dict[str, Any]:
    return {
        "parameters": {"total": total},
        "original_bytes": 2 * total,
        "page_sets": {"set": {}},
        "recipes": {
            f"{name}-seed1": {**recipe(name, 0.5 / size), "bits": None, "bytes": size}
            for name, size in sizes.items()
        },
    }


def test_frontiers_are_by_size_and_of_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no frontier-<shape>\.json"):
        frontier.read_frontiers(tmp_path)
    made = {
        "39m": frontier_results(4_000, {"w4": 6_000, "bytes-w3": 3_000}),
        "demo": frontier_results(1_000, {"b35": 900, "small": 500, "rounding": 100}),
    }
    for shape, values in made.items():
        (tmp_path / f"frontier-{shape}.json").write_text(json.dumps(values))
    found = frontier.read_frontiers(tmp_path)
    assert list(found) == ["demo", "39m"]
    small, budget = frontier.points(found["demo"], "set")
    assert small == {
        "recipe": "small", "way": "embeddings and vision too", "mb": 500 / 1e6, "share": 0.25,
        "pages": 0.001, "queries": 0.002,
    }  # fmt: skip
    assert (budget["recipe"], budget["way"]) == ("b35", "budget of bits")
    ways = {point["recipe"]: point["way"] for point in frontier.points(found["39m"], "set")}
    assert ways == {"bytes-w3": "budget of bytes", "w4": "uniform"}
    drawn = svg(frontier.chart(found))
    assert all(word in drawn for word in ("bytes-w3", "b35", "not the 4B model", ">39m<"))


def test_the_committed_frontier_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot = tmp_path / "plot.svg"
    monkeypatch.setattr("sys.argv", ["frontier", "--plot", str(plot)])
    frontier.main()
    assert plot.read_text() == frontier.PLOT.read_text()


def test_summary_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match=r"other\.json: is no result"):
        summary.read_results([tmp_path / "other.json"])


def test_earlier_results_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "micro.json"
    identity = {"model_sha256": "a", "settings": {"iters": 1}}
    assert study.open_results(path, identity, {"what": "it"})["recipes"] == {}
    path.write_text(json.dumps({**identity, "recipes": {"x": {}}}))
    assert study.open_results(path, identity, {})["recipes"] == {"x": {}}
    with pytest.raises(UserError, match="of another settings"):
        study.open_results(path, {**identity, "settings": {"iters": 2}}, {})


def test_weights_are_counted_by_part(model: Path) -> None:
    assert study.count_weights(model) == count_parameters(SIZES["micro"].shape)


@pytest.mark.parametrize(
    "words", [["--jobs", "0"], ["--seeds", "1", "1"], ["--page-sets", "a/x", "b/x"]]
)
def test_bad_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.parse_arguments(["--shape", "micro", "--out", "x", *words])
    assert f"error: {words[0]}" in capsys.readouterr().err


def test_a_shape_of_ones_own_is_known_by_the_name_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "wide.json"
    path.write_text('{"hidden": 384}')
    options = study.parse_arguments(["--shape", str(path), "--out", "x"])
    assert (options.shape, options.name, options.size_given) == ("wide", "wide", str(path))
    assert " --shape wide.json --jobs 1 " in study.describe_command(options)


def test_a_model_of_other_sizes_is_not_taken_for_the_one_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = tmp_path / "wide.json", tmp_path / "work/model"
    path.write_text('{"hidden": 384}')
    model.mkdir(parents=True)
    trained: list[list[str]] = []

    def train(command: list[str], **_: Any) -> SimpleNamespace:
        trained.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("subprocess.run", train)
    words = ["--shape", str(path), "--out", "x"]
    for _ in range(2):
        study.train(study.parse_arguments(words), model, tmp_path / "log")
    assert len(trained) == 1 and trained[0][4] == str(path)
    for other in ('{"hidden": 416}', '{"hidden": 384, "rate": 0.5}'):
        path.write_text(other)
        with pytest.raises(
            UserError, match=r"trained in other sizes than those of .*wide\.json; rem"
        ):
            study.train(study.parse_arguments(words), model, tmp_path / "log")


def page_set(folder: Path, source: str, queries: int, pages: int) -> Path:
    """Write the first queries and pages of a set of the demo; every page answers a query."""
    found = Path("demo/pages") / source
    (folder / "corpus").mkdir(parents=True)
    names = sorted(path.name for path in (found / "corpus").iterdir())[:pages]
    for name in names:
        (folder / "corpus" / name).symlink_to((found / "corpus" / name).resolve())
    lines = (found / "queries.jsonl").read_text().splitlines(keepends=True)[:queries]
    (folder / "queries.jsonl").write_text("".join(lines))
    if (found / "texts.jsonl").exists():
        (folder / "texts.jsonl").symlink_to((found / "texts.jsonl").resolve())
    ids = [json.loads(line)["_id"] for line in lines]
    rows = [f"{query}\t{Path(names[0]).stem}\t1\n" for query in ids]
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    return folder


def test_one_recipe_from_model_to_losses(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115 - as outside pytest
    monkeypatch.setattr("sys.stderr", stderr)
    data = page_set(tmp_path / "data", "calibration", 3, 2)
    command = "--shape micro --out OUT --device cpu --iters 1 --shrink 48 --calibration"
    options = study.parse_arguments([*command.split(), str(data)])
    sets = (page_set(tmp_path / "pages", "evaluation", 3, 2),)
    bench = study.Bench(tmp_path / "work", model, sets)
    runs = [Run("rounding", 4, 1), Run("mixed-passages32", 3, 1), Run("bytes-w3", None, 1)]
    assert study.write_params(bench, runs, options) == 32
    alone = study.prepare(bench)
    assert alone["token_embeddings"]["2"]["pages"] > alone["token_embeddings"]["8"]["pages"] > 0
    assert study.embed_original(bench, sets[0])["queries"] == 3
    measured = {run.name: study.measure_run(bench, run) for run in runs}
    rounding, tuned, budget = measured.values()
    assert rounding["bytes"] - budget["bytes"] > 0
    assert (rounding["bits_by_part"], budget["bits"]) == (
        {"token_embeddings": 16, "language_model": {"4": 14}}, None,
    )  # fmt: skip
    assert "vision_mergers" in budget["bits_by_part"]
    assert rounding["samples"] == {"queries": 0, "pages": 0, "passages": 0}
    assert rounding["seed"] is None and tuned["seed"] == 1
    assert tuned["samples"] == {"queries": 2, "pages": 1, "passages": 1}
    for figures in measured.values():
        assert all(0 < figures["loss"]["pages"][kind] < 1 for kind in ("pages", "queries"))
    assert not list((bench.folder / "artifacts/checkpoints").iterdir())
    with pytest.raises(UserError, match=r"quantize other failed .*recipes\.other: no such recipe"):
        run_stage(bench.folder, bench.log("other"), "quantize", "other")
    with pytest.raises(UserError, match="inspect_model failed"):
        run_stages(study.ROOT, tmp_path, tmp_path / "log", [["inspect_model"], ["calibrate"]])
