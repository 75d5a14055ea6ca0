//! One reading of a model for several walks at a time.
//!
//! Each walk reads its blocks itself, as they are needed on its own device and in its own coordinates;
//! here they are kept together, so that a block is in the system's memory still when the second walk
//! asks for it. A walk may be one block ahead of the others. Shards that are to go are given up by
//! the last that reads them.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::lock::lock;

/// Walks over one model that read it together.
#[derive(Debug)]
pub(crate) struct OneReading {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Debug)]
struct State {
    /// Blocks that each walk has read; `None` once it takes no part any more.
    read: Vec<Option<usize>>,
    /// Blocks that were given up.
    given_up: usize,
}

impl State {
    /// Blocks that every walk has read.
    fn by_all(&self) -> Option<usize> {
        self.read.iter().flatten().min().copied()
    }
}

/// A walk's place among those that are made at the same time from one reading.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seat<'a> {
    /// Its part in the reading.
    pub(crate) reader: &'a Reader<'a>,
    /// Held by the walk that computes: a device does one thing at a time.
    pub(crate) turn: &'a Mutex<()>,
}

impl<'a> Seat<'a> {
    /// Waits until the walk may use its device; nobody else does until the answer is dropped.
    pub(crate) fn turn(self) -> MutexGuard<'a, ()> {
        // It guards no data that a panic could have left half-changed.
        lock(self.turn)
    }
}

/// A walk's part in a reading. Dropped, it keeps nobody waiting.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    reading: &'a OneReading,
    walk: usize,
}

impl OneReading {
    /// Of so many walks. Each has to take its [`reader`](Self::reader) or be waited for.
    pub(crate) fn new(walks: usize) -> Self {
        let state = State { read: vec![Some(0); walks], given_up: 0 };
        Self { state: Mutex::new(state), moved: Condvar::new() }
    }

    /// The part of the walk of this number.
    pub(crate) fn reader(&self, walk: usize) -> Reader<'_> {
        Reader { reading: self, walk }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Counts are changed in one step each: a panic leaves none half-changed.
        lock(&self.state)
    }
}

impl Reader<'_> {
    /// Reads block `index`, blocks being read in order, once all walks have read the one before it.
    /// `give_up` is called for every block that all have read.
    pub(crate) fn block<T, E>(
        &self,
        index: usize,
        load: impl FnOnce() -> Result<T, E>,
        give_up: impl Fn(usize) -> Result<(), E>,
    ) -> Result<T, E> {
        let behind = |state: &mut State| state.by_all().is_some_and(|all| all < index);
        let waited = self.reading.moved.wait_while(self.reading.lock(), behind);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        let loaded = load()?;
        let mut state = self.reading.lock();
        if let Some(read) = state.read.get_mut(self.walk) {
            *read = Some(index + 1);
        }
        self.reading.moved.notify_all();
        while state.by_all().is_some_and(|all| state.given_up < all) {
            give_up(state.given_up)?;
            state.given_up += 1;
        }
        Ok(loaded)
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        if let Some(read) = self.reading.lock().read.get_mut(self.walk) {
            *read = None;
        }
        self.reading.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn no_walk_is_two_blocks_ahead_and_the_last_gives_up() {
        let reading = OneReading::new(3);
        let (sender, events) = channel();
        thread::scope(|scope| {
            for walk in 0..3 {
                let (reading, sender) = (&reading, sender.clone());
                scope.spawn(move || {
                    let reader = reading.reader(walk);
                    for index in 0..40 {
                        let send = |block, walk| -> Result<(), Infallible> {
                            sender.send((block, walk)).unwrap();
                            Ok(())
                        };
                        let load = || send(index, Some(walk));
                        reader.block(index, load, |block| send(block, None)).unwrap();
                    }
                });
            }
        });
        drop(sender);
        let (mut read, mut given_up) = ([0; 3], 0);
        for (index, walk) in events {
            match walk {
                Some(walk) => {
                    assert_eq!(read[walk], index);
                    read[walk] += 1;
                    assert!(read[walk] <= read.iter().min().unwrap() + 1, "{read:?}");
                }
                None => {
                    assert!(read.iter().all(|&read| read > index), "{read:?} {index}");
                    assert_eq!(given_up, index);
                    given_up += 1;
                }
            }
        }
        assert_eq!((read, given_up), ([40; 3], 40));
    }

    #[test]
    fn a_walk_that_ends_keeps_nobody_waiting() {
        let reading = OneReading::new(2);
        let gone = Mutex::new(Vec::new());
        let read = |reader: &Reader<'_>, index| {
            let give_up = |block| -> Result<(), Infallible> {
                gone.lock().unwrap().push(block);
                Ok(())
            };
            reader.block(index, || Ok(()), give_up).unwrap();
        };
        let (first, second) = (reading.reader(0), reading.reader(1));
        read(&first, 0);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| (1..4).for_each(|index| read(&first, index)));
            thread::sleep(std::time::Duration::from_millis(50));
            assert!(!waiting.is_finished());
            drop(second);
        });
        // What nobody else will read is given up as well.
        assert_eq!(*gone.lock().unwrap(), [0, 1, 2, 3]);
    }

    #[test]
    fn a_block_that_cannot_be_read_is_not_counted() {
        let reading = OneReading::new(1);
        let reader = reading.reader(0);
        let failed = reader.block(0, || Err::<(), _>("no"), |_| Ok(()));
        assert_eq!(failed, Err("no"));
        assert_eq!(reading.lock().read, [Some(0)]);
    }
}
