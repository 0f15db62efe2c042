"""The CUDA kernels executed on the CPU: any thread order gives the same bits; no access is out of bounds, misaligned or a race.

Faults planted in the kernels show that each check detects what it is for.
"""

import mmap
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from simt import build, faults, operators
from simt.faults import Fault

pytestmark = pytest.mark.cuda_on_cpu

DRIVER = build.HERE / "driver.cpp"
SCHEDULES = ("forward", "reverse", "random:1:1", "random:2:2", "random:3:3")

# ---- cases: arguments of the driver

CASES = {
    # dtypes, class counts, alignments, every option
    "one_class": "rows=5 classes=1 labels=invalid all_outputs=yes",
    "seven": "rows=37 classes=7 student=float16 teacher=float32 labels=invalid reduction=none weights=yes",
    "odd_rows": "rows=40 classes=33 labels=valid mapping=invalid weights=yes gap=7 student_offset=4 teacher_offset=12",
    "half": "rows=25 classes=100 student=float16 teacher=float16 student_offset=10 teacher_offset=2 value=kl reduction=sum",
    "half_aligned": "rows=9 classes=1000 student=bfloat16 teacher=bfloat16 labels=valid mapping=valid temperature=4",
    "half_in_place": "rows=9 classes=1001 student=bfloat16 teacher=bfloat16 labels=valid in_place=yes gap=9 student_offset=14",
    "mixed_half": "rows=7 classes=601 student=float16 teacher=bfloat16 labels=valid value=cross_entropy temperature=1",
    "narrow_student": "rows=40 classes=264 student=float16 teacher=float32 mapping=valid student_offset=6 teacher_offset=8",
    "narrow_teacher": "rows=40 classes=264 student=float32 teacher=bfloat16 labels=valid student_offset=12 teacher_offset=10",
    "double": "rows=12 classes=333 student=float64 teacher=float64 labels=valid all_outputs=yes teacher_offset=8 in_place=yes",
    "double_student": "rows=6 classes=100 student=float64 teacher=float16 labels=invalid value=teacher_entropy",
    "double_teacher": "rows=6 classes=100 student=float32 teacher=float64 labels=valid temperature=2 in_place=yes",
    "soft_labels": "rows=40 classes=33 soft_labels=float32 mapping=invalid weights=yes gap=7 student_offset=4",
    "half_soft_labels": "rows=9 classes=1001 student=bfloat16 teacher=bfloat16 soft_labels=float16 gap=9 student_offset=14",
    "mixed_soft_labels": "rows=7 classes=601 student=float16 soft_labels=float64 value=cross_entropy label_smoothing=0.1",
    "double_soft_labels": "rows=6 classes=100 student=float64 teacher=float64 soft_labels=bfloat16 all_outputs=yes in_place=yes",
    "smoothed_labels": "rows=40 classes=264 labels=invalid label_smoothing=0.2 mapping=valid reduction=none in_place=yes",
    "masked_soft_labels": "rows=24 classes=700 content=masked soft_labels=float32 label_smoothing=0.1 all_outputs=yes",
    "parts_soft_labels": "rows=3 classes=9000 threads=64 student=bfloat16 soft_labels=bfloat16 label_smoothing=0.1",
    "separate_soft_labels": "run=separate rows=50 classes=100 soft_labels=float32 label_smoothing=0.1 value=cross_entropy",
    "sequences": "rows=22 classes=50 student=float16 teacher=float32 inner=4 gap=5 labels=valid weights=yes reduction=none",
    "teacher_entropy": "rows=33 classes=90 value=teacher_entropy mapping=valid labels=valid in_place=yes",
    "scores": "rows=300 classes=5 value=score labels=valid mapping=invalid count=40",
    "double_scores": "rows=300 classes=5 value=score score=float64 labels=valid count=70",
    "no_teacher": "rows=30 classes=40 with_teacher=no labels=valid all_outputs=yes",
    "no_rows": "rows=0 classes=40 labels=valid",
    # masked and non-finite logits, and ties
    "masks": "rows=24 classes=700 content=masked labels=valid all_outputs=yes reduction=none",
    "half_masks": "rows=24 classes=520 student=float16 teacher=bfloat16 content=masked labels=valid value=kl",
    "double_masks": "rows=24 classes=50 student=float64 teacher=float64 content=masked value=teacher_entropy",
    "ties": "rows=700 classes=6 content=equal labels=valid count=333",
    # several blocks per row
    "parts": "rows=2 classes=4097 threads=64 num_sms=3 labels=valid weights=yes",
    "half_parts": "rows=3 classes=9000 threads=64 student=bfloat16 teacher=float16 labels=valid in_place=yes student_offset=2",
    "double_parts": "rows=1 classes=4097 threads=32 student=float64 teacher=float64 content=masked",
    # selection and loss in separate launches
    "separate": "run=separate rows=50 classes=100 labels=valid mapping=invalid value=kl weights=yes",
    "separate_ties": "run=separate rows=700 classes=6 content=equal labels=valid count=333 reduction=none",
    "separate_parts": "run=separate rows=2 classes=4097 threads=64 labels=invalid all_outputs=yes reduction=sum",
    "select": "run=select rows=1001",
    "select_double": "run=select rows=1001 score=float64 count=13",
    "reduce": "run=reduce rows=9001 labels=valid weights=yes",
    "reduce_double": "run=reduce rows=5000 student=float64 reduction=none",
    # large blocks, and selection by many blocks
    "large_blocks": "rows=9001 classes=3 labels=valid mapping=valid student=float16 teacher=float16",
    "many_blocks": "rows=70001 classes=2 labels=valid content=equal threads=64",
    "select_many_blocks": "run=select rows=70001 count=30000",
    "select_many_blocks_double": "run=select rows=65537 score=float64 fraction=0.9",
}
SLOW_UNDER_ASAN = {"many_blocks"}

