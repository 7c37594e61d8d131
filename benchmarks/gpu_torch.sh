#!/usr/bin/env bash
# All GPU checks and measurements of the torch engine, without a network, within ten minutes:
#     benchmarks/gpu_torch.sh OUT [COMMIT]
# Prints PASS or FAIL of each check and a line for each measurement; writes OUT/gpu_check.csv, gpu_bandwidth.csv,
# gpu_memory.csv, gpu_step.csv, gpu_queries.csv, gpu_profile.csv and gpu_kv_reuse_torch.csv. What is timed has the GPU to
# itself; a time limit on the steps leaves the rows that were measured.
# Trajectories with reuse on and off take four minutes more: benchmarks/gpu_kv_reuse_check.py torch.
set -uo pipefail
out=$1
export COMMIT=${2:-} HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
cd "$(dirname "$0")/.."
failed=0
python3 benchmarks/gpu_check.py --parts checks --output "$out/gpu_check.csv" &
checks=$!
python3 benchmarks/gpu_memory.py --output "$out/gpu_memory.csv" || failed=1
wait $checks || failed=1
python3 benchmarks/gpu_check.py --parts bandwidth --output "$out/gpu_bandwidth.csv" || failed=1
python3 benchmarks/gpu_kv_reuse.py torch --output "$out/gpu_kv_reuse_torch.csv" || failed=1
timeout 90 python3 benchmarks/gpu_profile.py --methods "low rank" LoRA dense --output "$out/gpu_profile.csv" || failed=1
timeout 400 python3 benchmarks/gpu_step.py --repeats 5 --output "$out/gpu_step.csv" || failed=1
timeout 60 python3 benchmarks/gpu_step.py --repeats 5 --shapes opt-1.3b --sizes 16x128 --output "$out/gpu_queries.csv" \
    --methods "low rank, 2 queries" "low rank, 4 queries" "low rank, 8 queries" \
    "LoRA, 2 queries" "LoRA, 4 queries" "LoRA, 8 queries" "dense, 4 queries" || failed=1
exit $failed
