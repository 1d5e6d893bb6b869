"""Run the study for one size of model."""

from demo.studies.scale.study import main
from stages.errors import run

if __name__ == "__main__":
    run(main)
