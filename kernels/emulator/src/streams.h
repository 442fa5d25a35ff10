// Work in streams. In the eager mode it is done when the call returns; in the lazy one when somebody waits for it, which
// is when a real device may do it at the latest; in the random one at either time.
#pragma once
#include "errors.h"
#include <functional>

namespace emulator {

/// Does `work` in its turn in the stream of this handle: now, or when the stream is waited for.
Result in_stream(void* stream, std::function<Result()> work);
/// Does all that the stream, or every stream, still has to do; the first error since the last time.
Result finish(void* stream);
Result finish_all();
/// Does it too, and leaves the errors to those who wait for them.
void run_all();
/// Whether work may still be undone when a call returns, by the calling host thread's mode.
bool deferred();

} // namespace emulator
