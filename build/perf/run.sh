#!/usr/bin/env bash
# Throughput and latency of a running server by task and concurrency, measured by perf_analyzer.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<EOF
usage: build/perf/run.sh [HOST:PORT]

HOST:PORT is the server's Triton gRPC address (localhost:8001). These variables are defaults:
  TASKS        text2img img2img img2text text2text ensemble: the files here
  CONCURRENCY  requests in flight (1 4 16)
  REQUESTS     requests at each concurrency (40)
EOF
}

case ${1:-} in -h | --help)
    usage
    exit 0
    ;;
esac
address=${1:-localhost:8001}
for task in ${TASKS:-text2img img2img img2text text2text ensemble}; do
    model=bagel_infer
    shape=()
    [ "$task" = ensemble ] && model=bagel_text2img
    [[ $task == img2* ]] && shape=(--shape image:1)
    echo "== $task ($model)"
    for concurrency in ${CONCURRENCY:-1 4 16}; do
        # Of its report, the last line, or all of it where it failed.
        report=$("$here/../../.venv/bin/bagel-triton" perf-analyzer -- -m "$model" -i grpc -u "$address" \
            --input-data "$here/$task.json" "${shape[@]}" --concurrency-range "$concurrency" \
            --request-count "${REQUESTS:-40}" 2>&1) || {
            echo "$report" >&2
            exit 1
        }
        grep '^Concurrency:' <<<"$report"
    done
done
