# hcmen on an NVIDIA GPU in a server: ONNX Runtime on CUDA, TensorRT with its plugins, and hcmen-compile.
#
#   docker build -f docker/cuda.Dockerfile -t hcmen:cuda .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD/build/bundle:/bundle" hcmen:cuda \
#     hcmen-compile /bundle --precision fp16
#   docker run --rm --gpus all -v "$PWD/build/bundle:/bundle:ro" -v "$PWD/samples:/clips:ro" hcmen:cuda \
#     hcmen-run /clips/clip.npz --bundle /bundle --backend tensorrt
#
# The headers and the Python package of TensorRT are of one version, and of the CUDA of the base.
ARG DEVEL=12.9.1-devel-ubuntu24.04@sha256:020bc241a628776338f4d4053fed4c38f6f7f3d7eb5919fecb8de313bb8ba47c
ARG RUNTIME=12.9.1-cudnn-runtime-ubuntu24.04@sha256:d02c4310b6d57ca0b16cd80298bdb33a74187baafe2eccd8a6a16180ddc90802

FROM nvidia/cuda:${DEVEL} AS build
ARG TENSORRT=10.13.3.9
ARG TENSORRT_CUDA=12.9
ARG ONNXRUNTIME=1.23.2
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      g++ \
      python3-venv \
      "libnvinfer-headers-dev=${TENSORRT}-1+cuda${TENSORRT_CUDA}" \
      "libnvinfer-headers-plugin-dev=${TENSORRT}-1+cuda${TENSORRT_CUDA}" \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt CMakeLists.txt README.md LICENSE ./
COPY builder builder
COPY hcmen hcmen
COPY export export
COPY runtime runtime
RUN python3 -m venv /opt/hcmen \
 && /opt/hcmen/bin/pip install --no-cache-dir --constraint constraints.txt \
      --config-settings=cmake.define.HCMEN_CUDA=ON \
      --config-settings="cmake.define.TENSORRT_INCLUDE_DIR=/usr/include/$(uname -m)-linux-gnu" \
      . "onnxruntime-gpu==${ONNXRUNTIME}" "tensorrt-cu12==${TENSORRT}" 'onnx>=1.21'

FROM nvidia/cuda:${RUNTIME}
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home hcmen
COPY --from=build /opt/hcmen /opt/hcmen
ENV PATH=/opt/hcmen/bin:$PATH
USER 10001
WORKDIR /home/hcmen
CMD ["hcmen-doctor"]
