// Included before every kernel file, which is then compiled inside a namespace of its own: on the device two kernel
// files may each have a `Shared` or a helper of the same name, and so they may here.
#pragma once
#include "cuda_bf16.h"
#include "kernel_twins.h"
#include "ptx_sm90_twins.h"
