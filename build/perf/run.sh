#!/usr/bin/env bash
# Throughput and latency of a running server by task and concurrency, measured by perf_analyzer.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<EOT
usage: build/perf/run.sh [GRPC [HTTP]]

GRPC is the server's Triton gRPC address (localhost:8001, which `serve --triton-grpc-port 8001` gives it), HTTP that of its OpenAI API (localhost:8091).
These variables have defaults:
  TASKS        text2img img2img img2text text2text bagel ensemble chat images: the files here
  CONCURRENCY  requests in flight (1 4 16)
  REQUESTS     requests at each concurrency (40)
EOT
}

case ${1:-} in -h | --help)
    usage
    exit 0
    ;;
esac
grpc=${1:-localhost:8001}
http=${2:-localhost:8091}
tasks=${TASKS:-text2img img2img img2text text2text bagel ensemble chat images}

# need ADDRESS WHAT HINT: end here where nothing listens, as perf_analyzer would not say what to do.
need() {
    (exec 3<>"/dev/tcp/${1%:*}/${1##*:}") 2>/dev/null && return
    echo "run.sh: error: $2 does not answer at $1; $3" >&2
    exit 1
}
case " $tasks " in *" chat "* | *" images "*)
    need "$http" "the OpenAI API" "give its address as the second argument"
    ;;
esac
for task in $tasks; do
    case $task in
        chat | images) ;;
        *)
            need "$grpc" "Triton's gRPC" "give the address that serve prints for it, or start serve with --triton-grpc-port ${grpc##*:}"
            break
            ;;
    esac
done
for task in $tasks; do
    case $task in
        chat) target=(-m bagel --async --service-kind openai --endpoint v1/chat/completions -u "$http") ;;
        images) target=(-m bagel --async --service-kind openai --endpoint v1/images/generations -u "$http") ;;
        ensemble) target=(-m bagel_text2img -i grpc -u "$grpc") ;;
        bagel) target=(-m bagel -i grpc --streaming -u "$grpc") ;;
        img2*) target=(-m bagel_infer -i grpc --shape image:1 -u "$grpc") ;;
        *) target=(-m bagel_infer -i grpc -u "$grpc") ;;
    esac
    echo "== $task (${target[*]})"
    for concurrency in ${CONCURRENCY:-1 4 16}; do
        # Of its report, the last line; its errors, without the usage that follows them, where it failed.
        report=$("$here/../../.venv/bin/bagel-triton" perf-analyzer -- "${target[@]}" \
            --input-data "$here/$task.json" --concurrency-range "$concurrency" \
            --request-count "${REQUESTS:-40}" 2>&1) || {
            sed '/^Usage:/,$d' <<<"$report" >&2
            exit 1
        }
        grep '^Concurrency:' <<<"$report"
    done
done
