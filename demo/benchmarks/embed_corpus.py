"""Measures how fast a collection is embedded: the runtime alone, and from files to Parquet shards.

Pages of A4 at 150 dpi are drawn, as PNG files and as PDFs of scans. Then, in one process: the time
of preparing a page on one core, the runtime's own pages per second on batches that lie on the GPU,
and pages per second of the whole way of `colqwen3 embed-corpus` from PNG and from PDF, with the
host memory while it runs. With two or more GPUs: the command under ``accelerate launch`` on one and
on two. Results are written after every step.

    python -m demo.benchmarks.true_size --preset 4b --out /tmp/size/4b
    python -m demo.benchmarks.embed_corpus --model /tmp/size/4b --out metrics/size/corpus-cuda.json

The weights may be random: time does not depend on them.
"""

from colqwen3.system.errors import run


def main() -> None:
    """Run the steps, which only this process imports: workers import this module too."""
    from demo.benchmarks import corpus_steps

    corpus_steps.main(__doc__)


if __name__ == "__main__":
    run(main)
