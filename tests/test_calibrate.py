"""Calibration samples: what is drawn, and that each is what the processor makes."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from stages.calibrate import draw, make_samples
from stages.colqwen3.loading import load_processor
from stages.errors import PipelineError
from stages.files import write_json
from stages.pages import Page, open_page
from stages.params import CalibrationParams
from stages.samples import INDEX, read_samples

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
    return folder


def params(dataset: Path, queries: int = 3, pages: int = 2, seed: int = 7) -> CalibrationParams:
    return CalibrationParams(dataset=str(dataset), queries=queries, pages=pages, seed=seed)


def test_samples_are_single_unpadded_and_traceable(dataset: Path, tmp_path: Path) -> None:
    processor = load_processor(GOLDEN / "model", 64)
    out = tmp_path / "out"
    out.mkdir()
    made = make_samples(params(dataset), processor, out)
    write_json(out / INDEX, {"samples": [asdict(origin) for origin in made]})
    origins, samples = read_samples(out)
    assert origins == made
    assert [origin.kind for origin in origins] == ["query"] * 3 + ["page"] * 2
    texts = {f"q{i}": f"total of year {i}" for i in range(5)}
    for origin, sample in zip(origins, samples, strict=True):
        if origin.kind == "query":
            wanted = processor.process_texts([texts[origin.id]])
        else:
            wanted = processor.process_images([open_page(Page(dataset / "corpus" / origin.id))])
        assert sample.keys() == wanted.keys()
        assert all(torch.equal(sample[key], wanted[key]) for key in sample)
        assert sample["attention_mask"].shape == (1, origin.tokens)
        assert sample["attention_mask"].all()
    assert {path.suffix for path in out.iterdir()} == {".json", ".safetensors"}


def test_a_page_of_a_pdf_is_traceable(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    sheets = [Image.linear_gradient("L").rotate(90 * turn).convert("RGB") for turn in range(2)]
    sheets[0].save(tmp_path / "corpus/m.pdf", save_all=True, append_images=sheets[1:])
    made = make_samples(params(tmp_path, 0, 2), load_processor(GOLDEN / "model", 64), tmp_path)
    assert {origin.id for origin in made} == {"m.pdf#page=1", "m.pdf#page=2"}


def test_drawing_depends_on_the_seed_alone() -> None:
    ids = [f"p{i}" for i in range(50)]
    drawn = draw(ids, 10, "calibration.pages", 1)
    assert drawn == draw(ids[::-1], 10, "calibration.pages", 1)
    assert drawn != draw(ids, 10, "calibration.pages", 2)
    assert len(set(drawn)) == 10
    assert set(drawn) <= set(ids)


def test_more_than_there_are_is_refused(dataset: Path, tmp_path: Path) -> None:
    processor = load_processor(GOLDEN / "model", 64)
    with pytest.raises(PipelineError, match=r"calibration\.pages is 5, but the dataset holds 4"):
        make_samples(params(dataset, pages=5), processor, tmp_path)
