// The instructions of instructions/sm90.cuh on the CPU. Launches run one after another, so that a
// kernel that starts early finds all of the one before it. What it may do is checked: a thread that
// touches global memory, or returns, has waited.
#pragma once

#include "common.h"

namespace host_model {

void griddepcontrol_wait();

}  // namespace host_model

namespace cogview {

__forceinline__ void griddepcontrol_wait() { host_model::griddepcontrol_wait(); }
__forceinline__ void griddepcontrol_launch_dependents() {}

}  // namespace cogview
