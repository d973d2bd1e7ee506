# Two images from one file: `docker build --target client .` submits and reads and has no torch, `--target worker` works.
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim-bookworm AS base
ENV PATH=/opt/millrace/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --create-home millrace \
    && mkdir /srv/millrace \
    && chown millrace /srv/millrace
WORKDIR /srv/millrace

FROM base AS client-build
RUN python -m venv /opt/millrace
WORKDIR /build
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY storage storage
COPY batching batching
COPY producer producer
COPY worker worker
COPY cli cli
RUN pip install -c constraints.txt '.[postgres,parquet,flower]'

FROM client-build AS worker-build
# Without another index this is the build for CUDA, which runs on a CPU too and is large.
ARG TORCH_INDEX_URL=""
RUN pip install -c constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
RUN pip install -c constraints.txt '.[worker]'

FROM base AS client
COPY --from=client-build /opt/millrace /opt/millrace
USER 10001
ENTRYPOINT ["millrace"]
CMD ["--help"]

FROM base AS worker
# Triton compiles what launches its kernels with it, where there is a GPU.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=worker-build /opt/millrace /opt/millrace
COPY models/millrace-tiny models/millrace-tiny
# Compiled kernels are kept beside models from the hub: a second start on a GPU takes a third of the first one's time.
ENV TRITON_CACHE_DIR=/home/millrace/.cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/home/millrace/.cache/inductor
# A volume that is mounted here belongs to whom the folder belonged to.
RUN mkdir -p /home/millrace/.cache && chown millrace /home/millrace/.cache
USER 10001
# A worker answers once its model is loaded, which may take minutes.
HEALTHCHECK --interval=30s --timeout=15s --start-period=10m --retries=3 CMD ["millrace", "doctor", "--worker"]
ENTRYPOINT ["millrace"]
CMD ["worker"]
