//! Locking where a panic under the lock leaves nothing half-done.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes the lock, whatever became of its last owner.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
