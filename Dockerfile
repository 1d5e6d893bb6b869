# The two commands in a clean machine:
#   docker build -t colqwen3 .                  sets up the environment
#   docker run --rm colqwen3                    make repro
#   docker run --rm colqwen3 make test          all tests
# Results stay in the container; `-v "$PWD/artifacts:/work/artifacts"` keeps the large ones.
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home user

WORKDIR /work
RUN chown user:user /work
USER user
ENV PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

# the environment first: it changes less often than the code
COPY --chown=user:user Makefile requirements.txt pyproject.toml ./
RUN make setup

# with .git: DVC and the tests read it
COPY --chown=user:user . .

CMD ["make", "repro"]
