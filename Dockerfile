# Image for GKE (launch/README.md): docker build -t IMAGE .
# EXTRAS are those of pyproject.toml: tpu or cuda; torch only to read weights in PyTorch's format.
FROM python:3.13-slim
ARG EXTRAS=tpu,data,torch
ENV PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=3
WORKDIR /repae
# The dependencies first: they change more rarely than the code.
COPY pyproject.toml setup.py constraints-newest.txt README.md LICENSE ./
COPY repae_jax/__init__.py repae_jax/__init__.py
RUN pip install --no-cache-dir uv
RUN uv pip install --system --no-cache --constraint constraints-newest.txt --editable ".[${EXTRAS}]"
COPY . .
RUN uv pip install --system --no-cache --no-deps --editable .