# At most 250 CUDA threads per launch: beyond that ThreadSanitizer may miss a race.
RACE_CASES = {
    "rows_in_a_warp": "num_sms=1 threads=64 rows=12 classes=100 labels=invalid mapping=invalid weights=yes all_outputs=yes",
    "rows_in_a_block": "num_sms=1 threads=64 rows=3 classes=1000 labels=valid value=kl reduction=none",
    "doubles": "num_sms=1 threads=64 rows=3 classes=333 student=float64 teacher=float64 labels=valid",
    "halves_in_place": "num_sms=1 threads=64 rows=3 classes=777 student=float16 teacher=bfloat16 in_place=yes teacher_offset=6",
    "small_blocks": "num_sms=2 threads=32 rows=7 classes=300 student=bfloat16 teacher=float32 labels=valid mapping=invalid",
    "tied_rows": "num_sms=1 threads=64 rows=47 classes=7 content=equal labels=valid count=19",
    "more_rows_than_threads": "num_sms=1 threads=32 rows=55 classes=7 content=equal labels=valid count=19",
    "targets_in_a_block": "num_sms=1 threads=64 rows=3 classes=1000 soft_labels=float32 label_smoothing=0.1",
    "shared_targets": "num_sms=2 threads=32 rows=2 classes=4097 soft_labels=bfloat16",
    "shared_rows": "num_sms=2 threads=32 rows=2 classes=4097 labels=valid",
    "one_shared_row": "num_sms=1 threads=64 rows=1 classes=6200 student=float16 teacher=float16 in_place=yes",
    "separate_launches": "num_sms=1 threads=64 run=separate rows=12 classes=100 labels=valid mapping=valid weights=yes",
    "select_by_blocks": "num_sms=1 threads=32 run=select rows=65537 count=30000",
    "select_by_blocks_double": "num_sms=1 threads=32 run=select rows=65537 score=float64",
    "reduce_by_blocks": "num_sms=2 threads=64 run=reduce rows=8192 labels=valid weights=yes",
    "reduce_by_blocks_double": "num_sms=2 threads=64 run=reduce rows=8192 student=float64 reduction=none",
}

# Rows at least 2^32 elements apart. Only touched pages take memory.
HUGE = "rows=5 classes=40 inner=2 gap=4294967296"
HUGE_CASES = {
    "huge_strides": f"{HUGE} labels=valid student=float16 teacher=float32",
    "huge_soft_labels": f"{HUGE} soft_labels=float32 student=float16 teacher=float32",
    "huge_strides_in_place": f"{HUGE} labels=valid student=bfloat16 teacher=float16 mapping=valid in_place=yes",
    "huge_strides_of_doubles": f"{HUGE} student=float64 teacher=float64 in_place=yes",
}
ALL_CASES = CASES | RACE_CASES | HUGE_CASES

# ---- faults

