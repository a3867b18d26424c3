#!/usr/bin/env bash
# Everything that only a GPU can prove, in one command: ./dev gpu [--quick]
#   1. the tests of the backend's operations, natively; one of them under compute-sanitizer
#   2. the limits of this very card: copy bandwidth, cuBLASLt's best product
#   3. the kernels' benchmarks against those limits
#   4. serving a random-weight Llama-3.1-8B shape end to end, with HTTP load
# Results: build/gpu/report.md and build/gpu/*.csv. Nothing is written that was not measured.
set -euo pipefail
cd "$(dirname "$0")/.."
quick=false
[ "${1:-}" = --quick ] && quick=true
build=build/release out=build/gpu
mkdir -p "$out"

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
stop() { say "$*"; exit 1; }

command -v nvidia-smi >/dev/null || stop "no nvidia-smi: this machine has no NVIDIA driver"
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit,memory.total --format=csv | tee "$out/gpu.csv"
PATH="$PATH:/usr/local/cuda/bin"
command -v nvcc >/dev/null || stop "no nvcc: the plugin cannot be built here"
[ -f "$build/build.ninja" ] || cmake --preset release >/dev/null
ninja -C "$build" --quiet
[ -f "$build/heddle_cuda.so" ] || stop "the CUDA plugin was not built"

report="$out/report.md"
{
  echo "# GPU suite"
  echo
  date -u +%FT%TZ
  git describe --always --dirty 2>/dev/null || true
  echo
  sed 's/^/    /' "$out/gpu.csv"
  echo
  echo "| test | result |"
  echo "| --- | --- |"
} >"$report"

failed=0
note() { # note NAME STATUS
  echo "| $1 | $([ "$2" = 0 ] && echo passed || echo FAILED) |" >>"$report"
  [ "$2" = 0 ] || failed=1
}

export HEDDLE_PLUGIN_DIR="$PWD/$build"
unset HEDDLE_FAKE_GPU
for name in ops attention sample; do
  say "test_cuda_$name on the GPU"
  status=0
  "$build/tests/cuda/test_cuda_$name" >"$out/test_$name.log" 2>&1 || status=$?
  note "test_cuda_$name" "$status"
done
# The devices that fail are played by the stand-in; of the steps only the first test is native.
say "test_cuda_steps on the GPU"
status=0
HEDDLE_GPU_NATIVE=1 "$build/tests/cuda/test_cuda_steps" >"$out/test_steps.log" 2>&1 || status=$?
note "test_cuda_steps" "$status"

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck initcheck; do
    say "compute-sanitizer $tool"
    status=0
    HEDDLE_CUDA_QUICK=1 timeout 1200 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$build/tests/cuda/test_cuda_attention" >"$out/sanitizer_$tool.log" 2>&1 || status=$?
    note "compute-sanitizer $tool (attention)" "$status"
  done
else
  echo "| compute-sanitizer | not installed |" >>"$report"
fi

say "benchmarks"
bench_args=()
$quick && bench_args=(--quick)
status=0
"$build/tests/cuda/bench_cuda" "${bench_args[@]}" >"$out/bench.csv" 2>"$out/bench.log" || status=$?
note "bench_cuda" "$status"
if [ "$status" = 0 ]; then
  {
    echo
    echo "| what | shape | ms | GB/s | TFLOP/s | share of this card's limit |"
    echo "| --- | --- | --- | --- | --- | --- |"
    tail -n +2 "$out/bench.csv" | awk -F, '{printf "| %s | %s | %s | %s | %s | %s |\n", $1, $2, $3, $4, $5, $6}'
  } >>"$report"
fi

say "serving a random-weight Llama-3.1-8B shape"
model="$out/llama-3.1-8b"
status=0
{
  python3 bench/make_shape.py llama-3.1-8b "$model" &&
    tools/gpu_serve.sh "$build/heddle" "$model" "$out"
} >"$out/serve.log" 2>&1 || status=$?
note "serving end to end" "$status"
[ -f "$out/serve.md" ] && { echo; cat "$out/serve.md"; } >>"$report"

say "report: $report"
cat "$report"
exit "$failed"
