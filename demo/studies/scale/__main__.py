"""Run the study for one size of model."""

from colqwen3.system.errors import run
from demo.studies.scale.study import main

if __name__ == "__main__":
    run(main)