SYNCTHREADS = "if (!FAULT) __syncthreads();"
FENCE = "if (!FAULT) __threadfence();"
FAULTS = (
    # loads and stores
    Fault(
        "an unaligned vector is loaded directly",
        "cuda/vectors.cuh",
        "if (offset == 0) return load_aligned(p);",
        "if (offset == 0 || FAULT) return load_aligned(p);",
        "ubsan",
        "odd_rows",
    ),
    Fault(
        "the second of two vectors is one too far",
        "cuda/vectors.cuh",
        "load_aligned(p - offset + kVectorBytes)",
        "load_aligned(p - offset + (FAULT ? 2 : 1) * kVectorBytes)",
        "wrong",
        "odd_rows",
    ),
    Fault(
        "vectors around the first classes start before the row",
        "cuda/walk.cuh",
        "part.chunk_begin + margin : part.end",
        "part.chunk_begin + (FAULT ? 0 : margin) : part.end",
        "asan",
        "narrow_teacher",
    ),
    Fault(
        "vectors around the last classes end after the row",
        "cuda/walk.cuh",
        "(part.end - part.chunk_begin - 2 * margin)",
        "(part.end - part.chunk_begin - (FAULT ? 1 : 2) * margin)",
        "asan",
        "narrow_teacher",
    ),
    Fault(
        "the last chunks are read as if every thread had one",
        "cuda/walk.cuh",
        "if (aligned && same_type && end - first >= step) {",
        "if (aligned && same_type && (end - first >= step || FAULT)) {",
        "asan",
        "half_aligned",
    ),
    Fault(
        "chunks past the end are stored as a narrower type",
        "cuda/condensed_kd_backward.cuh",
        "if (first_class < end) store_as_16_bit",
        "if (first_class < end || FAULT) store_as_16_bit",
        "asan",
        "half_parts",
    ),
    Fault(
        "chunks past the end are stored",
        "cuda/condensed_kd_backward.cuh",
        "if (first_class < end) store_aligned",
        "if (first_class < end || FAULT) store_aligned",
        "asan",
        "mixed_half",
    ),
    Fault(
        "a row without a gradient keeps its last classes",
        "cuda/condensed_kd_backward.cuh",
        "write_bytes(last, part.end);",
        "if (!FAULT) write_bytes(last, part.end);",
        "wrong",
        "odd_rows",
    ),
    Fault(
        "a class past the end is read",
        "cuda/walk.cuh",
        "const int left = quad < before ? first - c : end - c;",
        "const int left = quad < before ? first - c : end - c + FAULT;",
        "asan",
        "one_class",
    ),
    Fault(
        "the last classes are skipped",
        "cuda/walk.cuh",
        "left < kQuad ? left : kQuad",
        "left < kQuad ? (FAULT ? 0 : left) : kQuad",
        "wrong",
        "odd_rows",
    ),
    Fault(
        "a class past the end is written",
        "cuda/vectors.cuh",
        "if (j >= n) continue;",
        "if (j >= n && !FAULT) continue;",
        "asan",
        "seven",
    ),
    Fault(
        "an offset has 32 bits",
        "kernels.h",
        "static_cast<const char*>(data) + element * size_of(type)",
        "static_cast<const char*>(data) + (FAULT ? static_cast<uint32_t>(element) : element) * size_of(type)",
        "wrong",
        "huge_strides",
    ),
    # row indices
    Fault(
        "forward: rows past the last one are read",
        "cuda/row_stats.cuh",
        "position.row >= p.rows ||",
        "(position.row >= p.rows && !FAULT) ||",
        "asan",
        "seven",
    ),
    Fault(
        "backward: rows past the last one are read",
        "cuda/condensed_kd_backward.cuh",
        "if (i < 0) return;",
        "if (i < 0 && !FAULT) return;",
        "asan",
        "seven",
    ),
    Fault(
        "selection: rows past the last one are read",
        "cuda/select_topk.cuh",
        "first + j * stride < end ? ranking.key",
        "first + j * stride < end || FAULT ? ranking.key",
        "asan",
        "select",
    ),
    Fault(
        "an ignored row is read",
        "cuda/row_stats.cuh",
        "!p.valid(position.row))",
        "(!p.valid(position.row) && !FAULT))",
        "wrong",
        "odd_rows",
    ),
    Fault(
        "forward: a label out of range is read",
        "cuda/row_stats.cuh",
        "p.labels[i] >= 0 && p.labels[i] < p.classes)",
        "(FAULT || (p.labels[i] >= 0 && p.labels[i] < p.classes)))",
        "asan",
        "one_class",
    ),
    Fault(
        "backward: a label out of range is a class without gradient",
        "cuda/condensed_kd_backward.cuh",
        "const bool exists = !is_index || (p.labels[i]",
        "const bool exists = FAULT || !is_index || (p.labels[i]",
        "wrong",
        "seven",
    ),
    Fault(
        "entries past the teacher's last row are read",
        "cuda/map_rows.cuh",
        "if (j >= n ||",
        "if ((j >= n && !FAULT) ||",
        "asan",
        "odd_rows",
    ),
    Fault(
        "a row that the student does not have is written",
        "cuda/map_rows.cuh",
        "rows[j] >= student_rows)",
        "(rows[j] >= student_rows && !FAULT))",
        "asan",
        "odd_rows",
    ),
    Fault(
        "two rows of the teacher claim a row of the student without an atomic",
        "cuda/map_rows.cuh",
        "atomicCAS(entry, none, static_cast<unsigned long long>(j))",
        "(FAULT ? (*entry == none ? (*entry = static_cast<unsigned long long>(j), none) : *entry)"
        " : atomicCAS(entry, none, static_cast<unsigned long long>(j)))",
        "tsan",
        "rows_in_a_warp",
    ),
    # targets
    Fault(
        "a target past the end of a row is read",
        "cuda/targets.cuh",
        "if (j >= n) continue;",
        "if (j >= n && !FAULT) continue;",
        "asan",
        "soft_labels",
    ),
    Fault(
        "chunks past the end have targets",
        "cuda/row_stats.cuh",
        "c < end ? kQuad : 0",
        "c < end || FAULT ? kQuad : 0",
        "asan",
        "half_soft_labels",
    ),
    Fault(
        "the targets' sum keeps the old maximum",
        "cuda/targets.cuh",
        "kcd::rebase(s.targets, shift(s.student.max, student_max))",
        "kcd::rebase(s.targets, FAULT ? Real(0) : shift(s.student.max, student_max))",
        "wrong",
        "soft_labels",
    ),
    Fault(
        "the target of a class index is not smoothed",
        "cuda/condensed_kd_backward.cuh",
        "factors.ce_label = kTargets ?",
        "factors.ce_label = kTargets && !FAULT ?",
        "wrong",
        "smoothed_labels",
    ),
    Fault(
        "targets of another row",
        "cuda/condensed_kd_backward.cuh",
        "load_targets(problem, index, c,",
        "load_targets(problem, FAULT ? problem.rows - 1 - index : index, c,",
        "wrong",
        "soft_labels",
    ),
    # the threads of a row
    Fault(
        "threads without a row exit before a barrier",
        "cuda/row_stats.cuh",
        "const bool has_row = position.row < a.problem.rows;",
        "const bool has_row = position.row < a.problem.rows; if (FAULT && !has_row) return;",
        "shim",
        "seven",
    ),
    Fault(
        "the mask has another row's lanes",
        "cuda/group.cuh",
        "return {first << (thread % kWarp / lanes * lanes)};",
        "return {first << (FAULT ? 0 : thread % kWarp / lanes * lanes)};",
        "shim",
        "seven",
    ),
    Fault(
        "half of the lanes are summed",
        "cuda/group.cuh",
        "for (int distance = lanes() / 2; distance > 0; distance /= 2) x += ",
        "for (int distance = lanes() / (FAULT ? 4 : 2); distance > 0; distance /= 2) x += ",
        "wrong",
        "seven",
    ),
    Fault(
        "the warps' sums are read before they are written",
        "cuda/row_stats.cuh",
        "if (lane == 0) warp_sums[warp] = sums;\n  __syncthreads();",
        f"if (lane == 0) warp_sums[warp] = sums;\n  {SYNCTHREADS}",
        "tsan",
        "rows_in_a_block",
    ),
    Fault(
        "every lane writes the row's results",
        "cuda/row_stats.cuh",
        "if (has_row && thread_in_row(a.row_threads) == 0) finish_row",
        "if (has_row && (thread_in_row(a.row_threads) == 0 || FAULT)) finish_row",
        "tsan",
        "rows_in_a_warp",
    ),
    # the blocks of a row
    Fault(
        "no fence between a part and its arrival",
        "cuda/row_stats.cuh",
        "__threadfence();   // the piece",
        f"{FENCE}   // the piece",
        "tsan",
        "shared_rows",
    ),
    Fault(
        "no fence between the arrivals and the parts",
        "cuda/row_stats.cuh",
        "__threadfence();   // the others'",
        f"{FENCE}   // the others'",
        "tsan",
        "shared_rows",
    ),
    Fault(
        "the second to last part counts as the last",
        "cuda/row_stats.cuh",
        "static_cast<unsigned>(a.parts) - 1;",
        "static_cast<unsigned>(a.parts) - (FAULT ? 2 : 1);",
        "wrong",
        "shared_rows",
    ),
    Fault(
        "the last-part flag is read before it is set",
        "cuda/row_stats.cuh",
        "__syncthreads();\n  if (!last[0]) return false;",
        f"{SYNCTHREADS}\n  if (!last[0]) return false;",
        "tsan",
        "one_shared_row",
    ),
    # block-wide sums, and the last block
    Fault(
        "a block sum overwrites the previous one",
        "cuda/group.cuh",
        "__syncthreads();   // an earlier sum",
        f"{SYNCTHREADS}   // an earlier sum",
        "tsan",
        "rows_in_a_warp",
    ),
    Fault(
        "a block sum is read before it is written",
        "cuda/group.cuh",
        "warp_sums[thread / kWarp] = x;\n  __syncthreads();",
        f"warp_sums[thread / kWarp] = x;\n  {SYNCTHREADS}",
        "tsan",
        "rows_in_a_warp",
    ),
    Fault(
        "a block arrives before all its threads have written",
        "cuda/group.cuh",
        "__syncthreads();   // all threads of the block",
        f"{SYNCTHREADS}   // all threads of the block",
        "tsan",
        "rows_in_a_warp",
    ),
    Fault(
        "no fence between a block's writes and its arrival",
        "cuda/group.cuh",
        "__threadfence();   // our writes",
        f"{FENCE}   // our writes",
        "tsan",
        "rows_in_a_warp",
    ),
    Fault(
        "no fence between the arrivals and the blocks' writes",
        "cuda/group.cuh",
        "__threadfence();   // the others' writes",
        f"{FENCE}   // the others' writes",
        "tsan",
        "rows_in_a_warp",
    ),
    Fault(
        "the last-block flag is read before it is set",
        "cuda/group.cuh",
        "__syncthreads();\n  return last[0];",
        f"{SYNCTHREADS}\n  return last[0];",
        "tsan",
        "rows_in_a_warp",
    ),
    Fault(
        "the second to last block counts as the last",
        "cuda/group.cuh",
        "atomicAdd(arrived, 1u) == blocks - 1;",
        "atomicAdd(arrived, 1u) == blocks - (FAULT ? 2 : 1);",
        "wrong",
        "rows_in_a_block",
    ),
    Fault(
        "every thread writes the loss",
        "cuda/reduce_rows.cuh",
        "problem.rows);\n  if (threadIdx.x == 0) write_loss",
        "problem.rows);\n  if (threadIdx.x == 0 || FAULT) write_loss",
        "tsan",
        "rows_in_a_warp",
    ),
    Fault(
        "every thread writes the block's sums",
        "cuda/reduce_rows.cuh",
        "if (threadIdx.x == 0) block_sums",
        "if (threadIdx.x == 0 || FAULT) block_sums",
        "tsan",
        "reduce_by_blocks",
    ),
    # selection
    Fault(
        "NaN ranks last",
        "math/order_key.h",
        "if (x != x) return 0xffffffffu;",
        "if (x != x) return FAULT ? 1u : 0xffffffffu;",
        "wrong",
        "select",
    ),
    Fault(
        "the histogram does not start at zero",
        "cuda/select_topk.cuh",
        "count[d] = 0;",
        "if (!FAULT) count[d] = 0;",
        "wrong",
        "select",
    ),
    Fault(
        "the histogram is written past its end",
        "cuda/select_topk.cuh",
        "for (int d = static_cast<int>(threadIdx.x); d < kBuckets;",
        "for (int d = static_cast<int>(threadIdx.x); d < kBuckets + FAULT;",
        "asan",
        "select",
    ),
    Fault(
        "counting starts before the histogram is zero",
        "cuda/select_topk.cuh",
        "__syncthreads();\n  const uint64_t prefix_mask",
        f"{SYNCTHREADS}\n  const uint64_t prefix_mask",
        "tsan",
        "rows_in_a_warp",
    ),
    Fault(
        "the histogram is read before counting ends",
        "cuda/select_topk.cuh",
        "\n  });\n  __syncthreads();",
        f"\n  }});\n  {SYNCTHREADS}",
        "tsan",
        "rows_in_a_warp",
    ),
    Fault(
        "counting without an atomic",
        "cuda/select_topk.cuh",
        "atomicAdd(&count[key >> digit_shift(digit) & (kBuckets - 1)], 1u);",
        "FAULT ? count[key >> digit_shift(digit) & (kBuckets - 1)]++"
        " : atomicAdd(&count[key >> digit_shift(digit) & (kBuckets - 1)], 1u);",
        "tsan",
        "rows_in_a_warp",
    ),
    Fault(
        "half a warp picks a digit",
        "cuda/select_topk.cuh",
        "if (lane < kWarp) {",
        "if (lane < (FAULT ? kWarp / 2 : kWarp)) {",
        "shim",
        "select",
    ),
    Fault(
        "the digit is read before it is picked",
        "cuda/select_topk.cuh",
        "__syncthreads();\n  threshold.key |=",
        f"{SYNCTHREADS}\n  threshold.key |=",
        "tsan",
        "rows_in_a_warp",
    ),
    Fault(
        "ties go to the later row",
        "cuda/select_topk.cuh",
        "for (int64_t i = first; i < last; ++i) {\n    const uint64_t key",
        "for (int64_t n = first; n < last; ++n) {\n    const int64_t i = FAULT ? first + last - 1 - n : n;\n    const uint64_t key",
        "wrong",
        "ties",
    ),
    Fault(
        "a warp's ties are read before they are counted",
        "cuda/select_topk.cuh",
        "warp_sums[warp] = before;\n  __syncthreads();",
        f"warp_sums[warp] = before;\n  {SYNCTHREADS}",
        "tsan",
        "tied_rows",
    ),
    Fault(
        "the loss is summed before the mask is complete",
        "cuda/select_topk.cuh",
        "__syncthreads();   // the mask is complete",
        f"{SYNCTHREADS}   // the mask is complete",
        "tsan",
        "more_rows_than_threads",
    ),
    Fault(
        "the number of candidates is read before it is written",
        "cuda/select_topk.cuh",
        "candidates[0] = all;\n  __syncthreads();",
        f"candidates[0] = all;\n  {SYNCTHREADS}",
        "tsan",
        "rows_in_a_warp",
    ),
    Fault(
        "the ties of earlier blocks are read before they are summed",
        "cuda/select_topk.cuh",
        "before[0] = all;\n    __syncthreads();",
        f"before[0] = all;\n    {SYNCTHREADS}",
        "tsan",
        "select_by_blocks",
    ),
    Fault(
        "blocks add their counts without an atomic",
        "cuda/select_topk.cuh",
        "atomicAdd(&state.count[digit][d], count[d]);",
        "FAULT ? state.count[digit][d] += count[d] : atomicAdd(&state.count[digit][d], count[d]);",
        "tsan",
        "select_by_blocks",
    ),
    Fault(
        "the sum of the blocks' counts is read before it is written",
        "cuda/select_topk.cuh",
        "count[d] = state.count[digit][d];\n  __syncthreads();",
        f"count[d] = state.count[digit][d];\n  {SYNCTHREADS}",
        "tsan",
        "select_by_blocks",
    ),
    Fault(
        "ties of earlier blocks are not counted",
        "cuda/select_topk.cuh",
        "threshold.remaining -= before[0];",
        "threshold.remaining -= FAULT ? 0 : before[0];",
        "wrong",
        "select_by_blocks",
    ),
    # host code
    Fault(
        "the workspace is not zeroed",
        "cuda/launch.cu",
        "if (planned.zeroed_bytes > 0)\n    check_cuda(gpu::fill(workspace",
        "if (planned.zeroed_bytes > 0 && !FAULT)\n    check_cuda(gpu::fill(workspace",
        "wrong",
        "rows_in_a_block",
    ),
    Fault(
        "the workspace lacks the sums of one block",
        "cuda/launch.cu",
        "plan.block_sums = workspace.take<LossSums>(slice_blocks(rows, context));",
        "plan.block_sums = workspace.take<LossSums>(slice_blocks(rows, context) - FAULT);",
        "asan",
        "reduce",
    ),
    Fault(
        "a row without a teacher's row is not marked",
        "cuda/launch.cu",
        "check_cuda(gpu::fill(teacher_row, 0xff,",
        "if (!FAULT) check_cuda(gpu::fill(teacher_row, 0xff,",
        "wrong",
        "teacher_entropy",
    ),
)

