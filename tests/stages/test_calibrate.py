"""Calibration samples: what is drawn, and that each is what the processor makes."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from colqwen3.dataset.pages import Page, open_page
from colqwen3.model.loading import load_processor
from colqwen3.system.errors import UserError
from colqwen3.system.files import write_json
from stages import calibrate
from stages.calibration.drawing import draw, make_samples
from stages.calibration.sets import CalibrationParams, CalibrationSet
from stages.checking.params import Params
from stages.pipeline.params import load_params
from stages.quantization.samples import INDEX, read_samples

GOLDEN = Path("tests/golden")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    (folder / "corpus").mkdir(parents=True)
    for number in range(4):
        Image.linear_gradient("L").resize((64 + 32 * number, 96)).save(
            folder / f"corpus/p{number}.png"
        )
    lines = [json.dumps({"_id": f"q{i}", "text": f"total of year {i}"}) for i in range(5)]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"_id": f"t{i}", "text": f"the {i}th passage of text"}) for i in range(3)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


def params(
    dataset: Path, queries: int = 3, pages: int = 2, passages: int = 0, seed: int | None = None
) -> CalibrationParams:
    some = CalibrationSet(queries=queries, pages=pages, passages=passages, seed=seed)
    return CalibrationParams(dataset=str(dataset), seed=7, sets={"some": some})


def test_samples_are_single_unpadded_and_traceable(dataset: Path, tmp_path: Path) -> None:
    processor = load_processor(GOLDEN / "model", 64)
    out = tmp_path / "out"
    out.mkdir()
    result = make_samples(params(dataset, passages=1), "some", processor, out)
    write_json(out / INDEX, {"samples": [asdict(origin) for origin in result]})
    origins, samples = read_samples(out)
    assert origins == result
    assert [origin.kind for origin in origins] == ["query"] * 3 + ["page"] * 2 + ["passage"]
    texts = {f"q{i}": f"total of year {i}" for i in range(5)}
    texts |= {f"t{i}": f"the {i}th passage of text" for i in range(3)}
    for origin, sample in zip(origins, samples, strict=True):
        if origin.kind != "page":
            expected = processor.process_texts([texts[origin.id]])
        else:
            expected = processor.process_images([open_page(Page(dataset / "corpus" / origin.id))])
        assert sample.keys() == expected.keys()
        assert all(torch.equal(sample[key], expected[key]) for key in sample)
        assert sample["attention_mask"].shape == (1, origin.tokens)
        assert sample["attention_mask"].all()
    assert {path.suffix for path in out.iterdir()} == {".json", ".safetensors"}


def test_a_page_of_a_pdf_is_traceable(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    sheets = [Image.linear_gradient("L").rotate(90 * turn).convert("RGB") for turn in range(2)]
    sheets[0].save(tmp_path / "corpus/m.pdf", save_all=True, append_images=sheets[1:])
    result = make_samples(
        params(tmp_path, 0, 2), "some", load_processor(GOLDEN / "model", 64), tmp_path
    )
    assert {origin.id for origin in result} == {"m.pdf#page=1", "m.pdf#page=2"}


def test_drawing_depends_on_the_seed_alone() -> None:
    ids = [f"p{i}" for i in range(50)]
    drawn = draw(ids, 10, "page", 1, "")
    assert drawn == draw(ids[::-1], 10, "page", 1, "")
    assert drawn != draw(ids, 10, "page", 2, "")
    assert drawn != draw(ids, 10, "query", 1, "")
    assert len(set(drawn)) == 10
    assert set(drawn) <= set(ids)


def test_a_larger_draw_begins_with_the_smaller() -> None:
    ids = [f"p{i}" for i in range(50)]
    assert draw(ids, 40, "page", 1, "")[:10] == draw(ids, 10, "page", 1, "")


def test_the_seed_of_a_set_comes_first(dataset: Path, tmp_path: Path) -> None:
    processor = load_processor(GOLDEN / "model", 64)
    plain, same, other = (
        make_samples(params(dataset, 5, 0, seed=seed), "some", processor, tmp_path)
        for seed in (None, 7, 8)
    )
    assert plain == same
    assert plain != other


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"pages": 5}, "pages is 5, but the dataset holds 4"),
        ({"queries": 6}, "queries is 6, but the dataset holds 5"),
        ({"passages": 4}, "passages is 4, but the dataset holds 3"),
    ],
)
def test_more_than_there_are_is_refused(
    dataset: Path, tmp_path: Path, expected: dict[str, int], message: str
) -> None:
    processor = load_processor(GOLDEN / "model", 64)
    with pytest.raises(UserError, match=rf"calibration\.sets\.some\.{message}"):
        make_samples(params(dataset, **expected), "some", processor, tmp_path)


def test_passages_without_their_file_are_refused(dataset: Path, tmp_path: Path) -> None:
    (dataset / "texts.jsonl").unlink()
    with pytest.raises(UserError, match=r"texts\.jsonl: cannot be read"):
        make_samples(
            params(dataset, passages=1), "some", load_processor(GOLDEN / "model", 64), tmp_path
        )


def written(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_each_set_has_its_folder_and_a_change_leaves_the_others_alone(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "calibration"
    both = {
        "some": CalibrationSet(queries=1, pages=1, passages=0),
        "text": CalibrationSet(queries=0, pages=0, passages=2),
    }
    shipped = load_params(Params)
    monkeypatch.setattr(calibrate, "CALIBRATION", out)
    monkeypatch.setattr(calibrate, "read_manifest", dict)
    monkeypatch.setattr(calibrate, "find_inspected_model", lambda *_: GOLDEN / "model")

    def run(sets: dict[str, CalibrationSet]) -> dict[str, bytes]:
        result = CalibrationParams(dataset=str(dataset), seed=7, sets=sets)
        monkeypatch.setattr(
            calibrate, "load_params", lambda _: shipped.model_copy(update={"calibration": result})
        )
        calibrate.main()
        return written(out)

    before = run(both)
    assert {name.split("/")[0] for name in before} == {"some", "text", "none"}
    assert read_samples(out / "none") == ([], [])
    assert [origin.kind for origin in read_samples(out / "text")[0]] == ["passage"] * 2
    after = run(both | {"text": CalibrationSet(queries=2, pages=0, passages=1)})
    assert after["text/index.json"] != before["text/index.json"]
    for name, data in before.items():
        assert name.startswith("text/") or after[name] == data, name
