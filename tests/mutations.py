"""Breaks the kernels on purpose, one place at a time, and demands that a test notices.

    python tests/mutations.py               all of them; exit code 1 if one survives
    python tests/mutations.py --only NAME   these alone; may be repeated
    python tests/mutations.py --jobs 2      so many at once; all cores otherwise
    python tests/mutations.py --list        their names; fails where a kernel has changed

Works in copies of the sources, in a temporary folder, with the host model: needs what `make build`
installs, no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
COPIED = ["csrc", "cogview_kernels", "tests", "setup.py", "build_backend.py", "pyproject.toml"]
COPIED += ["README.md", "LICENSE", "docs"]

# Which tests a mutation is shown to: a pytest -k expression.
VALUES = "many_tiles"
DEFINITION = "equals_the_definition"
GROUPS = "covers_everything"  # several kv heads with several heads each
DEGENERATE = "degenerate"
WILD = "any_values_in_the_layout or pivots_in_any_order"
PACKED = "any_packed_layout"
LEAKS = "leak or later_tokens"
EDGES = "edges_of_windows"
SPLITS = "share_the_queries"
SIGN = "any_scale_and_sign"
LOSS_SCALE = "any_loss_scale"
LARGE = "beyond_float32"
NORMS = "norm_equals or sandwich_equals"  # from here on: of LayerNorm
SANDWICH = "sandwich_equals"
KINDS = "each_kind_of_row"
PLACES = "places_do_not_matter"
ROUNDS = "many_rounds"
RERUNS = "reruns_and_multiprocessors"
DROPPED = "what_is_dropped"
OFFSET = "large_offset"
OVERFLOW = "nothing_overflows"
RESERVE = "memory_is_left"


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str  # under csrc
    old: str  # occurs once
    new: str
    tests: str


def mutations(file: str, *rows: tuple[str, str, str, str]) -> list[Mutation]:
    return [Mutation(name, file, old, new, tests) for name, tests, old, new in rows]


# Left out, since nothing that a test can see changes:
# - the forward's weights of a row that has seen no key yet (-inf - -inf): the row ends with a NaN
#   and is computed again;
# - zeros for rows that a copy leaves out: their weight is zero, and what 0 * NaN makes of it is
#   computed again;
# - the clamps of the packing kernel's text length, which its readers repeat;
# - the view of a warp without queries, whose results go nowhere;
# - exponents of ds that are too large (of another head, of bounds too small): what overflows is
#   computed again;
# - the warp's barrier before rows are computed again: the model sees races in shared memory alone;
# - dkdv's barrier before a warp's first lane finds the next head: the host's compiler lets that
#   lane alone read what it overwrites.
MUTATIONS = [
    *mutations(
        "three_region_attention/far_keys.cu",
        ("padding-counts-as-pivot", VALUES, "pivot < params.k_len;", "pivot <= params.k_len;"),
        ("text-counts-as-pivot", DEFINITION, "pivot >= text_len &&", "pivot >= 0 &&"),
        ("repeated-pivot-counts", WILD, "pivot > largest_before;", "pivot >= largest_before;"),
        (
            "unsorted-pivot-of-a-later-chunk-counts",
            WILD,
            "largest = shfl_idx(largest_here, kWarpSize - 1);",
            "",
        ),
        ("pivots-of-first-chunks-lost", VALUES, "num_pivots += popc(", "num_pivots = popc("),
        ("padding-not-written", VALUES, "far_keys[2 + index] = params.k_len;", ""),
    ),
    *mutations(
        "three_region_attention/key_list.cuh",
        (
            "window-begins-a-block-early",
            VALUES,
            "- problem.num_windows + 1)",
            "- problem.num_windows)",
        ),
        (
            "far-queries-begin-a-block-early",
            VALUES,
            "+ problem.num_windows) *",
            "+ problem.num_windows - 1) *",
        ),
        (
            "pivot-at-window-start-counts-twice",
            EDGES,
            "ends[i]) - 1] < bounds[i];",
            "ends[i]) - 1] <= bounds[i];",
        ),
        (
            "row-pivot-at-window-start-counts-twice",
            VALUES,
            "sorted[middle] < bound",
            "sorted[middle] <= bound",
        ),
        (
            "pivot-outside-the-keys",
            PACKED,
            "return min(max(key, 0), k_len - 1);",
            "return key;",
        ),
        (
            "first-pivot-takes-text-bias",
            VALUES,
            "entry < num_text ? text",
            "entry <= num_text ? text",
        ),
        (
            "mixed-biases-taken-for-one",
            VALUES,
            "return !(inside(pivot_edge) | inside(window_edge));",
            "return true;",
        ),
        (
            "equal-biases-cover-the-window",
            DEFINITION,
            "view.text_bias != 0.f || view.pivot_bias != 0.f;",
            "view.text_bias != view.pivot_bias;",
        ),
        (
            "pivots-of-some-taken-for-all",
            VALUES,
            "view.far_all = shfl_idx(far_end, 0);",
            "",
        ),
        ("no-diagonal-mask", VALUES, "list.entry_of(first + 1);", "list.entry_of(last + 1);"),
        (
            "window-start-skipped",
            VALUES,
            "window_some_begin = list.entry_of(first_start)",
            "window_some_begin = list.entry_of(last_start)",
        ),
        ("windows-skipped", VALUES, "min(end, window_some_end));", "begin);"),
    ),
    *mutations(
        "three_region_attention/sm80/query_tile.cuh",
        (
            "query-behind-the-last",
            VALUES,
            "position >= begin && position < end",
            "position >= begin",
        ),
        (
            "wrong-kv-head",
            GROUPS,
            "divide(head, problem.group_divisor)",
            "head % problem.num_kv_heads",
        ),
        (
            "key-list-without-warp-barrier",
            VALUES,
            "context = {list, view};\n  bar_warp_sync();",
            "context = {list, view};",
        ),
        ("keys-copied-without-barrier", VALUES, "(0);\n      bar_sync();", "(0);"),
        ("keys-not-stored", VALUES, "if (entry > 0) store_key(stage);", ""),
        ("first-tile-a-key-early", VALUES, "end - kBlockN + row;", "end - kBlockN + row - 1;"),
        ("diagonal-hidden", VALUES, "entry_of(position + row + 1);", "entry_of(position + row);"),
        (
            "entries-before-the-list",
            VALUES,
            "(from(0, word) & ~from(far_end, word))",
            "~from(far_end, word)",
        ),
        ("far-keys-of-the-list-seen-by-all", VALUES, "seen(view.far_all,", "seen(list.num_far,"),
        (
            "rows-window-begins-a-key-late",
            VALUES,
            "list.entry_of(start));",
            "list.entry_of(start + 1));",
        ),
        (
            "far-end-of-another-row",
            DEFINITION,
            "shfl_idx(far_end, row + lane / 4)",
            "shfl_idx(far_end, row)",
        ),
        ("stage-not-waited-for", VALUES, "cp_async_wait_group<0>();", ""),
        (
            "stage-without-barrier",
            VALUES,
            "cp_async_wait_group<0>();\n    bar_sync();",
            "cp_async_wait_group<0>();",
        ),
        ("stale-stage", VALUES, "if (entry > 0) {", "if (entry > kBlockN) {"),
        ("stale-keys", VALUES, "entry - 2 * kBlockN", "entry - kBlockN"),
    ),
    *mutations(
        "three_region_attention/sm80/tile.cuh",
        (
            "swizzle-mismatch",
            VALUES,
            "tile_offset<kHeadDim>(row + n, 2 * k + lane / 8 % 2)",
            "(row + n) * kHeadDim * 2 + (2 * k + lane / 8 % 2) * 16",
        ),
        (
            "lane-row-without-swizzle",
            VALUES,
            "tile_offset<kHeadDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2)",
            "(lane % 8 + lane / 16 * 8) * kHeadDim * 2 + lane / 8 % 2 * 16",
        ),
        ("row-behind-the-last-stored", VALUES, "if (to >= 0)", ""),
        (
            "tile-reused-without-warp-barrier",
            VALUES,
            "t = lane % 4;\n  bar_warp_sync();",
            "t = lane % 4;",
        ),
        (
            "tile-stored-without-warp-barrier",
            VALUES,
            "}\n  bar_warp_sync();\n  using Items",
            "}\n  using Items",
        ),
    ),
    *mutations(
        "three_region_attention/sm80/exact.cuh",
        (
            "infinite-logit",
            LARGE,
            "return logit != logit ? bias : fminf(fmaxf(logit, -kLargestFloat), kLargestFloat);",
            "return logit;",
        ),
        ("exact-row-without-bias", LEAKS, "if (entry >= list.num_far) return 0.f;", "return 0.f;"),
    ),
    *mutations(
        "three_region_attention/sm80/forward.cu",
        ("forward-nothing-masked", VALUES, "if (!sees) s[rt][n][c] = -INFINITY;", ""),
        ("forward-first-entries-lost", VALUES, "entry > -kBlockN;", "entry > 0;"),
        (
            "forward-no-log2e",
            VALUES,
            "fabsf(problem.softmax_scale) * kLog2e",
            "fabsf(problem.softmax_scale)",
        ),
        ("forward-sign-of-half-of-q", SIGN, "^= 0x80008000u", "^= 0x8000u"),
        (
            "forward-sign-without-barrier",
            SIGN,
            "cp_async_wait_group<0>();\n    bar_sync();",
            "cp_async_wait_group<0>();",
        ),
        ("forward-l-not-rescaled", VALUES, "l[rt][half] * keep + sum", "l[rt][half] + sum"),
        ("forward-o-not-rescaled", VALUES, "o[rt][n][2 * half] *= keep;", ""),
        (
            "forward-sum-of-one-lane",
            VALUES,
            "quad_sum(state.l[i / 2][i % 2])",
            "state.l[i / 2][i % 2]",
        ),
        ("forward-factor-of-another-row", VALUES, "lane / 4 * 4 + 2 * rt + half", "lane / 4 * 4"),
        ("forward-nan-rows-kept", LEAKS, ">= 0 && zero != 0.f", "< 0"),
        ("forward-exact-o-not-rescaled", LEAKS, "o[d] * (keep / l)", "o[d]"),
    ),
    *mutations(
        "three_region_attention/sm80/backward.cuh",
        ("ds-exponent-ignores-v", LOSS_SCALE, "bounds[2 * row] * v +", "bounds[2 * row] +"),
        (
            "ds-not-scaled",
            LOSS_SCALE,
            "return min(max(14 - ilogbf(bound), -100), 100);",
            "return 0;",
        ),
        ("p-not-scaled", f"{LOSS_SCALE} or {VALUES}", "kIsFloat16<T> ? 15 : 0", "0"),
    ),
    *mutations(
        "three_region_attention/sm80/backward.cu",
        ("dlse-missing", VALUES, "product -= backward.dlse[at];", ";"),
        ("delta-of-half-a-row", VALUES, "mask = 1; mask < kLanes;", "mask = 2; mask < kLanes;"),
        ("row-read-beyond-its-end", VALUES, "chunk < kChunks<kHeadDim>;", "chunk < kLanes;"),
        ("last-split-lost", VALUES, "split < params.num_splits;", "split < params.num_splits - 1;"),
        ("rows-behind-the-far-keys-summed", SPLITS, "if (row >= list.size) return;", ""),
    ),
    *mutations(
        "three_region_attention/sm80/backward_dq.cu",
        ("dq-no-softmax-scale", VALUES, "problem.softmax_scale * exp2f(", "exp2f("),
        ("dq-exponent-not-undone", VALUES, "exp2f(float(-exponent))", "1.f"),
        ("dq-no-delta", VALUES, "ds_scale, minus_delta[rt][half]);", "ds_scale, 0.f);"),
        ("dq-nothing-masked", VALUES, "if (!sees) ds[rt][n][c] = 0.f;", ""),
        ("dq-nan-rows-kept", LEAKS, "&& sum != 0.f", "&& false"),
        ("dq-exact-no-delta", LEAKS, "p * (dp - params.delta[at])", "p * dp"),
    ),
    *mutations(
        "three_region_attention/sm80/backward_dkdv.cu",
        ("dkdv-diagonal-hidden", VALUES, "max(own.key - first, 0)", "max(own.key + 1 - first, 0)"),
        (
            "dkdv-query-behind-the-window",
            VALUES,
            "max(own.end - first, 0)",
            "max(own.end + 1 - first, 0)",
        ),
        (
            "dkdv-first-far-query-without-bias",
            VALUES,
            "first + column >= own.far",
            "first + column > own.far",
        ),
        ("dkdv-mixed-biases-taken-for-one", VALUES, "query + kStep <= keys.some_far;", "true;"),
        (
            "dkdv-text-and-pivots-of-one-bias",
            VALUES,
            "one_bias ? int(high[2]) : INT_MAX;",
            "int(high[2]);",
        ),
        ("dkdv-no-diagonal-mask", VALUES, "query >= keys.all_begin &&", "true &&"),
        ("dkdv-no-end-mask", VALUES, "query + kStep <= keys.all_end;", "true;"),
        (
            "dkdv-last-query-skipped",
            VALUES,
            "query + kStep > keys.some_begin[rt]",
            "query + kStep > keys.some_begin[rt] + 1",
        ),
        (
            "dkdv-second-row-tile-skipped",
            VALUES,
            "if (sees(kRowTiles - 1)) {",
            "if (kRowTiles == 1 && sees(0)) {",
        ),
        ("dkdv-no-softmax-scale", VALUES, "problem.softmax_scale * exp2f(", "exp2f("),
        ("dkdv-shift-not-undone", VALUES, "exp2f(float(-kBackwardShift<T>))", "1.f"),
        ("dkdv-ds-shifted-twice", VALUES, "exponent - kBackwardShift<T>", "exponent"),
        (
            "dkdv-last-head-of-group-dropped",
            VALUES,
            "last_tile = group * num_tiles;",
            "last_tile = max(group - 1, 1) * num_tiles;",
        ),
        (
            "dkdv-wrong-head-of-group",
            DEFINITION,
            "first_head = work.kv_head * group;",
            "first_head = work.kv_head;",
        ),
        (
            "dkdv-last-tiles-of-splits-lost",
            SPLITS,
            "int(int64_t(last_tile) * (work.split + 1) / work.num_splits)",
            "last_tile / work.num_splits * (work.split + 1)",
        ),
        ("dkdv-splits-overwrite-each-other", SPLITS, "2 * work.split * num_heads", "2 * num_heads"),
        ("dkdv-pivots-written-twice", EDGES, "keys.rows[pivot - first].key = -1;", ";"),
        (
            "dkdv-packed-text-written-twice",
            DEFINITION,
            "key < list.num_text || key >= problem.k_len",
            "key >= problem.k_len",
        ),
        (
            "dkdv-text-ends-late",
            VALUES,
            "is_text = key < far.text_len;",
            "is_text = key <= far.text_len;",
        ),
        (
            "dkdv-text-of-a-window-tile-cut",
            SPLITS,
            "if (begin >= list.far.text_len) end =",
            "end =",
        ),
        ("dkdv-keys-without-barrier", VALUES, "? -1 : key;\n    bar_warp_sync();", "? -1 : key;"),
        (
            "dkdv-pivots-without-barrier",
            EDGES,
            "}\n    bar_warp_sync();\n    key = keys.rows",
            "}\n    key = keys.rows",
        ),
        (
            "dkdv-queries-without-barrier",
            VALUES,
            "+ of_group);\n      bar_warp_sync();",
            "+ of_group);",
        ),
        (
            "dkdv-next-head-without-barrier",
            GROUPS,
            "find_head(params, next);\n          bar_warp_sync();",
            "find_head(params, next);",
        ),
        (
            "dkdv-stage-not-waited-for",
            VALUES,
            "--left) {\n      cp_async_wait_group<0>();",
            "--left) {",
        ),
        (
            "dkdv-stage-without-barrier",
            VALUES,
            "cp_async_wait_group<0>();\n      bar_sync();",
            "cp_async_wait_group<0>();",
        ),
        (
            "dkdv-fragments-not-waited-for",
            VALUES,
            "if constexpr (Shape::kKeepsKeys) {\n    cp_async_wait_group<0>();",
            "if constexpr (Shape::kKeepsKeys) {",
        ),
        (
            "dkdv-keys-not-waited-for",
            DEGENERATE,
            "cp_async_wait_group<0>();\n  bar_warp_sync();\n  epilogue",
            "bar_warp_sync();\n  epilogue",
        ),
        ("dkdv-nan-keys-kept", LEAKS, "lane / 4].key >= 0 && sum != 0.f", "lane / 4].key < 0"),
        ("dkdv-exact-without-bias", LEAKS, "i >= own.far ? own.bias : 0.f", "0.f"),
        (
            "dkdv-exact-beyond-the-end",
            LEAKS,
            "min(from + Shape::kBlockM, own.end)",
            "from + Shape::kBlockM",
        ),
    ),
    *mutations(
        "pb_relax_layer_norm/vector.cuh",
        (
            "narrow-row-read-beyond-its-end",
            NORMS,
            "if (column + j < hidden) elements[j] =",
            "if (column + j <= hidden) elements[j] =",
        ),
        (
            "row-written-beyond-its-end",
            NORMS,
            "if (column + j < hidden) row[",
            "if (column + j <= hidden) row[",
        ),
        (
            "dropped-wrong-half",
            DROPPED,
            "j % 2 == 0 ? mask | 0xffff0000u",
            "j % 2 == 1 ? mask | 0xffff0000u",
        ),
        ("one-column-too-many-kept", KINDS, "(1u << count) - 1u", "(2u << count) - 1u"),
    ),
    *mutations(
        "pb_relax_layer_norm/dropout.cuh",
        ("philox-of-nine-rounds", DROPPED, "round < 10;", "round < 9;"),
        ("dropout-halves-swapped", DROPPED, "16 * (j % 2)", "16 * (1 - j % 2)"),
        (
            "dropout-one-step-late",
            SANDWICH,
            "bits >= dropout.threshold",
            "bits > dropout.threshold",
        ),
        (
            "dropout-of-two-rows-alike",
            DROPPED,
            "uint32_t(vector_idx), uint32_t(row),",
            "uint32_t(vector_idx), uint32_t(row / 2),",
        ),
    ),
    *mutations(
        "pb_relax_layer_norm/row_pipeline.cuh",
        (
            "parameters-share-slots",
            RERUNS,
            "kSlots = kCount * kVectors * kPieces<float>",
            "kSlots = kCount * kPieces<float>",
        ),
        ("row-copied-beyond-its-end", NORMS, "&& column < hidden);", "&& column <= hidden);"),
        (
            "odd-row-copied-beyond-its-end",
            NORMS,
            "is_row && column + j < hidden ?",
            "is_row && column + j <= hidden ?",
        ),
        ("rows-behind-the-last-copied", NORMS, "is_row && column < hidden);", "column < hidden);"),
        ("row-stride-ignored", PLACES, "+ row * rows.row_stride;", "+ row * hidden;"),
        (
            "parameter-taken-for-aligned",
            PLACES,
            "&& reinterpret_cast<uintptr_t>(parameter) % kPieceBytes == 0",
            "",
        ),
        ("stages-not-swapped", ROUNDS, "now = next;", ""),
        ("rows-not-waited-for", ROUNDS, "cp_async_wait_group<1>();", ""),
        (
            "single-rows-not-waited-for",
            NORMS,
            "} else {\n      cp_async_wait_group<0>();",
            "} else {",
        ),
        (
            "next-row-not-copied",
            ROUNDS,
            "if (plan.stages == 2) {\n      copy(row + step, row + step < rows, next);",
            "if (plan.stages == 2) {\n      copy(row, row < rows, next);",
        ),
        ("absent-parameter-is-zero", KINDS, "out[j] = absent;", "out[j] = 0.f;"),
        (
            "parameter-of-another-dtype",
            NORMS,
            "} else if (dtype == DType::kFloat32) {",
            "} else if (false) {",
        ),
    ),
    *mutations(
        "pb_relax_layer_norm/statistics.cuh",
        (
            "row-reduction-without-barrier",
            ROUNDS,
            "bar_sync();\n#pragma unroll\n  for (int n = 0;",
            "#pragma unroll\n  for (int n = 0;",
        ),
        (
            "row-of-all-warps-but-one",
            ROUNDS,
            "int warp = 1; warp < num_warps;",
            "int warp = 2; warp < num_warps;",
        ),
        (
            "sums-of-another-row",
            ROUNDS,
            "scratch + me.row_in_block * num_warps * kCount;",
            "scratch;",
        ),
        ("maximum-summed", KINDS, "n == 0 ? fmaxf(a, b) : a + b", "a + b"),
        ("peak-not-an-eighth", KINDS, "peak * scale * 0.125f", "peak * scale"),
        ("eps-not-relaxed", KINDS, "eps.relaxed) * c * c;", "eps.relaxed);"),
        (
            "plain-norm-relaxed",
            KINDS,
            "plain = relax == Relax::kNone || peak == 0.f;",
            "plain = peak == 0.f;",
        ),
        (
            "zeros-without-constant",
            KINDS,
            "plain = relax == Relax::kNone || peak == 0.f;",
            "plain = relax == Relax::kNone;",
        ),
        (
            "dropped-zeros-in-other-units",
            KINDS,
            "plain ? eps.plain : eps.relaxed",
            "relax == Relax::kNone ? eps.plain : eps.relaxed",
        ),
        ("eps-out-of-range", KINDS, "exponent = max(exponent, -60);", ""),
        ("sum-out-of-range", OVERFLOW, "kOneSum ? 1.f : 0x1p-16f", "kOneSum ? 1.f : 1.f"),
        ("sum-of-denormals-lost", KINDS, "if (number[0] < kTiny)", "if (false)"),
        ("shift-not-in-variance", OFFSET, "- shift * shift, 0.f)", ", 0.f)"),
        ("forward-no-shift", OFFSET, "(d[j] * row.rstd - offset)", "(d[j] * row.rstd)"),
        ("padding-in-moments", KINDS, "if (j < count) add(x[j]);", "add(x[j]);"),
        (
            "peak-of-the-row-alone",
            KINDS,
            "peak = relax == Relax::kTensor ? tensor_peak :",
            "peak = false ? tensor_peak :",
        ),
        (
            "row-scratch-shared",
            ROUNDS,
            "scratch + 3 * kMaxWarps, me, Add());",
            "scratch, me, Add());",
        ),
        ("statistics-swapped", OFFSET, "return {rough_mean, shift,", "return {shift, rough_mean,"),
        ("bias-weighted", KINDS, "* weight[j] + bias[j];", "* (weight[j] + bias[j]);"),
    ),
    *mutations(
        "pb_relax_layer_norm/plan.h",
        (
            "plan-without-statistics",
            RERUNS,
            "vectors * needs.stage_pieces + needs.thread_pieces",
            "vectors * needs.stage_pieces",
        ),
        ("parameters-in-the-last-stage", ROUNDS, "return stage(stages);", "return stage(1);"),
        ("no-memory-for-the-system", RESERVE, "- kRowArrayBytes - kReservedSharedBytes", ""),
        ("blocks-without-rows-left-out", NORMS, "if (!needs.every_block) {", "if (true) {"),
        (
            "row-stride-taken-for-aligned",
            PLACES,
            "rows.row_stride % (kColumns / pieces_of(dtype)) == 0",
            "true",
        ),
        (
            "row-address-taken-for-aligned",
            PLACES,
            "reinterpret_cast<uintptr_t>(rows.data) % kPieceBytes == 0",
            "true",
        ),
    ),
    *mutations(
        "pb_relax_layer_norm/gradients.cuh",
        ("backward-no-shift", OFFSET, "* row.rstd - offset;", "* row.rstd;"),
        ("dx-no-xhat", KINDS, "(g - xhat * mean_g_xhat) * rstd", "g * rstd"),
        ("dx-no-mean", KINDS, "* rstd - offset) * scale", "* rstd) * scale"),
        ("dx-in-scaled-units", KINDS, "- offset) * scale;", "- offset);"),
        (
            "sums-of-some-rows-lost",
            KINDS,
            "int other = 1; other < rows;",
            "int other = 2; other < rows;",
        ),
        ("sums-exchanged-without-barrier", KINDS, "bar_sync();\n      uint4* slot", "uint4* slot"),
        ("sums-read-without-barrier", KINDS, "bar_sync();\n      slot = slots;", "slot = slots;"),
        (
            "sums-share-slots",
            KINDS,
            "st_shared_v4(slot + me.threads_per_row, sums.piece[1]);",
            "st_shared_v4(slot + 1, sums.piece[1]);",
        ),
        (
            "partial-row-stride",
            KINDS,
            "(int64_t{g} * gridDim.x + blockIdx.x) * hidden",
            "(int64_t{g} + blockIdx.x) * hidden",
        ),
        ("dweight-of-the-last-row", ROUNDS, "dweight[j] += dy[j]", "dweight[j] = dy[j]"),
        (
            "dbias-weighted",
            KINDS,
            "dbias[j] += dy[j];\n    dy[j] *= weight[j];",
            "dy[j] *= weight[j];\n    dbias[j] += dy[j];",
        ),
    ),
    *mutations(
        "pb_relax_layer_norm/pb_relax_layer_norm_forward.cu",
        (
            "peak-without-nan",
            KINDS,
            "float_as_uint(fabsf(value[j]))",
            "float_as_uint(fmaxf(fabsf(value[j]), 0.f))",
        ),
        (
            "y-peak-of-padding",
            KINDS,
            "peak_bits(y_peak, y, hidden - me.column(i))",
            "peak_bits(y_peak, y, kColumns)",
        ),
        (
            "peak-of-dropped",
            DROPPED,
            "kept_columns(params.dropout, row, v), x);",
            "kept_columns(params.dropout, row, v) | 0xffu, x);",
        ),
        (
            "forward-dropout-lost",
            DROPPED,
            "keep_columns(kept_columns(params.dropout, row, me.vector_idx(i)), vector);",
            "",
        ),
        ("forward-row-behind-the-last", KINDS, "if (!is_row) return;", ""),
        (
            "wide-padding-in-moments",
            OFFSET,
            "int(min(hidden - v * kColumns, int64_t{kColumns}))",
            "kColumns",
        ),
        (
            "wide-scratch-shared",
            OVERFLOW,
            "scratch + 3 * kMaxWarps, me, Add());",
            "scratch, me, Add());",
        ),
        (
            "wide-forward-dropout-lost",
            DROPPED,
            "vector_idx), x);\n      }\n      return x;",
            "vector_idx) | 0xffu, x);\n      }\n      return x;",
        ),
        (
            "wide-forward-residual-lost",
            OVERFLOW,
            "if (params.residual.data != nullptr) {\n        add_vector",
            "if (false) {\n        add_vector",
        ),
    ),
    *mutations(
        "pb_relax_layer_norm/pb_relax_layer_norm_backward.cu",
        ("dx-of-dropped", DROPPED, "(kept[i] >> j & 1u) == 0) g[i][j] = 0.f;", "false) {}"),
        ("wide-dx-of-dropped", DROPPED, "(kept >> j & 1u) == 0) g[j] = 0.f;", "false) {}"),
        (
            "backward-other-dropout",
            DROPPED,
            "kept_columns(params.dropout, row, me.vector_idx(i));",
            "kept_columns(params.dropout, row + 1, me.vector_idx(i));",
        ),
        ("add-lost", OVERFLOW, "if (has_add) add_vector", "if (false) add_vector"),
        (
            "wide-add-lost",
            OVERFLOW,
            "if (params.add.data != nullptr) {\n        const X* add_row",
            "if (false) {\n        const X* add_row",
        ),
        ("add-taken-for-aligned", PLACES, "{params.add, params.x_dtype},", ""),
        (
            "backward-scratch-shared",
            RERUNS,
            "scratch + round % 2 * 2 * kMaxWarps, me, Add());\n    const RowGradient gradient"
            "(row_sums, inverse_hidden, statistics);\n    if",
            "scratch, me, Add());\n    const RowGradient gradient"
            "(row_sums, inverse_hidden, statistics);\n    if",
        ),
        (
            "wide-backward-scratch-shared",
            OVERFLOW,
            "scratch + round % 2 * 2 * kMaxWarps, me, Add());\n    const RowGradient gradient"
            "(row_sums, inverse_hidden, statistics);\n    for",
            "scratch, me, Add());\n    const RowGradient gradient"
            "(row_sums, inverse_hidden, statistics);\n    for",
        ),
        (
            "wide-partials-not-cleared",
            ROUNDS,
            "dweight[column] = dbias[column] = 0.f;",
            "dweight[column] = 0.f;",
        ),
        ("partials-without-barrier", KINDS, "= sum;\n  bar_sync();", "= sum;"),
        (
            "partial-lost",
            KINDS,
            "int row = 1; row < kSumRows;",
            "int row = 2; row < kSumRows;",
        ),
        (
            "partial-of-another-gradient",
            KINDS,
            "int64_t(blockIdx.y) * params.num_blocks * hidden",
            "int64_t(blockIdx.y) * hidden",
        ),
    ),
    *mutations(
        "sandwich_residual/sandwich_residual_forward.cu",
        ("h-padding-not-cleared", KINDS, "clear_beyond(hidden - me.column(i), h);", ""),
        ("z-of-unrounded-h", SANDWICH, "unpack(h, x[i]);", ""),
        ("pre-eps-shrunk", ROUNDS, "params.pre_eps, params.relax", "params.post_eps, params.relax"),
        (
            "pre-weight-of-post",
            KINDS,
            "parameters.load(2, i, weight);",
            "parameters.load(0, i, weight);",
        ),
        (
            "sandwich-dropout-lost",
            DROPPED,
            "keep_columns(kept_columns(params.dropout, row, me.vector_idx(i)), f);",
            "",
        ),
        (
            "sandwich-residual-lost",
            KINDS,
            "add_vector(slots.load<H>(kFSlots + i * kPieces<H>), x[i]);",
            "",
        ),
        (
            "sandwich-statistics-swapped",
            KINDS,
            "params.f_statistics[row] = f_statistics;",
            "params.f_statistics[row] = h_statistics;",
        ),
        ("norms-without-residual", KINDS, "norm.residual = params.residual;", ""),
        ("norms-peak-of-f", KINDS, "norm.peak = norm.y_peak;", "norm.peak = params.peaks;"),
        ("norms-drop-twice", KINDS, "norm.dropout = {};", ""),
    ),
    *mutations(
        "sandwich_residual/sandwich_residual_backward.cu",
        (
            "dresidual-padding-not-cleared",
            KINDS,
            "if (me.column(i) + j >= hidden) dresidual[j] = 0.f;",
            "",
        ),
        ("df-of-dropped", DROPPED, "keep_columns(kept[i], df);", ""),
        ("fhat-of-dropped", DROPPED, "keep_columns(kept[i], f);", ""),
        (
            "sandwich-other-dropout",
            DROPPED,
            "kept_columns(params.dropout, row, me.vector_idx(i));",
            "kept_columns(params.dropout, row, me.in_row);",
        ),
        ("dh-lost", KINDS, "dresidual[j] += h_gradient", "dresidual[j] = h_gradient"),
        (
            "post-sums-swapped",
            KINDS,
            "f_sums, sums.value[0][i], sums.value[1][i]",
            "f_sums, sums.value[1][i], sums.value[0][i]",
        ),
        (
            "sandwich-scratch-shared",
            ROUNDS,
            "scratch + 2 * kMaxWarps, me, Add());",
            "scratch, me, Add());",
        ),
        (
            "statistics-of-h-for-f",
            KINDS,
            "f_statistics = slots.load_statistics(0);",
            "f_statistics = slots.load_statistics(1);",
        ),
        (
            "post-weight-of-pre",
            KINDS,
            "parameters.load(0, i, weight);",
            "parameters.load(1, i, weight);",
        ),
        ("norms-df-from-dz", OVERFLOW, "norm.dy = {params.dresidual, params.hidden};", ""),
        ("norms-backward-without-dropout", DROPPED, "norm.dropout = params.dropout;", ""),
        (
            "norms-partial-of-another",
            ROUNDS,
            "params.partial + 2 * gradient",
            "params.partial + gradient",
        ),
        ("norms-add-twice", OVERFLOW, "norm.add = {};", ""),
    ),
    *mutations(
        "operators/norms.cpp",
        ("eps-half-shrunk", ROUNDS, "eps * kept * kept", "eps * kept"),
        (
            "row-stride-not-passed",
            PLACES,
            "return {data, strides[0]};",
            "return {data, hidden_};",
        ),
    ),
]

# In place of the suite's profile: the first failing example is enough.
PYTEST = """
import sys, hypothesis, pytest
hypothesis.settings.register_profile(
    "mutations", derandomize=True, deadline=None, database=None, max_examples=600,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
sys.exit(pytest.main(["--hypothesis-profile=mutations", *sys.argv[1:]]))
"""


class Copy:
    """The sources in a folder of their own, and the host model built from them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        # Never the checkout's package, which an editable install would find.
        self.environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self.environment |= {"COGVIEW_KERNELS_CUDA": "0", "COGVIEW_KERNELS_HOST_MODEL": "1"}
        self.environment |= {"COLUMNS": "250", "PYTHONDONTWRITEBYTECODE": "1"}
        self.environment |= {"MAX_JOBS": "1"}  # each of the other cores has a copy of its own
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, folder / name)

    def build(self) -> None:
        done = self._run("setup.py", "-q", "build_ext", "--inplace")
        if done.returncode != 0:
            raise SystemExit(f"{done.stdout}\nmutations: the copy does not compile")

    def first_failure(self, tests: str) -> str | None:
        """The first test that fails, and why; None if all pass."""
        files = ("tests/test_attention_kernels.py", "tests/test_layer_norm_kernels.py")
        done = self._run(
            *("-c", PYTEST, "-x", "-q", "--tb=no", "-p", "no:cacheprovider"),
            *("-m", "slow or not slow", "-k", f"host_model and not sweep and ({tests})", *files),
        )
        failed = re.search(r"^FAILED \S*::(.*)$", done.stdout, re.MULTILINE)
        if done.returncode == 1 and failed is not None:
            return failed.group(1)
        if done.returncode == 0:
            return None
        raise SystemExit(f"{done.stdout}\nmutations: pytest ended with {done.returncode}")

    def first_failure_with(self, mutation: Mutation) -> tuple[str | None, float]:
        """The first test that fails with this mutation, and the seconds that it took."""
        begin, source = time.monotonic(), self.folder / "csrc" / mutation.file
        text = source.read_text()
        source.write_text(text.replace(mutation.old, mutation.new))
        self.build()
        failure = self.first_failure(mutation.tests)
        source.write_text(text)
        return failure, time.monotonic() - begin

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