# ---- programs


def build_driver(kernels):
    """Build the driver of every kind, in parallel. Return by kind the program, or the reason why it cannot be built."""

    def make(kind):
        available = build.available(kind)
        return (
            build.compile(kind, [DRIVER, kernels / "cuda" / "launch.cu"], [kernels]) if available else available.reason
        )

    with ThreadPoolExecutor() as pool:
        return dict(zip(build.KINDS, pool.map(make, build.KINDS), strict=True))


def run_driver(program, cases, schedules, fault=0):
    """Run the driver and return the finished process."""
    if isinstance(program, str):
        pytest.skip(program)
    environment = build.environment() | {faults.VARIABLE: str(fault)}
    environment["TSAN_OPTIONS"] += " halt_on_error=1"
    command = [program, " ".join(schedules), *cases]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def execute():
    """A function that runs the kernels: (kind, cases, schedules) -> the finished process."""
    programs = build_driver(operators.SOURCES)
    return lambda kind, cases, schedules: run_driver(programs[kind], cases, schedules)


@pytest.fixture(scope="session")
def execute_faulty():
    """A function that runs the kernels with a fault (0: none): (kind, cases, schedules, fault) -> the finished process."""
    programs = build_driver(faults.plant(operators.SOURCES, FAULTS))
    return lambda kind, cases, schedules, fault: run_driver(programs[kind], cases, schedules, fault)


