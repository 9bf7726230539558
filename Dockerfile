# syntax=docker/dockerfile:1.9
# Images of Overtone.
#   docker build --target cpu    the API, the ingestion, Ray's nodes, the command: no torch
#   docker build --target cuda   the same on NVIDIA GPUs, with what training needs
#   docker build --target mlflow the registry's server
# Every RUN step is a script in docker/, which the tests run too.

FROM docker.io/library/python:3.12.11-slim-bookworm AS wheels
WORKDIR /source
COPY docker/ docker/
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY overtone/ overtone/
COPY serve/ serve/
COPY train/ train/
COPY ingest/ ingest/
COPY kuberay/ kuberay/
RUN --mount=type=cache,target=/root/.cache/pip sh docker/make-wheel.sh /source /wheels

FROM docker.io/library/python:3.12.11-slim-bookworm AS runtime
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PATH=/opt/overtone/bin:$PATH HOME=/home/overtone \
    OVERTONE_HOME=/home/overtone/.overtone
COPY docker/ /usr/local/lib/overtone/
RUN sh /usr/local/lib/overtone/make-user.sh overtone 1000
WORKDIR /app
COPY configs/ configs/

FROM runtime AS cpu
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip \
    sh /usr/local/lib/overtone/install.sh /wheels /opt/overtone "kube,archive,secrets,registry"
USER 1000:1000
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "/usr/local/lib/overtone/healthy.py"]
CMD ["overtone", "up"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip \
    sh /usr/local/lib/overtone/install.sh /wheels /opt/overtone "kube,archive,secrets,train,gpu"
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "/usr/local/lib/overtone/healthy.py"]
CMD ["overtone", "up"]

FROM runtime AS mlflow
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip \
    sh /usr/local/lib/overtone/install-mlflow.sh /wheels /opt/overtone
USER 1000:1000
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "/usr/local/lib/overtone/healthy.py", "http://127.0.0.1:5000/health"]
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000"]
