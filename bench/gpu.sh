#!/usr/bin/env bash
# Everything that needs a GPU, on any CUDA machine, in about 10 minutes: build, tests of every backend, benches, block
# sizes, compute-sanitizer on a small case. Writes to the folder given (default: gpu_results) as it goes, and goes on
# where it ended. What tells most comes first.
#
#   bench/gpu.sh [FOLDER] [STEP...]     steps: build decode test shapes bench tune sanitize (all of them if none is named)
#                                       and model: Llama-3.1-8B as a whole, five minutes and 40 GB more (if it is named)
#
# ARCHIVE=file.tgz keeps all of the folder in one file, too, after each step and when it is stopped.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_results}
shift || true
steps=${*:-build decode test shapes bench tune sanitize}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()

archive() { [ -z "${ARCHIVE:-}" ] || tar -czf "$ARCHIVE" -C "$out" .; }
trap archive EXIT
trap 'exit 143' TERM INT

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
  archive
  [ "$status" -eq 0 ] && return
  failed+=("$name")
  # The rest would measure something else.
  [ "$name" != build ] || { echo "failed: build"; exit 1; }
}

has() { "$python" -c "import $1" 2>/dev/null; }
# In processes of their own where pytest-xdist is there: most of the time goes to compiling.
workers=$(has xdist && echo "-n 12")
# A kernel that waits for ever names its test. Some compile dozens of variants, and many do so at once.
limit=$(has pytest_timeout && echo "--timeout=150 --timeout-method=thread")

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
step build 180 env DTS_FAST_BUILD=cuda MAX_JOBS=12 "$python" setup.py -q build_ext --inplace
step decode 180 "$python" -m pytest -q -x $limit tests/test_gpu.py
step test 200 env OMP_NUM_THREADS=1 "$python" -m pytest -q --maxfail=30 $limit $workers tests/test_gpu_model.py \
  tests/test_ops.py tests/test_triton.py tests/test_nn*.py -k "not test_every_configuration_compiles"
step shapes 100 "$python" bench/tune_cuda.py --minutes 1.2 --out "$out/decode_shapes.jsonl"
step bench 200 "$python" bench/bench_ops.py --device cuda --rounds 5 --out "$out/ops_cuda.jsonl"
step tune 150 "$python" bench/tune_triton.py --minutes 2 --rows 2048 64 1 16 --out "$out"
if compgen -G "$out/sm_*.json" >/dev/null; then
  mkdir -p dts_fast/triton/tables
  cp "$out"/sm_*.json dts_fast/triton/tables/
fi
step model 400 "$python" bench/bench_model.py --device cuda --rounds 3 --out "$out/model_cuda.jsonl"
if command -v compute-sanitizer >/dev/null; then
  for check in memcheck racecheck synccheck; do
    log=sanitize_$check step sanitize 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $check \
      --error-exitcode 9 --kernel-regex kns=_kernel "$python" -m pytest -q -p no:cacheprovider \
      "tests/test_triton.py::test_any_block_sizes_compute_the_same" "tests/test_gpu.py::test_rows_use_their_own_adapters"
  done
fi
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
