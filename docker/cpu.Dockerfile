# hcmen on the CPU: scoring with ONNX Runtime and the kernels, built for the processor architecture of the image.
#
#   docker build -f docker/cpu.Dockerfile -t hcmen:cpu .
#   docker run --rm -v "$PWD/build/bundle:/bundle:ro" -v "$PWD/samples:/clips:ro" hcmen:cpu \
#     hcmen-run /clips/clip.npz --bundle /bundle
ARG PYTHON=3.12.11-slim-bookworm@sha256:519591d6871b7bc437060736b9f7456b8731f1499a57e22e6c285135ae657bf7

FROM python:${PYTHON} AS build
# The base is pinned; Debian's archive keeps one version of a package, so that a pin of it would break with every update.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ make \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints-device.txt CMakeLists.txt README.md LICENSE ./
COPY builder builder
COPY hcmen hcmen
COPY export export
COPY runtime runtime
RUN python -m venv /opt/hcmen \
 && /opt/hcmen/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r constraints-device.txt \
 && /opt/hcmen/bin/pip install --no-cache-dir --no-deps .

FROM python:${PYTHON}
RUN useradd --uid 10001 --create-home hcmen
COPY --from=build /opt/hcmen /opt/hcmen
ENV PATH=/opt/hcmen/bin:$PATH
USER 10001
WORKDIR /home/hcmen
CMD ["hcmen-doctor"]
