#!/usr/bin/env bash
# Everything that needs a GPU, on any CUDA machine, in under 10 minutes: build, tests of every backend,
# compute-sanitizer on a small case, block sizes, benches. Writes to the folder given (default: gpu_results) as it goes,
# and goes on where it ended.
#
#   bench/gpu.sh [FOLDER] [STEP...]     steps: build test shapes tune bench sanitize (all of them if none is named)
#
# ARCHIVE=file.tgz keeps all of the folder in one file, too, after each step.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_results}
shift || true
steps=${*:-build test shapes tune bench sanitize}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()

# step NAME SECONDS COMMAND...: kernels that wait for each other must not take all of the time if they wait for ever.
step() {
  local name=$1 limit=$2
  shift 2
  case " $steps " in *" $name "*) ;; *) return ;; esac
  echo "== $name: $*"
  local begin=$SECONDS
  timeout -k 10 "$limit" "$@" 2>&1 | tee "$out/${log:-$name}.log"
  local status=${PIPESTATUS[0]}
  echo "== $name: exit $status after $((SECONDS - begin)) s"
  [ "$status" -eq 0 ] || failed+=("$name")
  [ -z "${ARCHIVE:-}" ] || tar -czf "$ARCHIVE" -C "$out" .
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
step build 180 env DTS_FAST_BUILD=cuda MAX_JOBS=12 "$python" setup.py -q build_ext --inplace
# In processes of their own where pytest-xdist is there: most of the time goes to compiling.
workers=$("$python" -c "import xdist" 2>/dev/null && echo "-n 12")
step test 240 env OMP_NUM_THREADS=1 "$python" -m pytest -q --maxfail=30 $workers tests/test_gpu.py \
  tests/test_gpu_model.py tests/test_ops.py tests/test_triton.py tests/test_nn*.py \
  -k "not test_every_configuration_compiles"
step shapes 120 "$python" bench/tune_cuda.py --minutes 1.5 --out "$out/decode_shapes.jsonl"
step tune 180 "$python" bench/tune_triton.py --minutes 2 --rows 2048 64 1 16 --out "$out"
if compgen -G "$out/sm_*.json" >/dev/null; then
  mkdir -p dts_fast/triton/tables
  cp "$out"/sm_*.json dts_fast/triton/tables/
fi
step bench 240 "$python" bench/bench_ops.py --device cuda --rounds 5 --out "$out/ops_cuda.jsonl"
if command -v compute-sanitizer >/dev/null; then
  for check in memcheck racecheck synccheck; do
    log=sanitize_$check step sanitize 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $check \
      --error-exitcode 9 --kernel-regex kns=_kernel "$python" -m pytest -q -p no:cacheprovider \
      "tests/test_triton.py::test_any_block_sizes_compute_the_same" "tests/test_gpu.py::test_rows_use_their_own_adapters"
  done
fi
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
