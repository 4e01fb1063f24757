#!/usr/bin/env bash
source tests/device/setup.sh
export PYTHONPATH="$PYTHONPATH:$PWD"
timeout 240 python3 -m pytest -q -x -p no:cacheprovider tests/device -k "not mixtral and not moe" 2>&1 | tail -40
time timeout 150 python3 tests/device/random_engine.py llama-1b /tmp/e1b 2>&1 | tail -20
timeout 120 python3 tests/device/bench.py /tmp/e1b 2>&1 | tail -30
FARRIER_DEVICE=1 timeout 250 python3 -m pytest -q -p no:cacheprovider tests/kernels -x --maxfail=15 2>&1 | tail -60
