//! How work is cut into parts: by the shapes alone, so that results do not depend on the number of threads.

/// Elements of a part: enough to be worth a task, few enough to lie in the nearest caches.
pub(super) const ELEMENTS: usize = 1 << 14;

/// Rows of a part where a row has `width` elements.
pub(super) fn rows(width: usize) -> usize {
    (ELEMENTS / width.max(1)).max(1)
}
