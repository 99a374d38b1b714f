// The Python module `cogview_kernels._host_model`. Importing it registers the operators of
// csrc/operators for CPU tensors.

#include "../three_region_attention/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>

#include "report.h"
#include "runtime.h"

namespace py = pybind11;

namespace {

std::atomic<bool> run{true};

py::list take_report() {
  using namespace py::literals;
  py::list launches;
  for (const host_model::LaunchReport& report : host_model::take_report()) {
    py::dict buffers;
    for (const host_model::Traffic& traffic : report.buffers) {
      buffers[py::str(traffic.name)] = py::dict(
          "bytes_loaded"_a = traffic.bytes_loaded, "bytes_stored"_a = traffic.bytes_stored,
          "unique_loaded"_a = traffic.unique_loaded, "unique_stored"_a = traffic.unique_stored,
          "operator_unique_loaded"_a = traffic.operator_unique_loaded,
          "operator_unique_stored"_a = traffic.operator_unique_stored);
    }
    launches.append(py::dict("operator"_a = report.operator_name, "kernel"_a = report.kernel,
                             "grid"_a = py::make_tuple(report.grid_x, report.grid_y),
                             "threads"_a = report.threads, "static_shared"_a = report.static_shared,
                             "dynamic_shared"_a = report.dynamic_shared, "mma"_a = report.mma,
                             "barriers"_a = report.barriers,
                             "shared_accesses"_a = report.shared_accesses,
                             "bank_conflicts"_a = report.bank_conflicts, "buffers"_a = buffers));
  }
  return launches;
}

py::list take_recorded_launches() {
  using namespace py::literals;
  py::list launches;
  for (const host_model::RecordedLaunch& launch : host_model::take_recorded_launches()) {
    launches.append(py::dict("kernel"_a = launch.kernel, "params"_a = py::bytes(launch.params),
                             "grid"_a = py::make_tuple(launch.grid_x, launch.grid_y),
                             "threads"_a = launch.threads,
                             "dynamic_shared"_a = launch.dynamic_shared));
  }
  return launches;
}

}  // namespace

bool host_model::launches_run() { return run; }

PYBIND11_MODULE(_host_model, m) {
  m.def("take_report", &take_report,
        "What was counted in each launch since the last call (report.h): a list of dicts.");
  m.def("set_num_threads", &host_model::set_num_threads, py::arg("num_threads"),
        "Blocks run on so many threads of the CPU.");
  m.def("set_max_shared_bytes", &host_model::set_max_shared_bytes, py::arg("bytes"),
        "A block may have so much shared memory; 227 KB at first.");
  m.def(
      "set_launches", [](bool launches) { run = launches; }, py::arg("launches"),
      "Measuring equipment for host time. False: operators check their arguments, launch nothing "
      "and leave outputs as they were. True at first.");
  m.def(
      "record_launches",
      [](bool launches) {
        run = !launches;
        host_model::record_launches(launches);
      },
      py::arg("launches"), "True: launches are recorded and not run, as outputs show.");
  m.def("take_recorded_launches", &take_recorded_launches,
        "The launches that were recorded since the last call: a list of dicts.");
  cogview::define_three_region_attention(m);
}
