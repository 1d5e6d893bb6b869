"""Run a stage of the ablation, or print its tables."""

from colqwen3.system.errors import run
from demo.studies.ablation.study import main

if __name__ == "__main__":
    run(main)
