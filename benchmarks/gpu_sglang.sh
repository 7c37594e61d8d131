#!/usr/bin/env bash
# All GPU checks of the SGLang engine from a folder of wheels (SGLang and what it needs, and mezo), without a network:
#     benchmarks/gpu_sglang.sh WHEELS OUT [COMMIT]
# Prints the checks and short tables, writes OUT/gpu_sglang_check.csv, gpu_kv_reuse_check_sglang.csv, gpu_sglang.csv and
# gpu_kv_reuse_sglang.csv, in about eight minutes. Needs nvcc and ninja on PATH.
set -euo pipefail
wheels=$1 out=$2
export COMMIT=${3:-}
cd "$(dirname "$0")/.."
site=$(mktemp -d)
python3 -m pip install --quiet --no-index --no-deps --target "$site" "$wheels"/*.whl
export PYTHONPATH=$site SGLANG_IS_FLASHINFER_AVAILABLE=false TVM_FFI_CACHE_DIR=$site/tvm HF_HUB_OFFLINE=1
export PYTHONWARNINGS=ignore TQDM_DISABLE=1
failed=0
python3 benchmarks/gpu_sglang_check.py --output "$out/gpu_sglang_check.csv" || failed=1
python3 benchmarks/gpu_sglang_check.py --client in_process --output "$out/gpu_sglang_check.csv" || failed=1
if [ "$(nvidia-smi -L | wc -l)" -gt 1 ]; then
    python3 benchmarks/gpu_sglang_check.py --tp 2 --output "$out/gpu_sglang_check.csv" || failed=1
fi
python3 benchmarks/gpu_kv_reuse_check.py sglang --output "$out/gpu_kv_reuse_check_sglang.csv" || failed=1
python3 benchmarks/gpu_sglang.py --output "$out/gpu_sglang.csv" || failed=1
python3 benchmarks/gpu_kv_reuse.py sglang --output "$out/gpu_kv_reuse_sglang.csv" || failed=1
exit $failed
