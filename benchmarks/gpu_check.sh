#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes, on a machine with CUDA, torch and Triton and
# no network: build for its GPU, tests, compute-sanitizer, timings, and a summary of the targets.
#
#   bash benchmarks/gpu_check.sh [options] [FOLDER]      results go to FOLDER, $OUT, or ./gpu-check
#
#   --stages a,b,...   only these (default: all of them, see STAGES)
#   --seconds N        for everything together (default 530)
#   --python PATH      the interpreter that has torch (default python3)
#   --dry-run          print what would run
#
# A stage that fails or runs out of its time stops none of the others. FOLDER then holds
# gpu_check.log, gpu.csv (a row as soon as it was measured), roofline.png, stages.csv, summary.txt.
# MIXBITS_COMMIT says what is measured where git cannot, MIXBITS_CUDA_ARCH what to build for.
# Exit code 1: a stage failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

STAGES="build tests rounding matmul memcheck racecheck sensitivity generate more_matmul"
# Seconds that each may take at the most; what the others leave over is not handed on.
declare -A LIMIT=([build]=200 [tests]=120 [rounding]=45 [matmul]=120 [memcheck]=60
    [racecheck]=60 [sensitivity]=70 [generate]=70 [more_matmul]=300)

stages=$STAGES seconds=530 python=python3 dry_run=0 folder=${OUT:-gpu-check}
while [ $# -gt 0 ]; do
    case $1 in
        --stages) stages=${2//,/ } && shift ;;
        --seconds) seconds=$2 && shift ;;
        --python) python=$2 && shift ;;
        --dry-run) dry_run=1 ;;
        -*) echo "unknown option $1" >&2 && exit 2 ;;
        *) folder=$1 ;;
    esac
    shift
done
for stage in $stages; do
    case " $STAGES " in
        *" $stage "*) ;;
        *) echo "no stage $stage: there are $STAGES" >&2 && exit 2 ;;
    esac
done
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
log=$folder/gpu_check.log csv=$folder/gpu.csv
export OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/mixbits-triton} TRITON_DEFAULT_FP_FUSION=1
[ -d /usr/local/cuda/bin ] && PATH=$PATH:/usr/local/cuda/bin

# 90a, 100a, 120a: architectures with instructions of their own; nothing without a GPU.
architecture() {
    "$python" - <<'END'
import torch
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}{minor}" + "a" * (major >= 9))
END
}

# Without pip, which may want newer tools than there are, and from another folder, so that
# setuptools does not read pyproject.toml. The library goes beside its modules, kernels/triton gets
# its name. pybind11's headers come with torch as well.
build() {
    local root=$PWD work=$PWD/build/gpu_check # it stays: what was compiled need not be again
    mkdir -p "$work/headers"
    if ! "$python" -c "import pybind11" 2>/dev/null; then
        mkdir -p "$work/headers/pybind11"
        cat >"$work/headers/pybind11/__init__.py" <<'END'
import pathlib, torch
def get_include():
    return str(pathlib.Path(torch.__file__).parent / "include")
END
    fi
    export MIXBITS_CUDA=1 MIXBITS_CPU=${MIXBITS_CPU:-0} MIXBITS_CUDA_ARCH=$arch
    (cd "$work" && PYTHONPATH=$work/headers${PYTHONPATH:+:$PYTHONPATH} \
        "$python" "$root/setup.py" -q build_ext --build-lib lib --build-temp temp) || return
    cp "$work"/lib/mixbits/*.so mixbits/ || return
    "$python" -c "import mixbits.kernels" 2>/dev/null || ln -sfn ../kernels/triton mixbits/kernels
    "$python" -m mixbits.info
}

tests() {
    local parallel=()
    "$python" -c "import xdist" 2>/dev/null && parallel=(-n 12)
    [ -n "$gpu" ] && export MIXBITS_REQUIRE_GPU=1 # a backend that is missing fails, not skips
    "$python" -m pytest -q -p no:cacheprovider -m "not slow" "${parallel[@]}" \
        tests/backends/test_gpu.py tests/runtime/test_graphs.py tests/backends/test_triton.py tests/backends/test_cuda*.py
}

sanitize() {
    command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer" && return 1; }
    # Each allocation by itself, so that a step beyond one is seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
        --print-limit 20 "$python" -m benchmarks.kernels.gpu_smoke cuda
}
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }

measure() {
    local some=$((limit > 15 ? limit - 10 : 5)) # it ends by itself, with what it has
    "$python" -m benchmarks.kernels.gpu --csv "$csv" --seconds "$some" --sections "$@"
}
rounding() { measure rounding; }
matmul() {
    measure matmul --shapes ideal-gpu --tokens 1,16,64,128,256,2048 --png "$folder/roofline.png"
}
more_matmul() { measure matmul --shapes llama-3.1-8b,qwen3-8b,qwen3-32b; }
sensitivity() { measure sensitivity; }
generate() { measure generate; }

# Runs in a shell of its own, so that `timeout` can end a function and all that it started.
export -f build tests sanitize memcheck racecheck measure
export -f rounding matmul sensitivity generate more_matmul
declare_state() { declare -p folder csv python arch gpu limit; }

run_stage() {
    local stage=$1 start=$SECONDS code limit=${LIMIT[$1]}
    local left=$((seconds - SECONDS))
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$dry_run" = 1 ]; then
        echo "$stage (at most $limit s)"
        declare -f "$stage" | sed '1,2d;$d'
        return
    fi
    local why=""
    [ "$limit" -lt 10 ] && why="out of time"
    case $stage in # tests skip by themselves, and say so
        build) [ -z "$arch" ] && why="no GPU, and MIXBITS_CUDA_ARCH is not set" ;;
        tests) ;;
        *) [ -z "$gpu" ] && why="no GPU" ;;
    esac
    if [ -n "$why" ]; then
        echo "skipped: $stage ($why)" | tee -a "$log"
        echo "$stage,skipped,0" >>"$folder/stages.csv"
        return
    fi
    echo "== $stage" | tee -a "$log"
    timeout -s INT -k 8 "$limit" bash -uo pipefail -c "$(declare_state); $stage" >>"$log" 2>&1
    code=$?
    [ "$stage" = tests ] && [ -z "$gpu" ] && [ "$code" = 0 ] && code=skipped
    echo "$stage,$code,$((SECONDS - start))" >>"$folder/stages.csv"
    echo "   exit code $code, $((SECONDS - start)) s" | tee -a "$log"
    [ "$code" = 0 ] || [ "$code" = skipped ] || { failed=1 && tail -n 15 "$log"; }
}

failed=0 limit=0
gpu=$(architecture 2>>"$log")
arch=${MIXBITS_CUDA_ARCH:-$gpu}
[ "$dry_run" = 1 ] || echo "stage,code,seconds" >"$folder/stages.csv"
for stage in $stages; do run_stage "$stage"; done
if [ "$dry_run" = 0 ]; then
    "$python" -m benchmarks.kernels.gpu_summary "$csv" --stages "$folder/stages.csv" 2>>"$log" |
        tee "$folder/summary.txt"
fi
exit "$failed"
