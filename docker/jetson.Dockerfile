# hcmen on a Jetson: TensorRT with its plugins, and hcmen-compile. To be built on the device (docs/jetson.md).
#
#   docker build -f docker/jetson.Dockerfile -t hcmen:jetson .
#   docker run --rm --runtime nvidia --user "$(id -u):$(id -g)" -v "$PWD/build/bundle:/bundle" hcmen:jetson \
#     hcmen-compile /bundle --precision fp16
#   docker run --rm --runtime nvidia -v "$PWD/build/bundle:/bundle:ro" -v "$PWD/samples:/clips:ro" hcmen:jetson \
#     hcmen-run /clips/clip.npz --bundle /bundle --backend tensorrt
#
# The base is that of JetPack 6.1 and 6.2, with TensorRT 10.3. On JetPack 7 take one of NVIDIA's TensorRT images of the
# device's version, which has TensorRT's Python package already:
#   --build-arg BASE=nvcr.io/nvidia/tensorrt:25.08-py3 --build-arg TENSORRT_PYTHON= --build-arg ARCHITECTURES=110
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0@sha256:34ccf0f3b63c6da9eee45f2e79de9bf7fdf3beda9abfd72bbf285ae9d40bb673

FROM ${BASE}
ARG TENSORRT_PYTHON=python3-libnvinfer
ARG ARCHITECTURES=87
ENV PATH=/opt/hcmen/bin:/usr/local/cuda/bin:$PATH
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-venv ${TENSORRT_PYTHON} \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home hcmen
WORKDIR /src
COPY pyproject.toml constraints.txt CMakeLists.txt README.md LICENSE ./
COPY builder builder
COPY hcmen hcmen
COPY export export
COPY runtime runtime
# TensorRT's Python package is the system's, and constraints.txt names versions that Python 3.10 does not have.
RUN python3 -m venv --system-site-packages /opt/hcmen \
 && /opt/hcmen/bin/pip install --no-cache-dir \
      --config-settings="cmake.define.CMAKE_CUDA_ARCHITECTURES=${ARCHITECTURES}" \
      --config-settings="cmake.define.TENSORRT_INCLUDE_DIR=/usr/include/$(uname -m)-linux-gnu" \
      '.[tensorrt]'
USER 10001
WORKDIR /home/hcmen
CMD ["hcmen-doctor"]
