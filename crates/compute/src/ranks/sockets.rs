//! Ranks that are processes: rank 0 listens, the others call, and words travel in frames.
//!
//! Each connection has a thread for either direction, so that sending never waits. A frame that says
//! nothing is sent every few seconds: a peer from which nothing comes for a minute is lost, as is one
//! whose connection ends without a farewell. Rank 0 passes the news of a loss on to all others.
//!
//! This file and `mod.rs` know each other, as no other two of this crate do: [`RankHandle`] is the door
//! to the ranks of either kind, so it opens this one, and what comes out is a `RankHandle`.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::abort::{Abort, TICK};
use super::calling;
use super::frames::{Frame, Limit, Message};
use super::launch::Launch;
use super::meeting::{self, Met};
use super::{RankHandle, Wire};
use crate::error::{Error, Result};

/// Time between signs of life, and the silence after which a peer is lost.
const BEAT: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_secs(60);

/// The threads that write to the peers. Dropping ends them when what was sent has left.
pub(super) struct Pumps {
    writers: Vec<JoinHandle<()>>,
    closing: Arc<AtomicBool>,
}

impl Drop for Pumps {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        for writer in self.writers.drain(..) {
            // It ends when its messages have left, or its peer has.
            let _ = writer.join();
        }
    }
}

/// Connects to rank 0, or as rank 0 to all others; `announce` hears of it when that takes a while.
pub(super) fn join(launch: &Launch, announce: &dyn Fn(&str)) -> Result<RankHandle> {
    let Launch { rank, size, .. } = *launch;
    if rank >= size {
        return Err(Error::ranks(format!("Rank {rank} is not one of {size} ranks")));
    }
    if size > Launch::MOST_RANKS {
        let most = Launch::MOST_RANKS;
        return Err(Error::ranks(format!("A run has at most {most} ranks, not {size}")));
    }
    if size == 1 {
        return Ok(RankHandle::alone());
    }
    let met = if rank == 0 { meeting::listen(launch, announce)? } else { calling::call(launch)? };
    let Met { streams, strangers } = met;
    let limit = Arc::<Limit>::default();
    let abort = Arc::<Abort>::default();
    let mut wires = BTreeMap::new();
    let mut writers = Vec::new();
    let closing = Arc::<AtomicBool>::default();
    for (peer, stream) in streams {
        let ((out, outgoing), (incoming, inward)) = (channel(), channel());
        let reader = stream
            .set_write_timeout(Some(SILENCE))
            .and_then(|()| stream.try_clone())
            .map_err(|e| launch.trouble(peer, &e))?;
        let (for_reader, for_writer) = (Arc::clone(&abort), Arc::clone(&abort));
        let limit = Arc::clone(&limit);
        // Not waited for: it may hear from its peer until the process ends.
        std::thread::spawn(move || {
            read_frames(reader, (peer, size), &incoming, (&for_reader, &limit));
        });
        let closing = Arc::clone(&closing);
        writers.push(std::thread::spawn(move || {
            write_frames(stream, peer, &outgoing, (&for_writer, &closing));
        }));
        wires.insert(peer, Wire { out, inward: Mutex::new(inward) });
    }
    let pumps = Some(Pumps { writers, closing });
    Ok(RankHandle { rank, size, wires, abort, limit: Some(limit), sockets: pumps, strangers })
}

/// Writes messages until their sender is gone or the run is closed, then a farewell.
fn write_frames(
    mut stream: TcpStream,
    peer: usize,
    messages: &Receiver<Message>,
    (abort, closing): (&Abort, &AtomicBool),
) {
    let mut written = Instant::now();
    let mut announced = false;
    loop {
        let sent = match messages.recv_timeout(TICK) {
            Ok(message) => Frame::Data(message).write(&mut stream),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if closing.load(Ordering::Relaxed) => break,
            Err(RecvTimeoutError::Timeout) => match abort.lost() {
                Some(rank) if !announced => {
                    announced = true;
                    Frame::Lost(rank as u64).write(&mut stream)
                }
                _ if written.elapsed() > BEAT => Frame::Alive.write(&mut stream),
                _ => continue,
            },
        };
        if sent.is_err() {
            // The reader says why, if the peer has not taken its leave.
            return abort.raise(peer);
        }
        written = Instant::now();
    }
    let last = match abort.lost() {
        Some(rank) if !announced => Frame::Lost(rank as u64).write(&mut stream),
        Some(_) => Ok(()),
        None => Frame::Farewell.write(&mut stream),
    };
    // A peer that is gone needs no farewell.
    let _ = last.and_then(|()| stream.flush());
    let _ = stream.shutdown(std::net::Shutdown::Write);
}

/// Reads frames until the peer's farewell; anything else that ends them is a loss.
fn read_frames(
    mut stream: TcpStream,
    (peer, size): (usize, usize),
    messages: &Sender<Message>,
    (abort, limit): (&Abort, &Limit),
) {
    if stream.set_read_timeout(Some(SILENCE)).is_err() {
        return abort.raise(peer);
    }
    loop {
        match Frame::read(&mut stream, limit) {
            Ok(Frame::Data(message)) => {
                // Nobody waits for what comes after an error of this rank's own.
                let _ = messages.send(message);
            }
            Ok(Frame::Alive) => {}
            Ok(Frame::Farewell) => return,
            Ok(Frame::Lost(rank)) if rank < size as u64 => return abort.raise(rank as usize),
            Ok(Frame::Lost(_)) | Err(_) => return abort.raise(peer),
        }
    }
}