def check_texts() -> None:
    """Every mutation has a name of its own, and its text stands once in its file."""
    twice = [name for name, count in Counter(m.name for m in MUTATIONS).items() if count > 1]
    stale = [
        f"{m.name}: stands {count} times in csrc/{m.file}: {m.old!r}"
        for m in MUTATIONS
        if (count := (ROOT / "csrc" / m.file).read_text().count(m.old)) != 1
    ]
    if twice or stale:
        raise SystemExit("\n".join(["mutations:", *twice, *stale]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="this mutation alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="copies to work in")
    parser.add_argument("--list", action="store_true", help="list the mutations")
    arguments = parser.parse_args()
    check_texts()
    chosen = [m for m in MUTATIONS if arguments.only is None or m.name in arguments.only]
    unknown = set(arguments.only or ()) - {m.name for m in chosen}
    if unknown:
        parser.error(f"no such mutation: {', '.join(sorted(unknown))}")
    if arguments.list:
        for mutation in chosen:
            print(f"{mutation.name:42} {mutation.file}")
        return

    survived = []
    with (
        tempfile.TemporaryDirectory(prefix="mutations-") as folder,
        ThreadPoolExecutor(arguments.jobs) as pool,
    ):
        copies = [Copy(Path(folder) / str(job)) for job in range(arguments.jobs)]
        list(pool.map(Copy.build, copies))
        tests = sorted({f"({m.tests})" for m in chosen})
        shares = [
            " or ".join(share) for job in range(len(copies)) if (share := tests[job :: len(copies)])
        ]
        for failure in pool.map(Copy.first_failure, copies, shares):
            if failure is not None:
                raise SystemExit(f"mutations: fails without any: {failure}")
        idle: SimpleQueue[Copy] = SimpleQueue()
        for copy in copies:
            idle.put(copy)

        def first_failure_with(mutation: Mutation) -> tuple[str | None, float]:
            copy = idle.get()
            try:
                return copy.first_failure_with(mutation)
            finally:
                idle.put(copy)

        for mutation, (failure, seconds) in zip(
            chosen, pool.map(first_failure_with, chosen), strict=True
        ):
            if failure is None:
                survived.append(mutation.name)
            print(f"{mutation.name:42} {seconds:3.0f} s  {failure or 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught")
    if survived:
        raise SystemExit(f"mutations: survived: {', '.join(survived)}")


if __name__ == "__main__":
    main()
