# tnt_jax with JAX for one kind of accelerator, installed by setup.py:
#   docker build --build-arg ACCELERATOR=gpu --tag tnt_jax .      or tpu; what JAX needs of CUDA comes with it
#   docker run --gpus=all tnt_jax tnt_jax.train --gin_file=runs/train.gin ...
FROM python:3.12-slim

ARG ACCELERATOR=gpu
WORKDIR /tnt_jax

# Rarely changed, and slow: installed by itself, so that a change of the code does not do it again.
COPY setup.py pyproject.toml ./
COPY tnt_jax/__init__.py tnt_jax/
# The versions are those that setup.py asks for.
# hadolint ignore=DL3013
RUN mkdir gin_configs && pip install --no-cache-dir ".[${ACCELERATOR},hub]" && pip uninstall --yes tnt_jax

COPY README.md LICENSE ./
COPY tnt_jax tnt_jax
COPY gin_configs gin_configs
COPY launch launch
RUN pip install --no-cache-dir --no-deps .

# SIGTERM (docker stop --time=120): the program saves and ends.
ENTRYPOINT ["launch/restart_loop.sh", "--", "python", "-m"]
CMD ["tnt_jax.train", "--help"]