def digests(done):
    """Return the digests by (case index, array) and schedule. Fail if the run reported an error."""
    assert done.returncode == 0 and done.stderr == "", done.stderr
    result = defaultdict(dict)
    for line in done.stdout.splitlines():
        case, schedule, name, digest = line.split()
        result[int(case), name][schedule] = digest
    assert result
    return result


# ---- checks


@pytest.mark.parametrize("case", CASES)
def test_every_schedule_gives_the_same_bits(execute, case):
    written = digests(execute("plain", [CASES[case]], SCHEDULES))
    for (_, name), by_schedule in written.items():
        assert set(by_schedule) == set(SCHEDULES) and len(set(by_schedule.values())) == 1, name


def test_separate_selection_gives_the_same_bits(execute):
    cases = [case.removeprefix("run=separate ") for case in CASES.values() if case.startswith("run=separate ")]
    fused = digests(execute("plain", cases, ["forward"]))
    separate = digests(execute("plain", [f"run=separate {case}" for case in cases], ["forward"]))
    assert len(cases) > 1
    for key in ((index, name) for index in range(len(cases)) for name in ("stats", "ranked", "selected", "counts")):
        assert fused[key] == separate[key], key


def test_in_place_gradient_has_the_same_bits(execute):
    in_place = [case for case in CASES.values() if "in_place=yes" in case]
    out_of_place = [case.replace("in_place=yes", "in_place=no") for case in in_place]
    assert digests(execute("plain", in_place, ["forward"])) == digests(execute("plain", out_of_place, ["forward"]))


