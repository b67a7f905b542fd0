# FROMAGe as a server on port 8000, whose / leads to its docs.
#   docker build -t fromage .
#   docker run --rm -p 8000:8000 -v fromage:/data fromage      # the toy world, made in some minutes and kept in the volume
#   docker run --rm -p 8000:8000 -v /my/index:/index:ro -v /my/photos:/photos:ro fromage \
#       serve --host 0.0.0.0 --port 8000 --index /index --images /photos
# PyTorch's own wheels, with CUDA where they have it (docker run --gpus all); --build-arg TORCH_INDEX=URL takes those of another
# index, such as the smaller ones for CPUs alone that pytorch.org tells of. Any command of fromage stands in the place of `serve`.
# It runs as user 10001, who must be able to read what is mounted.
FROM python:3.11-slim

ARG TORCH_INDEX=
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch torchvision
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY lightning_configs lightning_configs
COPY fromage fromage
RUN pip install --constraint constraints.txt '.[serve,gguf]'

RUN useradd --create-home --uid 10001 fromage && install --directory --owner fromage /data
ENV XDG_STATE_HOME=/data/state FROMAGE_CACHE=/data/cache HF_HOME=/data/huggingface
USER 10001
WORKDIR /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
ENTRYPOINT ["fromage"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
