"""Breaks the kernels on purpose, one place at a time, and demands that a test notices.

    python tests/mutations.py               all of them; exit code 1 if one survives
    python tests/mutations.py --only NAME   these alone; may be repeated
    python tests/mutations.py --jobs 2      so many at once; all cores otherwise
    python tests/mutations.py --list        their names; fails where a kernel has changed

Works in copies of the sources, in a temporary folder, with the host model that `make build` built;
no GPU. Of its object files those are compiled again that a mutation reaches: of a header's first
one kernel file, the others only if no test has failed by then. The tests run in a fork of a process
that has imported torch, those first that have caught most. The seconds are the CPU's.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ["csrc", "cogview_kernels", "tests", "docs", "pyproject.toml"]

# Which tests a mutation is shown to: a pytest -k expression.
VALUES = "many_tiles"
DEFINITION = "equals_the_definition"
GROUPS = "covers_everything"  # several kv heads with several heads each
DEGENERATE = "degenerate"
WILD = "any_values_in_the_layout or pivots_in_any_order"
PACKED = "any_packed_layout"
MANY_PIVOTS = "more_pivots_than"
PACKING = "what_is_packed"
HEADS = "pivots_of_their_own or pivot_of_one_head"
LEAKS = "leak or later_tokens"
EDGES = "edges_of_windows"
SPLITS = "share_the_queries"
SIGN = "any_scale_and_sign"
LOSS_SCALE = "any_loss_scale"
SMALL = "small_weights"
LARGE = "beyond_float32"
DECODE = "few_queries or window_of_each_query or more_rows_than or poisoned_keys"
LARGE_LOGITS = "large_logits"
LONG = "long_lists"
FEW = "few_queries and 5-64"
EACH = "window_of_each_query"
ROWS = "more_rows_than_a_block"
POISON = "poisoned_keys_of_a_cache"
ANY_LENGTHS = "any_kv_lens"
NORMS = "norm_equals or sandwich_equals"  # from here on: of LayerNorm
SANDWICH = "sandwich_equals"
KINDS = "each_kind_of_row"
PLACES = "places_do_not_matter"
ROUNDS = "many_rounds"
RERUNS = "reruns_and_multiprocessors"
STRIDES = "strides_in_many_rounds"
DROPPED = "what_is_dropped"
OFFSET = "large_offset"
OVERFLOW = "nothing_overflows"
RESERVE = "memory_is_left"
MEAN = "first_mean"
BLOCKS = "more_blocks_than"


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
# - a variance's clamp at zero: what lies below is a rounding error, and rstd_of clamps again;
# - that a known peak is not computed again: the same maximum, one launch later;
# - whether dx is aligned: operators allocate it;
# - the warp's barrier before column sums replace rows: the last refill has one;
# - eps where all elements are dropped: the row is zero, whatever it is divided by;
# - dkdv's barrier before a warp's first lane finds the next head: the host's compiler lets that
#   lane alone read what it overwrites.
MUTATIONS = [
    *mutations(
        "three_region_attention/far_keys.cu",
        (
            "padding-counts-as-pivot",
            f"{VALUES} or {PACKING}",
            "next[g] < params.k_len ?",
            "next[g] <= params.k_len ?",
        ),
        ("text-counts-as-pivot", DEFINITION, "next[g] >= text_len &&", "next[g] >= 0 &&"),
        ("repeated-pivot-counts", WILD, "pivots[g] > before);", "pivots[g] >= before);"),
        (
            "unsorted-pivot-of-a-later-group-counts",
            PACKING,
            "if (group > 0) before = max(before, of_groups);",
            "",
        ),
        (
            "unsorted-pivot-of-a-group-counts",
            WILD,
            "if (lane > 0) before = max(before, left);",
            "",
        ),
        (
            "unsorted-pivot-of-a-later-chunk-counts",
            PACKING,
            "largest = max(largest, shfl_idx(largest_of_groups, kWarpSize - 1));",
            "",
        ),
        ("pivots-of-first-groups-lost", VALUES, "+ (group > 0 ? of_groups : 0);", ";"),
        (
            "pivots-of-first-chunks-lost",
            PACKING,
            "num_pivots += shfl_idx(",
            "num_pivots = shfl_idx(",
        ),
        ("chunk-loaded-twice", PACKING, "load(begin + kChunk);", "load(begin);"),
        ("padding-not-written", VALUES, "far_keys[2 + index] = params.k_len;", ""),
        (
            "pivots-of-another-head-packed",
            PACKING,
            "+ head * params.pivot_head_stride;",
            ";",
        ),
    ),
    *mutations(
        "three_region_attention/key_list.cuh",
        (
            "heads-share-the-pivots-of-the-first",
            HEADS,
            "+ min(kv_head, problem.far_key_heads - 1);",
            ";",
        ),
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
            "&& sorted[index] < bounds[i];",
            "&& sorted[index] <= bounds[i];",
        ),
        ("last-pivot-of-a-segment-counts-twice", EDGES, "last < bounds[i]", "last <= bounds[i]"),
        (
            "last-pivot-of-an-inner-segment-counts-twice",
            MANY_PIVOTS,
            "end) - 1] < bounds[i];",
            "end) - 1] <= bounds[i];",
        ),
        (
            "inner-segments-lost",
            MANY_PIVOTS,
            "while (length > kWarpSize) {",
            "while (length > kWarpSize * kWarpSize) {",
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
        ("keys-copied-without-barrier", VALUES, "<0>();\n      bar_sync();", "<0>();"),
        ("keys-not-looked-up", VALUES, "find(stage ^ 1, entry - 2 * kBlockN);", ""),
        ("first-entry-of-the-list-zero", VALUES, "-entry, key_of", "-entry + 1, key_of"),
        ("hidden-entries-taken-for-plain", VALUES, "view.all(begin, end) && view.has", "view.has"),
        (
            "biases-of-a-plain-tile-taken-for-one",
            DEFINITION,
            "&& view.has_one_bias(begin, end) ?",
            "?",
        ),
        (
            "tiles-not-looked-at-again",
            LONG,
            "if (turn == kWarpSize - 1) find(entry);",
            "",
        ),
        (
            "step-of-the-other-half",
            VALUES,
            "sees(first, kFewest) ? first : first + kFewest",
            "first",
        ),
        ("large-logits-not-rounded", LARGE_LOGITS, "!(fabsf(logit) < 1024.f)", "false"),
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
        (
            "stage-not-waited-for",
            VALUES,
            "cp_async_wait_group<0>();\n    bar_sync();",
            "bar_sync();",
        ),
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
            FEW,
            "tile_offset<kHeadDim>(row + lane % 16, 2 * k + lane / 16)",
            "(row + lane % 16) * kHeadDim * 2 + (2 * k + lane / 16) * 16",
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
        ("exact-o-not-rescaled", LEAKS, "o[d] * (keep / l)", "o[d]"),
        (
            "exact-row-reads-pivots-of-the-first-head",
            HEADS,
            "far_keys_of(problem, batch, kv_head);",
            "far_keys_of(problem, batch, 0);",
        ),
        ("exact-row-without-bias", LEAKS, "if (entry >= list.num_far) return 0.f;", "return 0.f;"),
    ),
    *mutations(
        "three_region_attention/sm80/decode.cu",
        (
            "decode-keys-of-another-part",
            FEW,
            "if (at < part.begin || !sees[c / 2](at))",
            "if (!sees[c / 2](at))",
        ),
        ("decode-nothing-masked", EACH, "if (!part.all_see(entry, kStepKeys)) {", "if (false) {"),
        (
            "decode-windows-begin-together",
            EACH,
            "(entry >= window_begin) & (entry + number <= window_end)",
            "entry + number <= window_end",
        ),
        (
            "decode-far-keys-of-another-query",
            EACH,
            "far_ends[position - max(first + tile.first_query, 0)]",
            "far_ends[0]",
        ),
        (
            "decode-window-keys-as-pivots",
            FEW,
            "if (index >= num_pivots) keys[step] = at + beyond;",
            "",
        ),
        (
            "decode-o-of-some-rows-not-rescaled",
            ROWS,
            "keep[0] != 1.f || keep[1] != 1.f",
            "keep[0] != 1.f",
        ),
        (
            "decode-warps-l-not-weighted",
            FEW,
            "l += shared.l[i][at] * weight_of(shared.m[i][at], m);",
            "l += shared.l[i][at];",
        ),
        ("decode-parts-o-not-weighted", FEW, "four[d] * weight;", "four[d];"),
        ("decode-last-part-lost", FEW, "int(first[2]);", "int(first[2]) - 1;"),
        ("decode-rows-without-position", FEW, "if (!has_position) o[i] = 0.f;", ""),
        ("decode-nan-rows-kept", POISON, "writes && has_position && zero != 0.f", "false"),
        (
            "decode-one-nan-row-computed-again",
            POISON,
            "lanes &= ~(((1u << kLanes) - 1) << row_lanes);",
            "lanes = 0;",
        ),
        (
            "decode-reads-any-kv-lens",
            ANY_LENGTHS,
            "min(max(params.kv_lens[batch], 0), k_len)",
            "params.kv_lens[batch]",
        ),
        (
            "decode-copies-not-waited-for",
            FEW,
            "cp_async_wait_group<kStages - 2>();",
            "cp_async_wait_group<kStages - 1>();",
        ),
        (
            "decode-stage-without-barrier",
            FEW,
            "bar_sync();\n    const auto& stage = stages[from];",
            "const auto& stage = stages[from];",
        ),
        (
            "decode-row-of-another-head",
            DEFINITION,
            "{kv_head * group + of_group, exists ? query : -1}",
            "{kv_head + of_group, exists ? query : -1}",
        ),
        (
            "decode-window-seen-by-all",
            DECODE,
            "(entry + number <= window_end);",
            "(entry <= window_end);",
        ),
        (
            "decode-pivot-bias-alone-ignored",
            EACH,
            "problem.text_bias != 0.f || problem.pivot_bias != 0.f;",
            "problem.text_bias != 0.f;",
        ),
        ("decode-l-not-rescaled", DECODE, "l[half] * keep[half] + sum", "l[half] + sum"),
        (
            "decode-q-not-waited-for",
            DECODE,
            "cp_async_wait_group<kStages - 1>();\n  bar_sync();\n  DecodeWarp",
            "bar_sync();\n  DecodeWarp",
        ),
        (
            "decode-statistics-without-barrier",
            DECODE,
            "bar_sync();\n  const auto largest_of",
            "const auto largest_of",
        ),
        (
            "decode-sums-without-barrier",
            DECODE,
            "bar_sync();\n  const int num_rows",
            "const int num_rows",
        ),
        (
            "decode-parts-overlap",
            DECODE,
            "min(part.begin + size, part.end);",
            "min(part.begin + size + 1, part.end);",
        ),
        (
            "decode-mean-beyond-float16",
            "does_not_overflow",
            "o[i] = fminf(fmaxf(o[i], -65504.f), 65504.f);",
            "{}",
        ),
    ),
    *mutations(
        "three_region_attention/sm80/forward.cu",
        (
            "forward-reads-pivots-of-the-first-head",
            HEADS,
            "far_keys_of(problem, tile.batch, tile.kv_head)",
            "far_keys_of(problem, tile.batch, 0)",
        ),
        ("forward-nothing-masked", VALUES, "if (!sees) s[rt][n][c] = -INFINITY;", ""),
        ("forward-first-entries-lost", VALUES, "entry <= -kBlockN", "entry <= 0"),
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
        ("forward-l-not-rescaled", VALUES, "l[rt][half] *= keep;", ""),
        ("forward-o-not-rescaled", VALUES, "o[rt][n][2 * half] *= keep;", ""),
        (
            "forward-sum-of-one-lane",
            VALUES,
            "quad_sum(state.l[i / 2][i % 2])",
            "state.l[i / 2][i % 2]",
        ),
        ("forward-factor-of-another-row", VALUES, "lane / 4 * 4 + 2 * rt + half", "lane / 4 * 4"),
        ("forward-nan-rows-kept", LEAKS, ">= 0 && zero != 0.f", "< 0"),
    ),
    *mutations(
        "three_region_attention/sm80/backward.cuh",
        ("ds-exponent-ignores-v", SMALL, "bounds[2 * row] * v +", "bounds[2 * row] +"),
        (
            "ds-not-scaled",
            LOSS_SCALE,
            "return min(max(14 - ilogbf(bound), -100), 100);",
            "return 0;",
        ),
        ("p-not-scaled", SMALL, "kIsFloat16<T> ? 15 : 0", "0"),
    ),
    *mutations(
        "three_region_attention/sm80/backward.cu",
        (
            "partial-reads-pivots-of-the-first-head",
            HEADS,
            "far_keys_of(problem, batch, head)",
            "far_keys_of(problem, batch, 0)",
        ),
        ("dlse-missing", VALUES, "product -= backward.dlse[at];", ";"),
        ("delta-of-half-a-row", VALUES, "mask = 1; mask < kLanes;", "mask = 2; mask < kLanes;"),
        ("row-read-beyond-its-end", VALUES, "chunk < kChunks<kHeadDim>;", "chunk < kLanes;"),
        ("last-split-lost", VALUES, "split < params.num_splits;", "split < params.num_splits - 1;"),
        ("rows-behind-the-far-keys-summed", SPLITS, "if (row >= list.size) return;", ""),
    ),
    *mutations(
        "three_region_attention/sm80/backward_dq.cu",
        (
            "dq-row-reads-pivots-of-the-first-head",
            HEADS,
            "key_list_of(problem, batch, kv_head, i, i + 1)",
            "key_list_of(problem, batch, 0, i, i + 1)",
        ),
        (
            "dq-reads-pivots-of-the-first-head",
            HEADS,
            "far_keys_of(problem, tile.batch, tile.kv_head)",
            "far_keys_of(problem, tile.batch, 0)",
        ),
        ("dq-no-softmax-scale", VALUES, "problem.softmax_scale * exp2f(", "exp2f("),
        (
            "dq-exponent-not-undone",
            VALUES,
            "exp2f(float(-ds_exponent<T>(params, tile.batch, tile.head)))",
            "1.f",
        ),
        ("dq-no-delta", VALUES, "minus_delta[rt][half]);", "0.f);"),
        ("dq-nothing-masked", VALUES, "if (!sees) s[rt][n][c] = -INFINITY;", ""),
        ("dq-nan-rows-kept", LEAKS, "&& sum != 0.f", "&& false"),
        ("dq-exact-no-delta", LEAKS, "p * (dp - params.delta[at])", "p * dp"),
    ),
    *mutations(
        "three_region_attention/sm80/backward_dkdv.cu",
        (
            "dkdv-reads-pivots-of-the-first-head",
            HEADS,
            "far_keys_of(problem, work.batch, work.kv_head)",
            "far_keys_of(problem, work.batch, 0)",
        ),
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
        ("seed-of-32-bits", SANDWICH, "key1 = uint32_t(key >> 32)", "key1 = 0"),
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
        "pb_relax_layer_norm/row_ring.cuh",
        (
            "warps-share-their-vectors",
            ROUNDS,
            "shfl_idx(in_row / kWarpSize * kWarpSize * most, 0)",
            "0",
        ),
        (
            "last-vector-taken-for-whole",
            KINDS,
            "tail = has_tail ? max(0, min(kColumns, int(hidden) - column(num_full))) : 0;",
            "tail = has_tail && int(hidden) > column(num_full) ? kColumns : 0;",
        ),
        (
            "groups-share-a-barrier",
            ROUNDS,
            "bar_sync(1 + row_in_block, threads_per_row);",
            "bar_sync(1, threads_per_row);",
        ),
        ("last-vector-of-an-odd-number-lost", NORMS, "if (left > 0) f(", "if (false) f("),
        ("last-vector-lost", KINDS, "if (me.has_tail) f(", "if (false) f("),
        ("pieces-share-slots", NORMS, "(i * kStep + p * kWarpSize)", "(i * kStep)"),
        ("row-copied-beyond-its-end", NORMS, "if (v >= left) continue;", "if (v > left) continue;"),
        (
            "odd-row-copied-beyond-its-end",
            NORMS,
            "load_vector_at(source, 0, hidden - me.column(i), false)",
            "load_vector_at(source, 0, hidden - me.column(i) + 1, false)",
        ),
        (
            "row-stride-ignored",
            PLACES,
            "row * rows.row_stride + me.column(0);",
            "row * hidden + me.column(0);",
        ),
        (
            "rows-dealt-out-twice",
            RERUNS,
            "blockIdx.x + int64_t{gridDim.x} * me.row_in_block;",
            "blockIdx.x + me.row_in_block;",
        ),
        ("stages-not-swapped", ROUNDS, "now = next;", ""),
        ("rows-not-waited-for", ROUNDS, "cp_async_wait_group<1>();", ""),
        (
            "single-rows-not-waited-for",
            ROUNDS,
            "} else {\n      cp_async_wait_group<0>();",
            "} else {",
        ),
        ("next-row-not-copied", ROUNDS, "if (ahead < rows) copy(ahead, now);", ""),
        (
            "parameter-taken-for-aligned",
            PLACES,
            "&& reinterpret_cast<uintptr_t>(given.data) % kPieceBytes == 0",
            "",
        ),
        ("absent-parameter-is-zero", KINDS, "out[j] = given.absent;", "out[j] = 0.f;"),
        (
            "parameter-of-another-dtype",
            NORMS,
            "} else if (given.dtype == DType::kFloat32) {",
            "} else if (false) {",
        ),
        (
            "parameter-of-another-half",
            KINDS,
            "if (given.dtype == DType::kBFloat16) out[j] = other[j];",
            "",
        ),
    ),
    *mutations(
        "pb_relax_layer_norm/row_passes.cuh",
        ("vectors-visited-twice", NORMS, "row.skip(n);", ""),
        ("vectors-that-are-not-there", KINDS, "if (columns > 0) {", "if (true) {"),
        (
            "last-vector-written-whole",
            NORMS,
            "store_vector_at(to, 0, columns, false, vector);",
            "store_vector_at(to, 0, kColumns, false, vector);",
        ),
        (
            "dropout-of-the-first-vector",
            SANDWICH,
            "kept_columns(dropout, row, me.vector_idx(i))",
            "kept_columns(dropout, row, me.first_vector)",
        ),
        ("dropped-not-zero", DROPPED, "x.store(0, vector);", ""),
    ),
    *mutations(
        "pb_relax_layer_norm/statistics.cuh",
        ("row-reduction-without-barrier", ROUNDS, "me.sync();", ""),
        (
            "row-of-all-warps-but-one",
            ROUNDS,
            "warp < num_warps ? of_row",
            "warp < num_warps - 1 ? of_row",
        ),
        (
            "sums-of-another-row",
            ROUNDS,
            "scratch + me.row_in_block * num_warps * kCount;",
            "scratch;",
        ),
        ("maximum-summed", ROUNDS, "n < kMaxima ? fmaxf(a, b) : a + b", "a + b"),
        (
            "maximum-of-a-thread",
            KINDS,
            "uint_as_float(redux_max(float_as_uint(number[n])))",
            "number[n]",
        ),
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
        (
            "rstd-of-infinity",
            KINDS,
            "rough > 0.f ? rough + 0.5f * rough * error : rough",
            "rough + 0.5f * rough * error",
        ),
        (
            "peak-of-positive-numbers",
            KINDS,
            "fabsf(smallest)",
            "0.f",
        ),
        ("odd-columns-not-in-sum", OFFSET, "return of_even + of_odd;", "return of_even;"),
        ("half-the-matrix-not-in-sum", MEAN, "of_rows[0] + of_rows[2]", "of_rows[0]"),
        ("sum-out-of-range", OVERFLOW, "kHalf ? 1.f : 0x1p-16f", "kHalf ? 1.f : 1.f"),
        (
            "sum-of-denormals-lost",
            MEAN,
            "if (first[0] < RoughSums<T>::kTiny && first[0] > 0.f) {",
            "if (false) {",
        ),
        ("shift-not-in-variance", OFFSET, "- shift * shift, 0.f)", ", 0.f)"),
        ("forward-no-shift", OFFSET, "(d * row.rstd - offset)", "(d * row.rstd)"),
        ("padding-in-moments", KINDS, "j < columns ? d(x[j]) : 0.f", "d(x[j])"),
        (
            "peak-of-the-row-alone",
            KINDS,
            "peak = relax == Relax::kTensor ? *tensor_peak :",
            "peak = false ? *tensor_peak :",
        ),
        (
            "row-scratch-shared",
            ROUNDS,
            "scratch + 3 * kMaxWarps, me, Add());",
            "scratch, me, Add());",
        ),
        (
            "scratch-of-denormals-shared",
            MEAN,
            "scratch + 2 * kMaxWarps, me, Add());",
            "scratch + 3 * kMaxWarps, me, Add());",
        ),
        ("statistics-swapped", OFFSET, "return {mean, shift,", "return {shift, mean,"),
        ("bias-weighted", KINDS, "* weight[j] + bias[j];", "* (weight[j] + bias[j]);"),
    ),
    *mutations(
        "pb_relax_layer_norm/plan.h",
        (
            "stages-in-the-parameters",
            KINDS,
            "parameter(num_parameters) + (group",
            "parameter(num_parameters - 1) + (group",
        ),
        ("groups-share-stages", KINDS, "(group * stages + idx)", "(group + idx)"),
        (
            "no-memory-for-the-system",
            RESERVE,
            "limit -= kRowArrayBytes + kReservedSharedBytes;",
            "",
        ),
        (
            "sums-depend-on-the-rows",
            RERUNS,
            "needs.rows = int64_t{needs.num_blocks} * needs.max_threads;",
            "",
        ),
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
        ("columns-beyond-the-end-copied", NORMS, "i * kApart < left;", "i * kApart <= left;"),
        (
            "odd-columns-beyond-the-end-copied",
            PLACES,
            "load_vector_at(from, i * kApart, columns.left, false)",
            "load_vector_at(from, i * kApart, columns.left + 1, false)",
        ),
        (
            "weight-taken-for-aligned",
            PLACES,
            "hidden % kColumns == 0 && reinterpret_cast<uintptr_t>(weight) % kPieceBytes == 0",
            "hidden % kColumns == 0",
        ),
        ("absent-weight-is-zero", KINDS, "out[i][j] = 1.f;", "out[i][j] = 0.f;"),
        ("stages-not-turned", ROUNDS, "turn ^= 1;", ""),
        ("backward-rows-not-waited-for", ROUNDS, "cp_async_wait_group<1>();", ""),
        (
            "backward-single-rows-not-waited-for",
            NORMS,
            "} else {\n      cp_async_wait_group<0>();",
            "} else {",
        ),
        (
            "statistics-not-waited-for",
            ROUNDS,
            "bar_warp_sync();  // lanes copied",
            "// lanes copied",
        ),
        (
            "statistics-overwritten",
            ROUNDS,
            "[&] {\n      bar_warp_sync();",
            "[&] {",
        ),
        ("row-behind-the-last-copied", ROUNDS, "if (next < rows) copy(next", "copy(next"),
        ("next-row-copied-again", ROUNDS, "copy(next, stage());", "copy(row, stage());"),
        (
            "row-sums-without-barrier",
            ROUNDS,
            "me.sync();\n      sum = 0.f;",
            "sum = 0.f;",
        ),
        ("row-sums-share-memory", ROUNDS, "offset + which * 2 * kFloatBytes", "offset"),
        (
            "row-sums-of-all-warps-but-one",
            ROUNDS,
            "lane() % kHalf < num_warps)",
            "lane() % kHalf < num_warps - 1)",
        ),
        ("row-sums-swapped", KINDS, "number[0] = second ? other : sum;", "number[0] = sum;"),
        (
            "sums-of-a-group-lost",
            ROUNDS,
            "int group = 1; group < groups;",
            "int group = 2; group < groups;",
        ),
        (
            "sums-of-the-first-group-again",
            ROUNDS,
            "of_first.first + group * group_bytes}",
            "of_first.first}",
        ),
        (
            "sums-read-without-barrier",
            ROUNDS,
            "bar_sync();\n    // Vectors",
            "// Vectors",
        ),
        (
            "sums-share-slots",
            ROUNDS,
            "slots.store(n * kPieces<float>, pack",
            "slots.store(n, pack",
        ),
        ("partial-row-stride", KINDS, "= gridDim.x * hidden;", "= hidden;"),
        ("dweight-of-the-last-row", ROUNDS, "dweight[j] += dy[j]", "dweight[j] = dy[j]"),
        ("rows-ahead-by-one-stage", ROUNDS, "steps.rows * params->plan.stages;", "steps.rows;"),
        (
            "backward-without-memory-for-the-system",
            "plans_of_backward",
            "most_bytes - kRowArrayBytes - kReservedSharedBytes",
            "most_bytes",
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
            "parameters-without-barrier",
            OVERFLOW,
            "fill_parameters(shared, parameters, hidden);\n    bar_sync();",
            "fill_parameters(shared, parameters, hidden);",
        ),
        ("peak-of-the-first-round", ROUNDS, "row += step", "row += params.rows"),
        (
            "y-peak-of-padding",
            KINDS,
            "peak_bits(y_peak, rounded, columns)",
            "peak_bits(y_peak, rounded, kColumns)",
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
            "drop_columns(x, params.dropout, row, me);",
            "{}",
        ),
        ("vectors-written-that-are-not-there", NORMS, "if (columns == 0) return;", ""),
        ("forward-residual-lost", ROUNDS, "add_vector(residual.load(v), y);", "{}"),
        (
            "wide-padding-in-moments",
            OFFSET,
            "int(max(min(hidden - v * kColumns, int64_t{kColumns}), int64_t{0}))",
            "kColumns",
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
        "pb_relax_layer_norm/pb_relax_layer_norm_partial_sums.cu",
        ("partials-before-the-backward-ends", BLOCKS, "griddepcontrol_wait();", ""),
        (
            "partials-end-before-the-backward",
            SANDWICH,
            "griddepcontrol_wait();\n  if (gradient.data == nullptr) return;",
            "if (gradient.data == nullptr) return;\n  griddepcontrol_wait();",
        ),
        ("partials-without-barrier", BLOCKS, "bar_sync();", ""),
        ("partials-of-a-warp-lost", BLOCKS, "int other = 0; other", "int other = 1; other"),
        ("partials-of-lanes-lost", BLOCKS, "sum[j] += shfl_bfly(sum[j], 2 * kThreadsAcross);", ""),
        ("partials-beyond-192-lost", BLOCKS, "row += kLoads * kThreadsDown", "row += num_rows"),
        ("partials-step", BLOCKS, "source += kThreadsDown * hidden", "source += hidden"),
        (
            "partials-of-another-gradient",
            BLOCKS,
            "(int64_t{blockIdx.y} * params.num_blocks + down)",
            "(int64_t{blockIdx.y} + down)",
        ),
        (
            "partials-of-columns-behind",
            BLOCKS,
            "< hidden ? params.num_blocks : 0",
            "< hidden + 8 ? params.num_blocks : 0",
        ),
    ),
    *mutations(
        "pb_relax_layer_norm/pb_relax_layer_norm_backward.cu",
        ("dx-of-dropped", DROPPED, "(kept >> (i * kColumns + j) & 1u) == 0", "false"),
        ("wide-dx-of-dropped", DROPPED, "(kept >> j & 1u) == 0) g[j] = 0.f;", "false) {}"),
        ("x-of-dropped", DROPPED, "stage.keep<X>(Own::kX + i * kPieces<X>, of_vector);", ""),
        (
            "backward-other-dropout",
            DROPPED,
            "kept_columns(params.dropout, row, columns.vector_idx(i));",
            "kept_columns(params.dropout, row + 1, columns.vector_idx(i));",
        ),
        ("add-lost", OVERFLOW, "if (has_add) add_vector", "if (false) add_vector"),
        (
            "wide-add-lost",
            OVERFLOW,
            "if (params.add.data != nullptr) {\n        const X* add_row",
            "if (false) {\n        const X* add_row",
        ),
        ("add-taken-for-aligned", PLACES, "{params.add, params.x_dtype},", "{{}, params.x_dtype},"),
        (
            "dy-by-the-stride-of-x",
            STRIDES,
            "advanced(dy, steps.bytes[0])",
            "advanced(dy, steps.bytes[1])",
        ),
        (
            "dbias-weighted",
            KINDS,
            "if constexpr (kPlain) {\n        add_to",
            "weigh(weight[i], g[i]);\n      if constexpr (kPlain) {\n        add_to",
        ),
        (
            "weight-without-barrier",
            OVERFLOW,
            "shared_weight.store(0, weight);\n    }\n    bar_sync();",
            "shared_weight.store(0, weight);\n    }",
        ),
        (
            "backward-scratch-shared",
            ROUNDS,
            "exchange.add(row_sums, turn, me);",
            "exchange.add(row_sums, 0, me);",
        ),
        (
            "wide-backward-scratch-shared",
            OVERFLOW,
            "exchange.add(row_sums, round % 2, me);",
            "exchange.add(row_sums, 0, me);",
        ),
        (
            "wide-partials-not-cleared",
            ROUNDS,
            "dweight[column] = dbias[column] = 0.f;",
            "dweight[column] = 0.f;",
        ),
    ),
    *mutations(
        "sandwich_residual/sandwich_residual_forward.cu",
        (
            "h-padding-not-cleared",
            KINDS,
            "clear_beyond(columns, rounded);",
            "",
        ),
        ("z-written-where-it-is-not", SANDWICH, "if (columns == 0) return;", ""),
        ("z-of-the-residual", SANDWICH, "residual.store(v, rounded);", ""),
        ("h-not-in-its-sums", KINDS, "rough_h.add(rounded);", ""),
        (
            "pre-eps-shrunk",
            ROUNDS,
            "rough_h, h, inverse_hidden, params.pre_eps",
            "rough_h, h, inverse_hidden, params.post_eps",
        ),
        ("pre-weight-of-post", KINDS, "pre_weight = parameter(2)", "pre_weight = parameter(0)"),
        ("sandwich-dropout-lost", DROPPED, "drop_columns(f, params.dropout, row, me);", "{}"),
        ("sandwich-residual-lost", KINDS, "add_vector(residual.load(v), x);", ""),
        (
            "sandwich-statistics-swapped",
            KINDS,
            "params.h_statistics[row] = h_statistics;",
            "params.h_statistics[row] = f_statistics;",
        ),
        ("norms-without-residual", KINDS, "norm.residual = params.residual;", ""),
        ("norms-peak-of-f", KINDS, "norm.peak = norm.y_peak;", "norm.peak = params.peaks;"),
        ("norms-drop-twice", KINDS, "norm.dropout = {};", ""),
    ),
    *mutations(
        "sandwich_residual/sandwich_residual_backward.cu",
        ("dresidual-padding-not-cleared", KINDS, "if (is_absent) gradient[j] = 0.f;", ""),
        ("df-of-dropped", DROPPED, "if (drops) keep_columns(kept >> i * kColumns, packed);", ""),
        ("fhat-of-dropped", DROPPED, "stage.keep<F>(Own::kF + i * kPieces<F>, of_vector);", ""),
        (
            "sandwich-other-dropout",
            DROPPED,
            "kept_columns(params.dropout, row, columns.vector_idx(i));",
            "kept_columns(params.dropout, row, me.in_row);",
        ),
        ("dh-lost", KINDS, "gradient[j] += h_gradient", "gradient[j] = h_gradient"),
        (
            "gradients-of-another-norm",
            SANDWICH,
            "if constexpr (kPlain) add_gradients(kPost, i);",
            "if constexpr (kPlain) add_gradients(kPre, i);",
        ),
        (
            "sandwich-scratch-shared",
            ROUNDS,
            "exchange.add(f_sums, 1, me);",
            "exchange.add(f_sums, 0, me);",
        ),
        (
            "statistics-of-h-for-f",
            KINDS,
            "f_statistics = kSlots.load_statistics(stage, kPost);",
            "f_statistics = kSlots.load_statistics(stage, kPre);",
        ),
        (
            "post-weight-of-pre",
            KINDS,
            "weights.load(kPost, i, weight);\n    };",
            "weights.load(kPre, i, weight);\n    };",
        ),
        (
            "weight-of-df",
            SANDWICH,
            "weights.load(kPost, i, weight);\n      } else",
            "weights.load(kPre, i, weight);\n      } else",
        ),
        ("dresidual-in-one-slot", SANDWICH, "(p == 0 ? kDh : kDz)", "kDh"),
        (
            "weights-without-barrier",
            OVERFLOW,
            "weights.store(kPre, pre);\n    }\n    bar_sync();",
            "weights.store(kPre, pre);\n    }",
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

# Profiles in place of the suite's: the first failing example is enough. What fails without any
# mutation is found by the suite itself: fewer examples.
EXAMPLES = {"mutations": 600, "without-mutations": 60}
TEST_FILES = [f"tests/test_{name}_kernels.py" for name in ("attention", "decode", "layer_norm")]
# Seconds of tests that a mutation of a header is shown to before every kernel is compiled with it.
FIRST_TESTS_SECONDS = 3.0
LONGEST_SECONDS = 900.0  # then a test hangs


class MutationError(Exception):
    """A mutation cannot be tried: it does not compile, or the tests do not run."""


class Objects:
    """The object files of the checkout's host model, and how each was compiled."""

    def __init__(self) -> None:
        import ninja

        folders = [path.parent for path in ROOT.glob("build/temp.*/host_model/build.ninja")]
        if len(folders) != 1:
            raise SystemExit("mutations: no host model has been built; run `make build`")
        self.folder = folders[0]
        self._ninja = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(self.folder)]
        tasks = json.loads(self._output("-t", "compdb"))
        self.link = next(task["command"] for task in tasks if task["output"].endswith(".so"))
        compiled = [task for task in tasks if task["output"].endswith(".o")]
        if not all(Path(task["file"]).is_relative_to(ROOT / "csrc") for task in compiled):
            raise SystemExit("mutations: the host model is another checkout's; run `make build`")
        self._output()  # what has changed since it was built
        self.compile = {task["output"]: task["command"] for task in compiled}
        self.sources = {task["output"]: Path(task["file"]).resolve() for task in compiled}
        self.reads: dict[str, set[Path]] = {}
        for line in self._output("-t", "deps").splitlines():
            if not line.startswith(" "):
                reads = self.reads.setdefault(line.partition(":")[0], set())
            elif line.strip().startswith(str(ROOT)):
                reads.add(Path(line.strip()).resolve())

    def _output(self, *arguments: str) -> str:
        done = subprocess.run([*self._ninja, *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{done.stdout}\nmutations: ninja failed")
        return done.stdout

    def stages(self, file: str) -> list[list[str]]:
        """The objects that `file` is compiled into, in the order in which they are compiled anew:
        one kernel file, the other kernel files, the rest."""
        reading = [name for name in self.compile if ROOT / "csrc" / file in self.reads[name]]
        kernels = [name for name in reading if name.endswith(".cu.o")]
        # A forward is small, and the largest of them uses most of a header.
        kernels.sort(key=lambda name: ("backward" in name, -(self.folder / name).stat().st_size))
        others = [name for name in reading if name not in kernels]
        return [stage for stage in (kernels[:1], kernels[1:], others) if stage]


class Workplace:
    """A copy of the sources, in which one process tries one mutation after the other."""

    def __init__(self, folder: Path, objects: Objects) -> None:
        self.folder, self.objects = folder, objects
        self.catches: Counter[str] = Counter()  # by test
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("*.so", "__pycache__")
                shutil.copytree(ROOT / name, folder / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, folder / name)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        self.module = folder / "cogview_kernels" / f"_host_model{suffix}"
        self.link({})

    def compile(self, name: str) -> str:
        """The new object, named as one of the checkout's, of the source as it is here."""
        source, new = self.objects.sources[name], self.folder / name
        new.parent.mkdir(parents=True, exist_ok=True)
        changed = {str(source): str(self.folder / source.relative_to(ROOT)), name: str(new)}
        # -O1 compiles in 60 % of the time, and the tests take as long.
        changed |= {"-O2": "-O1", "-O3": "-O1", f"{name}.d": f"{new}.d"}
        words = [changed.get(word, word) for word in shlex.split(self.objects.compile[name])]
        self.run([*words, "-w"])
        return str(new)

    def link(self, new: dict[str, str]) -> None:
        """Links the host model with new objects in place of the checkout's. They come first: of
        inline functions in several objects the linker keeps the first."""
        words = shlex.split(self.objects.link)
        old = [word for word in words if word in self.objects.compile and word not in new]
        first = words.index(next(word for word in words if word in self.objects.compile))
        rest = [word for word in words[first:] if word not in self.objects.compile]
        rest[rest.index("-o") + 1] = str(self.module)
        self.run([*words[:first], *new.values(), *old, *rest])

    def run(self, command: list[str]) -> None:
        done = subprocess.run(
            command,
            cwd=self.objects.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode != 0:
            raise MutationError(f"does not compile:\n{done.stdout}")

    def catch(self, mutation: Mutation, seconds: dict[str, float]) -> tuple[str | None, float]:
        """The first test that fails with this mutation, and the CPU's seconds that it took to find
        it; `seconds` of each test without it."""
        begin, source = cpu_seconds(), self.folder / "csrc" / mutation.file
        text = source.read_text()
        source.write_text(text.replace(mutation.old, mutation.new))
        # Those that have caught most, then the fastest.
        tests = sorted(seconds, key=lambda test: (-self.catches[test], seconds[test]))
        seconds = {test: seconds[test] for test in tests}
        failure = None
        try:
            new: dict[str, str] = {}
            stages = self.objects.stages(mutation.file)
            for number, stage in enumerate(stages, 1):
                new |= {name: self.compile(name) for name in stage}
                self.link(new)
                limit = FIRST_TESTS_SECONDS if number < len(stages) else math.inf
                failure = self.test(mutation.tests, Chosen(seconds, limit)).failure
                if failure is not None:
                    self.catches[failure.partition(" - ")[0]] += 1
                    break
        finally:
            source.write_text(text)
        return failure, cpu_seconds() - begin

    def test(self, tests: str, chosen: Chosen) -> Report:
        """Runs tests in a fork of this process, which has imported torch."""
        log, result = self.folder / "log", self.folder / "result"
        result.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            try:
                with log.open("w") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                os.chdir(self.folder)
                # Never the checkout's package, which an editable install would find.
                sys.path[0] = str(self.folder)
                profile = "mutations" if chosen.seconds else "without-mutations"
                arguments = [f"--hypothesis-profile={profile}", "-x", "-q", "--tb=no"]
                arguments += ["-p", "no:cacheprovider", "-m", "slow or not slow"]
                arguments += ["-k", f"not cuda and not sweep and ({tests})", *TEST_FILES]
                code = pytest.main(arguments, plugins=[chosen])
                result.write_text(json.dumps([int(code), *chosen.report]))
            finally:
                os._exit(0)
        deadline = time.monotonic() + LONGEST_SECONDS
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
        if not result.is_file():
            return Report("the process died or hung", {})
        code, *report = json.loads(result.read_text())
        if code not in (0, 1, pytest.ExitCode.NO_TESTS_COLLECTED):  # a share of few tests
            raise MutationError(f"pytest ended with {code}:\n{log.read_text()}")
        return Report(*report)


class Report(NamedTuple):
    failure: str | None  # the first test that failed, and why
    seconds: dict[str, float]  # of each test that ran


class Chosen:
    """A plugin of pytest: which of the tests run and in which order, and what came of them."""

    def __init__(
        self,
        seconds: dict[str, float] | None = None,
        limit: float = math.inf,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Tests in the order of `seconds`, as many as take `limit` of them; without `seconds` one
        of so many shares."""
        self.seconds, self.limit, self.share = seconds, limit, share
        self.report = Report(None, {})

    @pytest.hookimpl(trylast=True)  # after -k and -m
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.seconds is None:
            items[:] = items[self.share[0] :: self.share[1]]
            return
        order = {test: place for place, test in enumerate(self.seconds)}
        items.sort(key=lambda item: order[short(item.nodeid)])
        ends = list(itertools.accumulate(self.seconds[short(item.nodeid)] for item in items))
        del items[max(1, bisect.bisect_right(ends, self.limit)) :]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = short(report.nodeid)
        seconds = self.report.seconds.get(test, 0.0) + report.duration
        if not report.skipped:
            self.report.seconds[test] = seconds
        if report.failed and self.report.failure is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message.partition("\n")[0] if crash else report.when
            self.report = self.report._replace(failure=f"{test} - {why}")


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def short(nodeid: str) -> str:
    """The test without its file."""
    return nodeid.partition("::")[2]


def check_texts() -> None:
    """Every mutation has a name of its own, and its text stands once in its file. The tests' files
    are there."""
    twice = [name for name, count in Counter(m.name for m in MUTATIONS).items() if count > 1]
    stale = [
        f"{m.name}: stands {count} times in csrc/{m.file}: {m.old!r}"
        for m in MUTATIONS
        if (count := (ROOT / "csrc" / m.file).read_text().count(m.old)) != 1
    ]
    missing = [name for name in TEST_FILES if not (ROOT / name).is_file()]
    if twice or stale or missing:
        raise SystemExit("\n".join(["mutations:", *twice, *stale, *missing]))


# What a process of the pool does.

workplace: Workplace


def open_workplace(folder: str, objects: Objects) -> None:
    global workplace
    workplace = Workplace(Path(tempfile.mkdtemp(dir=folder)), objects)


def test_without(tests: str, share: tuple[int, int]) -> Report:
    return workplace.test(tests, Chosen(share=share))


def catch(mutation: Mutation, seconds: dict[str, float]) -> tuple[str | None, float]:
    return workplace.catch(mutation, seconds)


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

    # In processes that fork from here, and fork again for each mutation's tests.
    os.environ["OMP_NUM_THREADS"] = "1"
    import hypothesis
    import torch._dynamo  # noqa: F401  # as the package does

    for profile, examples in EXAMPLES.items():
        hypothesis.settings.register_profile(
            profile,
            derandomize=True,
            deadline=None,
            database=None,
            max_examples=examples,
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        )
    objects = Objects()
    survived, broken, begin, total = [], [], time.monotonic(), 0.0
    with (
        tempfile.TemporaryDirectory(prefix="mutations-") as folder,
        ProcessPoolExecutor(
            arguments.jobs,
            multiprocessing.get_context("fork"),
            initializer=open_workplace,
            initargs=(folder, objects),
        ) as pool,
    ):
        tests = " or ".join(sorted({m.tests for m in chosen}))
        # Shares smaller than a process's, as some tests take long.
        shares = [(share, 8) for share in range(8)]
        seconds: dict[str, float] = {}
        for report in pool.map(test_without, [tests] * len(shares), shares):
            if report.failure is not None:
                raise SystemExit(f"mutations: fails without any: {report.failure}")
            seconds |= report.seconds
        print(f"without any mutation: {sum(seconds.values()):.0f} s of tests", flush=True)
        outcomes = [(mutation, pool.submit(catch, mutation, seconds)) for mutation in chosen]
        for mutation, outcome in outcomes:
            try:
                failure, spent = outcome.result()
            except MutationError as error:
                broken.append(f"{mutation.name}: {error}")
                continue
            total += spent
            if failure is None:
                survived.append(mutation.name)
            print(f"{mutation.name:42} {spent:5.1f} s  {failure or 'SURVIVED'}", flush=True)
    minutes, each = (time.monotonic() - begin) / 60, total / len(chosen)
    caught = len(chosen) - len(survived) - len(broken)
    print(f"{caught} of {len(chosen)} caught in {minutes:.1f} min; {each:.1f} s of CPU each")
    if survived or broken:
        raise SystemExit("\n".join(["mutations: survived:", *survived, "", *broken]))


if __name__ == "__main__":
    main()
