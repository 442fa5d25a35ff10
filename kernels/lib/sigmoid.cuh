// σ(z) = 1 / (1 + e^−z).
#pragma once

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + __expf(-z)); }
