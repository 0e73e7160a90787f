# CPU by default:   docker build -t emb-model-provider .
# NVIDIA GPU:       docker build -t emb-model-provider:cuda --build-arg TORCH=cuda .
# Behind a mirror:  add --build-arg UV_DEFAULT_INDEX=<a package index>

FROM python:3.11-slim AS build

# The build of PyTorch: `cpu`, or `cuda`, the default build of the package index for Linux.
ARG TORCH=cpu
# The package index for pip and uv, if not the default one.
ARG UV_DEFAULT_INDEX

ENV UV_NO_CACHE=1 \
    UV_COMPILE_BYTECODE=1 \
    VIRTUAL_ENV=/opt/venv

WORKDIR /src
RUN pip install --no-cache-dir ${UV_DEFAULT_INDEX:+--index-url "$UV_DEFAULT_INDEX"} uv
RUN uv venv /opt/venv

# The dependencies have their own layer, because they change less often than the code. uv reads the pinned versions in
# [tool.uv].
COPY pyproject.toml ./
RUN uv pip install $(test "$TORCH" = cuda || echo "--torch-backend=$TORCH") -r pyproject.toml

COPY README.md LICENSE ./
COPY emb_model_provider emb_model_provider
RUN uv pip install --no-deps .

FROM python:3.11-slim

COPY --from=build /opt/venv /opt/venv
# The only directory that the service writes to. Any user of the group 0 can write to it, too, because OpenShift and
# `docker run --user` choose other users.
RUN install -d -o 10001 -g 0 -m 2775 /data

# Downloads and compiled models are stored below HOME, which is the volume. No cache directory is set here, because a value
# of the image would take precedence over MODELSCOPE_CACHE, HF_HOME or MODEL_CACHE_DIR of the user.
ENV PATH=/opt/venv/bin:$PATH \
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
CMD ["python", "-m", "emb_model_provider.main"]