@pytest.mark.parametrize("case", [case for case in CASES if case not in SLOW_UNDER_ASAN])
def test_no_access_is_out_of_bounds_or_misaligned(execute, case):
    digests(execute("asan", [CASES[case]], ["forward", "random:4:2"]))


@pytest.mark.parametrize("case", RACE_CASES)
def test_no_access_is_a_race(execute, case):
    digests(execute("tsan", [RACE_CASES[case]], SCHEDULES))


@pytest.mark.parametrize("case", HUGE_CASES)
def test_offsets_beyond_32_bits_are_correct(execute, case):
    strided, dense = HUGE_CASES[case], HUGE_CASES[case].replace("gap=4294967296", "gap=0")
    assert strided != dense
    assert digests(execute("plain", [strided], ["forward"])) == digests(execute("plain", [dense], ["forward"]))


@pytest.fixture
def simt_operators():
    """The CUDA operators executed on the CPU."""
    plain = build.available("plain")
    if not plain:
        pytest.skip(plain.reason)
    with operators.in_place():
        yield torch.ops.kcd_ext_simt


def test_operators_support_huge_strides(simt_operators):
    """Call the operators, in place, on sequences of tokens whose rows are more than 2^32 elements apart."""
    shape = (2, 3, 40)
    options = (
        2.0,
        0.5,
        0.25,
        0.1,
        -100,
        0,
        1.0,
    )  # temperature, kd_weight, ce_weight, label_smoothing, ignore_index, mean, ranks
    generator = torch.Generator().manual_seed(1)
    labels, absent = torch.randint(40, (2, 3), generator=generator), torch.empty(0, dtype=torch.bool)

    def run(student, teacher):
        inputs = student, teacher, labels, absent, absent, absent
        loss, state, _ = simt_operators.condensed_kd(*inputs, 0.5, 0, 0, *options, False)
        saved = student, teacher, labels, absent, absent, state
        simt_operators.condensed_kd_backward_(torch.tensor(1.5), *saved, *options)
        return loss, state, student

    def spread(logits):
        stride = (5 << 32, (1 << 32) + 8, 1)  # the same alignment as in a dense tensor
        elements = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = mmap.mmap(-1, elements * logits.element_size(), flags=flags)
        return torch.frombuffer(memory, dtype=logits.dtype).as_strided(shape, stride).copy_(logits)

    for dtype, teacher_dtype in ((torch.float16, torch.float32), (torch.float32, torch.bfloat16)):
        student = torch.randn(shape, generator=generator).to(dtype)
        teacher = torch.randn(shape, generator=generator).to(teacher_dtype)
        strided = run(spread(student), spread(teacher))
        for got, expected in zip(strided, run(student, teacher), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_select_topk_of_a_million_rows_matches_sorting(simt_operators, dtype):
    """NaN ranks first, then the largest values; ties go to the first row."""
    n = 1_000_003
    generator = np.random.default_rng(2)
    levels = generator.integers(-30, 30, n) * 0.7
    for special in (np.nan, np.inf, -np.inf, -0.0):
        levels[generator.random(n) < 0.01] = special
    digits = np.ldexp(generator.integers(1 << 22, 1 << 23, n), -20)
    digits += generator.integers(0, 8, n) * np.finfo(np.float64).eps  # digits that float32 lacks
    candidate = generator.random(n) < 0.95
    for numbers in (levels, digits):
        value = torch.from_numpy(numbers).to(dtype)
        keys = value.numpy()
        order = np.lexsort((np.arange(n), -keys, ~np.isnan(keys)))
        order = order[candidate[order]]
        for fraction, count in ((0.3, 0), (1.0, 1), (1.0, len(order) - 1), (1.0, n)):
            expected = np.zeros(n, dtype=bool)
            expected[order[: count or int(fraction * len(order))]] = True
            got = simt_operators.select_topk(value, torch.from_numpy(candidate), fraction, count)
            assert np.array_equal(got.numpy(), expected), (fraction, count)


# ---- tests of the checks

# How a fault is detected: the kind of build and the text on stderr. None: no text, but different digests.
FOUND_BY = {
    "wrong": ("plain", None),
    "shim": ("plain", "kcd_ext: CUDA kernel"),
    "asan": ("asan", "ERROR: AddressSanitizer"),
    "ubsan": ("asan", "runtime error: "),
    "tsan": ("tsan", "WARNING: ThreadSanitizer: data race"),
}


@pytest.mark.parametrize("number", range(1, len(FAULTS) + 1), ids=[fault.name for fault in FAULTS])
def test_planted_fault_is_detected(execute, execute_faulty, number):
    fault = FAULTS[number - 1]
    kind, message = FOUND_BY[fault.found_by]
    done = execute_faulty(kind, [ALL_CASES[fault.case]], SCHEDULES, number)
    if message:
        assert done.returncode != 0 and message in done.stderr, done.stderr
    else:
        assert digests(done) != digests(execute(kind, [ALL_CASES[fault.case]], SCHEDULES))


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in FOUND_BY.values()}))
def test_kernels_without_a_fault_pass(execute, execute_faulty, kind):
    cases = sorted({ALL_CASES[fault.case] for fault in FAULTS if FOUND_BY[fault.found_by][0] == kind})
    assert digests(execute_faulty(kind, cases, SCHEDULES[:3], 0)) == digests(execute(kind, cases, SCHEDULES[:3]))


def test_fault_whose_source_text_is_missing_is_rejected():
    with pytest.raises(faults.KernelChangedError, match="rows beyond"):
        faults.plant(operators.SOURCES, [Fault("rows beyond", "cuda/map_rows.cuh", "j > n", "FAULT", "asan", "seven")])
