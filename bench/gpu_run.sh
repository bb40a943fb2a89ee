#!/usr/bin/env bash
# Ten minutes on a GPU, most valuable first: bash bench/gpu_run.sh [--dry-run], from the repository's root.
# It needs .cache/gpu_kit.tar.xz (make gpu-kit) where the machine lacks this project's packages. Every step has its own
# limit and log under $OUT, so one that hangs costs its limit; all together at most 560 s. A machine without a GPU
# runs the same with --dry-run, where each step for a GPU is skipped and says why. The Python is .venv's or else the
# machine's; PY=... chooses another. python -m bench.gpu_report $OUT writes the results into docs/benchmarks.md.
started=$SECONDS
total=560
OUT=${OUT:-/tmp/gpu_run}
mkdir -p "$OUT"
: >"$OUT/steps.tsv" # a step's name, outcome and seconds a line
PY=${PY:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || command -v python3)}
dry=
[ "${1:-}" = --dry-run ] && dry=--cpu

skip() { # name reason
    echo "== $1 skipped: $2"
    printf '%s\tskipped: %s\t0\n' "$1" "$2" >>"$OUT/steps.tsv"
}

step() { # name limit command...: its last lines are shown, all of it is in $OUT/name.log
    local name=$1 limit=$2 from=$SECONDS rc left=$((total - (SECONDS - started)))
    shift 2
    if [ "$left" -lt 10 ]; then
        skip "$name" "no time left"
        return
    fi
    timeout -k 5 "$((limit < left ? limit : left))" "$@" >"$OUT/$name.log" 2>&1
    rc=$?
    echo "== $name rc=$rc $((SECONDS - from)) s (at $((SECONDS - started)) s)"
    printf '%s\trc=%s\t%s\n' "$name" "$rc" "$((SECONDS - from))" >>"$OUT/steps.tsv"
    tail -n "${TAIL:-4}" "$OUT/$name.log" | cut -c1-300
}

on_gpu() { # a step that cannot skip itself
    if [ -n "$dry" ]; then skip "$1" "there is no GPU (--dry-run)"; else step "$@"; fi
}

kit=
if [ -f .cache/gpu_kit.tar.xz ] && [ -z "$dry" ]; then
    kit=$(mktemp -d)
    tar -C "$kit" -xf .cache/gpu_kit.tar.xz || "$PY" -m tarfile -e .cache/gpu_kit.tar.xz "$kit" # without xz
    # numpy stays the machine's until the server's tests: the kit's packages come last, its numpy not at all.
    mkdir "$kit.path"
    for part in "$kit"/*; do
        case $part in */numpy*) ;; *) ln -s "$part" "$kit.path/" ;; esac
    done
fi
export PYTHONPATH=$PWD/python_backends:$PWD${kit:+:$kit.path} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
tests=("$PY" -m pytest -q -rs -p no:cacheprovider -o filterwarnings=default --timeout 90)

df -h /dev/shm | tail -1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | head -1
TAIL=60 step probe 90 "$PY" -m bench.gpu_probe $dry
step weights 100 "${tests[@]}" tests/gpu/test_cuda_weights.py
step ipc 100 "${tests[@]}" tests/gpu/test_cuda_ipc.py
TAIL=10 step attention 60 "${tests[@]}" tests/gpu/test_engines.py -k "attention or sequences"
TAIL=20 on_gpu bench 120 "$PY" -m bench --device cuda --only published_on_gpu --trials 1 --out "$OUT/bench.json"
TAIL=8 step engines 120 "${tests[@]}" --maxfail 6 tests/gpu/test_engines.py
TAIL=6 on_gpu handoff 40 "$PY" -m bench.kv_handoff --connectors cuda_ipc --megabytes 64 256 --trials 5
step mooncake 60 "${tests[@]}" tests/gpu/test_mooncake.py # skipped where Mooncake is not installed; the kit has none
# Triton's stubs take packages from site-packages and not from PYTHONPATH, and need the kit's numpy: a .pth line puts
# both first, until the end of this script.
if [ -n "$kit" ]; then
    pth=$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/00_bagel_triton_kit.pth
    trap 'rm -f "$pth"; rm -rf "$kit" "$kit.path"' EXIT
    echo "import sys; sys.path[:0] = ['$PWD/python_backends', '$kit']" >"$pth"
    unset PYTHONPATH
fi
TMPDIR=$(mktemp -d) # not the place of other servers
export TMPDIR
TAIL=12 step serving 300 "${tests[@]}" tests/gpu/test_serving.py
cp "$TMPDIR"/bagel_triton_*/tritonserver.log "$OUT/" 2>/dev/null
rm -rf "$TMPDIR"
echo "total $((SECONDS - started)) s; logs: $OUT"
