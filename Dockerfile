# The two commands in a clean machine:
#   docker build -t colqwen3 .                  sets up the environment
#   docker run --rm colqwen3                    make repro
#   docker run --rm colqwen3 make test          all tests
# Results stay in the container; `-v "$PWD/artifacts:/project/artifacts"` keeps the large ones.
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home user

WORKDIR /project
RUN chown user:user /project
USER user
ENV PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

# .git too: DVC and the tests read it
COPY --chown=user:user . .
RUN make setup

CMD ["make", "repro"]
