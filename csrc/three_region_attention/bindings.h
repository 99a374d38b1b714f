// What Python asks about the attention kernels: the same functions in `_C` and in `_host_model`.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "three_region_attention.h"

namespace cogview {

inline std::optional<std::string> unsupported_by_name(const std::string& dtype, int head_dim,
                                                      int major, int minor) {
  ThreeRegionProblem problem = {};
  if (dtype == "float16") {
    problem.dtype = DType::kFloat16;
  } else if (dtype == "bfloat16") {
    problem.dtype = DType::kBFloat16;
  } else {
    return "the kernels take float16 and bfloat16, got " + dtype;
  }
  problem.head_dim = head_dim;
  return three_region_attention_unsupported(problem, {major, minor});
}

inline int split_rows(int k_len, int num_pivots) {
  ThreeRegionProblem problem = {};
  problem.k_len = k_len;
  problem.num_pivots = num_pivots;
  return three_region_attention_split_rows(problem);
}

inline int forward_splits(int batch, int num_heads, int num_kv_heads, int q_len, int k_len,
                          int num_pivots, int window, bool has_kv_lens, int num_sms) {
  ThreeRegionProblem problem = {};
  problem.batch = batch;
  problem.num_heads = num_heads;
  problem.num_kv_heads = num_kv_heads;
  problem.q_len = q_len;
  problem.k_len = k_len;
  problem.num_pivots = num_pivots;
  problem.query_window = window;
  problem.num_windows = 1;
  return three_region_attention_forward_splits(problem, has_kv_lens, num_sms);
}

inline void define_three_region_attention(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("three_region_attention_unsupported", &unsupported_by_name, py::arg("dtype"),
        py::arg("head_dim"), py::arg("major"), py::arg("minor"),
        "Why no kernel takes the problem on a GPU of this compute capability; None if one does.");
  m.def("three_region_attention_split_rows", &split_rows, py::arg("k_len"), py::arg("num_pivots"),
        "Rows of the backward's `partial` for each split, batch and head.");
  m.def("three_region_attention_forward_splits", &forward_splits, py::arg("batch"),
        py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("q_len"), py::arg("k_len"),
        py::arg("num_pivots"), py::arg("window"), py::arg("has_kv_lens"), py::arg("num_sms"),
        "Into how many parts a forward splits the keys of few queries; 1: not at all.");
}

}  // namespace cogview
