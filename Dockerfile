# CPU by default:      docker build -t emb-model-provider .
# NVIDIA GPU:          docker build -t emb-model-provider:cuda --build-arg TORCH=cuda .
# Without torch:       docker build -t emb-model-provider:slim --target slim .
# With a model inside: docker build -t my-model --target baked --build-arg MODEL_NAME=BAAI/bge-small-zh-v1.5 .
# Behind mirrors:      add --build-arg BASE=<image> --build-arg UV_DEFAULT_INDEX=<package index>
#                      --build-arg TORCH_INDEX=<index of PyTorch builds>
# docs/deploy.md describes all targets and arguments.

ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS uv

# The package index for pip and uv, if not the default one.
ARG UV_DEFAULT_INDEX

ENV UV_NO_CACHE=1 \
    UV_COMPILE_BYTECODE=1 \
    VIRTUAL_ENV=/opt/venv

WORKDIR /src
RUN pip install --no-cache-dir ${UV_DEFAULT_INDEX:+--index-url "$UV_DEFAULT_INDEX"} uv==0.13.9
# The code is in its own directory, and thus in its own layer: a change of the code does not change the dependencies.
RUN uv venv /opt/venv && echo /opt/app > "$(/opt/venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/code.pth"
# uv reads the pinned versions in [tool.uv].
COPY pyproject.toml ./

FROM uv AS dependencies

# The build of PyTorch: `cpu`, or `cuda`, the default build of the package index for Linux.
ARG TORCH=cpu
# An index or a page with links to the wheels of PyTorch, if not PyTorch's own.
ARG TORCH_INDEX
RUN test -z "$TORCH_INDEX" || uv pip install --no-deps --default-index "$TORCH_INDEX" --find-links "$TORCH_INDEX" torch
# int8 and int4 on CUDA need the packages of the extra `quantization`.
RUN uv pip install $(test "$TORCH" = cuda || test -n "$TORCH_INDEX" || echo "--torch-backend=$TORCH") \
    $(test "$TORCH" != cuda || echo "--extra quantization") --extra otel -r pyproject.toml

FROM uv AS dependencies-slim

# A model that is compiled already needs none of these.
RUN printf '%s\n' torch transformers sentence-transformers sentencepiece nncf peft accelerate > excluded.txt
RUN uv pip install --excludes excluded.txt --extra otel -r pyproject.toml

FROM uv AS code

COPY README.md LICENSE ./
COPY emb_model_provider emb_model_provider
RUN uv pip install --no-deps --target /opt/app .

FROM ${BASE} AS runtime

ARG BASE
LABEL org.opencontainers.image.title="emb-model-provider" \
      org.opencontainers.image.description="An OpenAI-compatible embedding service" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"

# The only directory that the service writes to. Any user of the group 0 can write to it, too, because OpenShift and
# `docker run --user` choose other users.
RUN install -d -o 10001 -g 0 -m 2775 /data

# Downloads and compiled models are stored below HOME, which is the volume. No cache directory is set here, because a value
# of the image would take precedence over MODELSCOPE_CACHE, HF_HOME or MODEL_CACHE_DIR of the user.
ENV PATH=/opt/app/bin:/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/data \
    EMB_PROVIDER_HOST=0.0.0.0 \
    EMB_PROVIDER_PORT=9000 \
    EMB_PROVIDER_LOG_TO_FILE=false

WORKDIR /app
USER 10001:10001
VOLUME /data
EXPOSE 9000

# Any response below 500 shows that the process works, also one that rejects the Host header. Kubernetes replaces the port
# by a URL if a service is named emb-provider; then the service listens on its default port.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os; p = os.environ['EMB_PROVIDER_PORT'].strip(chr(34) + chr(39)); c = http.client.HTTPConnection('127.0.0.1', int(p) if p.isdecimal() else 9000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status >= 500)"]

# Accepted requests have 60 s to finish: docker stop -t 75. After a crash the restart policy restarts the container
# (docker run --restart unless-stopped), so that no supervisor is needed.
STOPSIGNAL SIGTERM
ENTRYPOINT ["emb-provider"]
CMD ["serve"]

FROM runtime AS slim

COPY --from=dependencies-slim /opt/venv /opt/venv
COPY --from=code /opt/app /opt/app

FROM runtime AS full

COPY --from=dependencies /opt/venv /opt/venv
COPY --from=code /opt/app /opt/app

FROM full AS models

# The models of the image, as in the settings. Without both, the bundled model.
ARG MODEL_NAME
ARG MODEL_MAPPING
ARG MODEL_SOURCE=auto
# fp32 can be computed by every processor. A model that was compiled for bf16 is not served by a processor without it.
ARG MODEL_PRECISION=fp32
# Not below /data, so that a mounted volume does not hide the models.
ENV EMB_PROVIDER_CACHE_DIR=/models/cache \
    EMB_PROVIDER_HF_CACHE_DIR=/models/hub \
    EMB_PROVIDER_MODELSCOPE_CACHE_DIR=/models/hub \
    EMB_PROVIDER_MODEL_NAME="${MODEL_NAME}" \
    EMB_PROVIDER_MODEL_MAPPING="${MODEL_MAPPING}" \
    EMB_PROVIDER_MODEL_SOURCE="${MODEL_SOURCE}" \
    EMB_PROVIDER_MODEL_PRECISION="${MODEL_PRECISION}"
USER 0:0
RUN emb-provider pull --progress plain && chmod -R a+rX,go-w /models

FROM slim AS baked

ARG MODEL_NAME
ARG MODEL_MAPPING
ARG MODEL_SOURCE=auto
ARG MODEL_PRECISION=fp32
ENV EMB_PROVIDER_CACHE_DIR=/models/cache \
    EMB_PROVIDER_HF_CACHE_DIR=/models/hub \
    EMB_PROVIDER_MODELSCOPE_CACHE_DIR=/models/hub \
    EMB_PROVIDER_MODEL_NAME="${MODEL_NAME}" \
    EMB_PROVIDER_MODEL_MAPPING="${MODEL_MAPPING}" \
    EMB_PROVIDER_MODEL_SOURCE="${MODEL_SOURCE}" \
    EMB_PROVIDER_MODEL_PRECISION="${MODEL_PRECISION}" \
    EMB_PROVIDER_OFFLINE=true
COPY --from=models /models /models

FROM full
