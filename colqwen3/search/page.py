"""The page itself, which Streamlit runs: ``streamlit run page.py -- <options of colqwen3 search>``."""

import argparse
from pathlib import Path
from typing import Any

import streamlit as st
import torch

from colqwen3.commands.search import add_arguments
from colqwen3.dataset.beir import read_queries
from colqwen3.search.engine import Change, Comparison, Side
from colqwen3.system.errors import UserError

COUNT, HEIGHT = 3, 640
NAMES = {"original": "Original", "quantized": "4-bit"}


@st.cache_resource(show_spinner="Loading both models and their vectors")  # type: ignore[untyped-decorator]
def load(original: tuple[str, str], quantized: tuple[str, str], device: str) -> Comparison:
    """Load both sides, once for all visitors."""
    place = torch.device(device)
    sides = (Side(model, Path(vectors), place) for model, vectors in (original, quantized))
    return Comparison(*sides)


@st.cache_data(show_spinner="Searching every query of the list")  # type: ignore[untyped-decorator]
def find_changes(_comparison: Comparison, path: str) -> list[Change]:
    """Return the queries of a file whose first page changed."""
    return _comparison.changes(read_queries(Path(path)))


def show_results(comparison: Comparison, text: str) -> None:
    """Show the best pages of both models side by side; all text is shown as text."""
    results = comparison.search(text, COUNT)
    for (name, (query, hits)), column in zip(results.items(), st.columns(2), strict=True):
        with column:
            st.subheader(NAMES[name])
            for place, hit in enumerate(hits, 1):
                st.text(f"{place}. {hit.id}\nMaxSim {hit.score:.3f}")
                st.image(comparison.sides[name].picture(query, hit.id, HEIGHT))


def show_changes(changes: list[Change]) -> None:
    """Show the queries whose first page changed."""
    st.subheader("Queries whose first page changed")
    st.text(f"{len(changes)} queries")
    if changes:
        rows: list[dict[str, Any]] = [vars(change) for change in changes]
        st.dataframe(rows, hide_index=True)


def main() -> None:
    """Draw the page."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args()
    st.set_page_config(page_title="ColQwen3: original and 4-bit", layout="wide")
    st.title("Original and 4-bit, side by side")
    try:
        comparison = load(tuple(args.original), tuple(args.quantized), args.device)
        text = st.text_input("Query", placeholder="what to look for")
        if text.strip():
            show_results(comparison, text)
        if args.queries:
            show_changes(find_changes(comparison, str(args.queries)))
    except UserError as error:
        st.text(f"error: {error}")


if __name__ == "__main__":
    main()
