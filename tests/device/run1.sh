#!/usr/bin/env bash
source tests/device/setup.sh
export PYTHONPATH="$PYTHONPATH:$PWD"
timeout 150 python3 -m pytest -q -x -p no:cacheprovider tests/device -k "not mixtral and not moe" 2>&1 | tail -40
for job in "llama-1b bf16" "llama-8b bf16" "llama-8b fp8"; do
set -- $job
echo "== $job"
timeout 200 python3 tests/device/random_engine.py $1 /tmp/e --precision $2 2>&1 | tail -20
timeout 120 python3 tests/device/bench.py /tmp/e 2>&1 | tail -20
[ -f /tmp/e/model.cache ] && cp /tmp/e/model.cache $OUT/$1-$2.cache
rm -rf /tmp/e
done
