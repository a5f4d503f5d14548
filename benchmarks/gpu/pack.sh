#!/usr/bin/env bash
# Fetches what a GPU machine without a network lacks, as wheels: benchmarks/gpu/pack.sh [PYTHON_VERSION]
# Such a machine is taken to have torch, torchvision, lightning, torchmetrics, scikit-learn, matplotlib, rich and pyarrow.
set -euo pipefail
cd "$(dirname "$0")"
platforms=$(printf -- '--platform manylinux_2_%s_x86_64 ' 28 27 17)
# shellcheck disable=SC2086 # a list of options
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "${1:-3.12}" --implementation cp \
    $platforms --platform manylinux2014_x86_64 --dest wheels \
    'hydra-core<1.4' 'omegaconf<2.4' hydra-joblib-launcher kornia kornia_rs safetensors filelock
# Hydra's parser comes as source alone; it is plain Python.
python3 -m pip wheel --quiet --no-deps --wheel-dir wheels 'antlr4-python3-runtime==4.9.*'
du -sh wheels
