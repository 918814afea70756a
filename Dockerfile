# One image for the code server, the web server, the daemon, workers and the command line.
ARG PYTHON=python:3.13-slim-trixie

FROM ${PYTHON} AS build

WORKDIR /build
# The requirements first: they change less often than the code, and take minutes.
COPY requirements-deploy.txt ./
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --only-binary :all: --require-hashes \
        --requirement requirements-deploy.txt \
    && find /opt/venv -type d -name tests -prune -exec rm -r {} +
COPY pyproject.toml README.md LICENSE ./
COPY sensor_pipeline ./sensor_pipeline
# The build back end is among the requirements, so that nothing is fetched here; nothing needs it afterwards.
RUN pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --no-build-isolation . \
    && pip --python /opt/venv/bin/python uninstall --yes setuptools

FROM ${PYTHON}

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sensor-pipeline" \
      org.opencontainers.image.description="Machine-sensor readings from Kafka to PostgreSQL, effectively once, in Dagster micro-batches" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

RUN groupadd --gid 10001 pipeline \
    && useradd --uid 10001 --gid pipeline --no-create-home --home-dir /tmp --shell /usr/sbin/nologin pipeline

COPY --from=build /opt/venv /opt/venv
# A DAGSTER_HOME for each way to execute runs: by the code server, or by workers on any number of hosts.
COPY sensor_pipeline/orchestration/dagster.yaml /opt/dagster/code-server/
COPY sensor_pipeline/orchestration/dagster.yaml sensor_pipeline/orchestration/workers.yaml /opt/dagster/workers/
RUN cat /opt/dagster/workers/workers.yaml >> /opt/dagster/workers/dagster.yaml && rm /opt/dagster/workers/workers.yaml
COPY deploy/workspace.yaml /opt/dagster/
COPY deploy/await-runs /usr/local/bin/

# What little is written goes to /tmp, so that the rest may be read-only.
ENV PATH=/opt/venv/bin:$PATH \
    DAGSTER_HOME=/opt/dagster/code-server \
    DAGSTER_DISABLE_TELEMETRY=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

WORKDIR /opt/dagster
USER 10001:10001

# The code server; whoever runs another command brings its own check. `dagster api grpc-health-check` asks the same, and
# takes a second of CPU to import what it is.
EXPOSE 4266
HEALTHCHECK --interval=10s --timeout=10s --start-period=3m --retries=3 \
    CMD ["python", "-c", "import grpc; from grpc_health.v1.health_pb2 import HealthCheckRequest; from grpc_health.v1.health_pb2_grpc import HealthStub; assert HealthStub(grpc.insecure_channel('127.0.0.1:4266')).Check(HealthCheckRequest(service='DagsterApi'), timeout=5).status == 1"]
CMD ["await-runs", "dagster", "code-server", "start", "--host", "0.0.0.0", "--port", "4266", "--module-name", "sensor_pipeline.orchestration.definitions"]
