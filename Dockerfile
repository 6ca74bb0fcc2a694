# GPU machines: TensorRT from NVIDIA's image, this package from its wheel.
#
#   docker build -t trsp-deploy .
#   docker run --gpus all -v "$PWD/runs:/data/runs" -v trsp-models:/models trsp-deploy convert opt-6.7b   # OPT alone
#   docker run --gpus all -v "$PWD/runs:/data/runs" -v trsp-models:/models trsp-deploy \
#       prune-and-build --model opt-6.7b --drop 25%
# Of October 2025, before TensorRT 10.15: for the specs that want that (docs/engines.md) give a later one,
# `--build-arg TENSORRT=nvcr.io/nvidia/tensorrt:TAG`. No image was built: no Docker was at hand.
ARG TENSORRT=nvcr.io/nvidia/tensorrt:25.10-py3
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir "build>=1.2,<2" && python -m build --wheel --outdir /wheel

FROM ${TENSORRT}
# The image's own Python packages (TensorRT among them) stay visible; ours go into an environment above them.
COPY --from=wheel /wheel /wheel
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv --system-site-packages /opt/trsp \
    && /opt/trsp/bin/pip install --no-cache-dir "$(ls /wheel/*.whl)[optimum,gpu]" \
    && ln -s /opt/trsp/bin/trsp-deploy /usr/local/bin/trsp-deploy \
    && trsp-deploy --help > /dev/null
ENV HF_HOME=/models/huggingface TRSP_DEPLOY_HOME=/models/trsp_deploy
WORKDIR /data
ENTRYPOINT ["trsp-deploy"]
