#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, with one table at the end. Started from the repository's root:
#
#   tests/device/run.sh                        all steps
#   tests/device/run.sh parity llama-8b-fp8    these steps
#   tests/device/run.sh --skip kernels         all but this one; may be repeated
#
# It is these sources that run, whether the package is installed or not (setup.sh). From the environment:
#   OUT      where results.json, run.log and the sweeps' timings go (.farrier/device)
#   CACHES   a folder with an earlier run's timings (NAME.cache), which save the sweeps
#   LIMIT    seconds for all of it: a step gets what is left at most, and none starts with less than 10
#   PYTHON   python3
set -uo pipefail
cd "$(dirname "$0")/../.."
steps=(kernels parity faults serve build accuracy bench ceilings llama-1b-bf16 llama-8b-bf16 llama-8b-fp8 llama-8b-int8 llama-8b-int4)
declare -A seconds_of=([kernels]=560 [parity]=200 [faults]=150 [serve]=150 [build]=90 [accuracy]=60 [bench]=60 [ceilings]=45)
engine_seconds=150

farrier() { "$PYTHON" -m farrier.agent.cli "$@"; }
test_with() { "$PYTHON" -m pytest -q -p no:cacheprovider -p no:benchmark "$@"; }
several() { "$PYTHON" -c 'import xdist' 2>/dev/null && printf '%s' '-n 6'; }
demo() { [ -d "$WORK/demo" ] || farrier build demo -o "$WORK/demo"; }

run_step() {
    case $1 in
        kernels) FARRIER_DEVICE=1 test_with tests/kernels ;;
        parity) test_with $(several) tests/device --ignore tests/device/test_serve.py --ignore tests/device/test_faults.py ;;
        faults) test_with tests/device/test_faults.py ;;
        serve) test_with tests/device/test_serve.py ;;
        build) rm -rf "$WORK/demo" && demo && farrier inspect "$WORK/demo" ;;
        accuracy) demo && "$PYTHON" tests/device/accuracy.py "$WORK/demo" --json "$PIECES/accuracy.json" ;;
        bench) demo && bench "$WORK/demo" ;;
        ceilings) "$PYTHON" tests/device/ceilings.py --json "$PIECES/ceilings.json" ;;
        llama-*) engine "$1" ;;
    esac
}

bench() {
    farrier bench latency "$1" --batch-sizes 1,16,64 --json "$PIECES/demo.latency.json" || return
    farrier bench throughput "$1" --num-requests 256 --json "$PIECES/demo.throughput.json" || return
    "$PYTHON" -m farrier.agent.cli serve "$1" --port 0 >"$WORK/served" 2>&1 &
    local server=$! url='' status
    for _ in $(seq 300); do
        url=$(grep -o 'http://127\.0\.0\.1:[0-9]*' "$WORK/served" | head -1)
        [ -n "$url" ] && break
        sleep 0.1
    done
    [ -n "$url" ] || { cat "$WORK/served"; return 1; }
    farrier bench serve --base-url "$url" --vocab-size 960 --concurrency 64 --num-requests 256 --json "$PIECES/demo.serve.json"
    status=$?
    kill "$server"
    wait "$server" || { cat "$WORK/served"; return 1; }
    return $status
}

# llama-8b-fp8: random weights of that shape and precision; built, measured, served, and removed.
engine() {
    local name=$1 out="$WORK/$1" timings=()
    [ -f "${CACHES:-}/$name.cache" ] && timings=(--timings "$CACHES/$name.cache")
    "$PYTHON" tests/device/random_engine.py "${name%-*}" "$out" --precision "${name##*-}" "${timings[@]}" || return
    cp "$out/model.cache" "$OUT/$name.cache"
    "$PYTHON" tests/device/bench.py "$out" --json "$PIECES/$name.bench.json" || return
    "$PYTHON" tests/device/process.py "$out" --json "$PIECES/$name.process.json" || return
    rm -rf "$out"
}

if [ "${1:-}" = --step ]; then
    run_step "$2"
    exit
fi

export PYTHON=${PYTHON:-python3} OUT=${OUT:-.farrier/device} CACHES=${CACHES:-}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
WORK=$(mktemp -d)
export WORK PIECES=$WORK/pieces
mkdir "$PIECES"
trap 'rm -rf "$WORK"' EXIT
source tests/device/setup.sh
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD" # for `tests`
"$PYTHON" -c 'from farrier.targets.cuda.device import open_device; print(open_device().name)' || exit

chosen=() skipped=' '
while [ $# -gt 0 ]; do
    case $1 in
        --skip) skipped+="$2 " && shift 2 ;;
        *) chosen+=("$1") && shift ;;
    esac
done
for name in "${chosen[@]}" $skipped; do
    case " ${steps[*]} " in
        *" $name "*) ;;
        *) echo "There is no step $name; there are: ${steps[*]}." >&2 && exit 2 ;;
    esac
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${steps[@]}")

: >"$OUT/run.log"
failed=0
for name in "${chosen[@]}"; do
    [[ $skipped == *" $name "* ]] && continue
    limit=${seconds_of[$name]:-$engine_seconds}
    if [ -n "${LIMIT:-}" ]; then
        left=$((LIMIT - SECONDS))
        [ "$left" -lt "$limit" ] && limit=$left
    fi
    begun=$SECONDS status='no time left'
    if [ "$limit" -ge 10 ]; then
        timeout -k 5 "$limit" bash tests/device/run.sh --step "$name" >"$WORK/log" 2>&1
        case $? in
            0) status=ok ;;
            124 | 137) status="not done in $limit s" ;;
            *) status=failed ;;
        esac
        { echo "== $name"; cat "$WORK/log"; } >>"$OUT/run.log"
        rm -rf "$WORK"/llama-*
    fi
    [ "$status" = ok ] || failed=1
    printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - begun)) >>"$PIECES/steps.tsv"
    printf '== %s: %s, %s s\n' "$name" "$status" $((SECONDS - begun))
    tail -n "$([ "$status" = ok ] && echo 4 || echo 25)" "$WORK/log" 2>/dev/null | cut -c 1-300
    : >"$WORK/log"
done

"$PYTHON" tests/device/results.py collect "$PIECES" "$OUT/results.json" || failed=1
exit $failed
