//! Ranks that are processes: rank 0 listens, the others call, and words travel in frames.
//!
//! Each connection has a thread for either direction, so that sending never waits. A frame that says
//! nothing is sent every few seconds: a peer from which nothing comes for a minute is lost, as is one
//! whose connection ends without a farewell. Rank 0 passes the news of a loss on to all others.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::alarm::Alarm;
use super::{Message, Seat, TICK, Wire};
use crate::error::{Error, Result};

/// What a process says first, before its version, rank and number of ranks.
const GREETING: &[u8; 8] = b"gptqrank";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Time between signs of life, and the silence after which a peer is lost.
const BEAT: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_secs(60);
/// Time for a greeting: whoever else connects must not hold up the ranks.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// Most words of a frame's part: what is longer is no frame of ours.
const MOST_WORDS: u64 = 1 << 34;

const DATA: u8 = 0;
const ALIVE: u8 = 1;
const FAREWELL: u8 = 2;
const LOST: u8 = 3;

/// What a launcher tells each of the processes that it starts.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Number of this process.
    pub rank: usize,
    /// Number of processes.
    pub size: usize,
    /// Host of rank 0.
    pub host: String,
    /// Port on which rank 0 listens.
    pub port: u16,
    /// How long to wait for the others.
    pub patience: Duration,
}

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

/// Connects to rank 0, or as rank 0 to all others.
pub(super) fn join(launch: &Launch) -> Result<Seat> {
    let Launch { rank, size, .. } = *launch;
    if size == 1 {
        return Ok(Seat::alone());
    }
    if rank >= size {
        return Err(Error::Ranks(format!("Rank {rank} is not one of {size} ranks")));
    }
    let streams = if rank == 0 { listen(launch)? } else { call(launch)? };
    let alarm = Arc::<Alarm>::default();
    let mut wires = Vec::with_capacity(size);
    let mut writers = Vec::new();
    let closing = Arc::<AtomicBool>::default();
    for (peer, stream) in streams.into_iter().enumerate() {
        let Some(stream) = stream else {
            wires.push(None);
            continue;
        };
        let ((out, outgoing), (incoming, inward)) = (channel(), channel());
        let reader = stream
            .set_write_timeout(Some(SILENCE))
            .and_then(|()| stream.try_clone())
            .map_err(|e| trouble(launch, peer, &e))?;
        let (for_reader, for_writer) = (Arc::clone(&alarm), Arc::clone(&alarm));
        // Not waited for: it may hear from its peer until the process ends.
        std::thread::spawn(move || read_frames(reader, peer, &incoming, &for_reader));
        let closing = Arc::clone(&closing);
        writers.push(std::thread::spawn(move || {
            write_frames(stream, peer, &outgoing, (&for_writer, &closing));
        }));
        wires.push(Some(Wire { out, inward: Mutex::new(inward) }));
    }
    Ok(Seat { rank, size, wires, alarm, sockets: Some(Pumps { writers, closing }) })
}

fn trouble(launch: &Launch, peer: usize, error: &io::Error) -> Error {
    let Launch { rank, host, port, .. } = launch;
    Error::Ranks(format!("Rank {rank} cannot talk to rank {peer} through {host}:{port}: {error}"))
}

/// Rank 0: a stream for each other rank.
fn listen(launch: &Launch) -> Result<Vec<Option<TcpStream>>> {
    let Launch { size, host, port, patience, .. } = launch;
    let fails = |error: &io::Error| {
        Error::Ranks(format!("Rank 0 cannot listen on port {port} for the other ranks: {error}"))
    };
    // Its own name may resolve to an address that others cannot reach it by, so it listens on all,
    // unless all ranks are here.
    let local = addresses(host, *port).is_ok_and(|all| all.iter().all(|a| a.ip().is_loopback()));
    let address = if local { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
    let listener = TcpListener::bind((address, *port)).map_err(|e| fails(&e))?;
    listener.set_nonblocking(true).map_err(|e| fails(&e))?;
    let mut streams: Vec<Option<TcpStream>> = (0..*size).map(|_| None).collect();
    let end = Instant::now() + *patience;
    while streams[1..].iter().any(Option::is_none) {
        match listener.accept() {
            Ok((stream, _)) => match greeted(&stream, launch) {
                Ok(Some(peer)) if streams[peer].is_none() => streams[peer] = Some(stream),
                Ok(Some(peer)) => {
                    return Err(Error::Ranks(format!(
                        "Two processes say that they are rank {peer}"
                    )));
                }
                // Somebody else's connection.
                Ok(None) => {}
                Err(error) => return Err(error),
            },
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if Instant::now() > end {
                    let here = |peer: &usize| streams[*peer].is_none();
                    let missing: Vec<String> =
                        (1..*size).filter(here).map(|peer| peer.to_string()).collect();
                    return Err(Error::Ranks(format!(
                        "Rank 0 has waited {} s on {host}:{port} for rank {} of {size}: are all \
                         started, and can they reach this host?",
                        patience.as_secs(),
                        missing.join(", ")
                    )));
                }
                std::thread::sleep(TICK / 10);
            }
            Err(error) => return Err(fails(&error)),
        }
    }
    // Now that all are here, each is told so.
    for (peer, stream) in streams.iter_mut().enumerate().filter_map(|(p, s)| Some((p, s.as_mut()?)))
    {
        stream.write_all(GREETING).map_err(|e| trouble(launch, peer, &e))?;
    }
    Ok(streams)
}

/// The rank that a connection says it is; `None` when it is none of ours.
fn greeted(stream: &TcpStream, launch: &Launch) -> Result<Option<usize>> {
    let read = || -> io::Result<Option<(u64, u64, String)>> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(GREETING_TIME))?;
        let mut stream = stream;
        let mut head = [0; GREETING.len() + 24];
        stream.read_exact(&mut head)?;
        let (name, numbers) = head.split_at(GREETING.len());
        let number = |i: usize| numbers[8 * i..8 * (i + 1)].iter().rev();
        let number = |i| number(i).fold(0_u64, |n, &byte| n << 8 | u64::from(byte));
        if name != GREETING || number(2) > 64 {
            return Ok(None);
        }
        let mut version = vec![0; number(2) as usize];
        stream.read_exact(&mut version)?;
        Ok(Some((number(0), number(1), String::from_utf8_lossy(&version).into_owned())))
    };
    let Ok(Some((rank, size, version))) = read() else { return Ok(None) };
    let refused = |what: String| Err(Error::Ranks(what));
    if version != VERSION {
        return refused(format!("Rank {rank} runs version {version}, and rank 0 {VERSION}"));
    }
    if size != launch.size as u64 || rank == 0 || rank >= size {
        let here = launch.size;
        return refused(format!("A process is rank {rank} of {size}, and rank 0 is one of {here}"));
    }
    Ok(Some(rank as usize))
}

/// Another rank: the stream to rank 0.
fn call(launch: &Launch) -> Result<Vec<Option<TcpStream>>> {
    let Launch { rank, size, host, port, patience } = launch;
    let end = Instant::now() + *patience;
    let mut stream = loop {
        match connect(host, *port) {
            Ok(stream) => break stream,
            Err(_) if Instant::now() < end => std::thread::sleep(TICK),
            Err(error) => {
                return Err(Error::Ranks(format!(
                    "Rank {rank} has tried for {} s to reach rank 0 at {host}:{port}: {error}",
                    patience.as_secs()
                )));
            }
        }
    };
    let mut greeting = GREETING.to_vec();
    for number in [*rank, *size, VERSION.len()] {
        greeting.extend((number as u64).to_le_bytes());
    }
    greeting.extend(VERSION.as_bytes());
    let mut answer = [0; GREETING.len()];
    let answered = || -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.write_all(&greeting)?;
        // Rank 0 answers when all are there.
        stream.set_read_timeout(Some(*patience))?;
        stream.read_exact(&mut answer)
    };
    let answered = { answered }();
    if let Err(error) = answered {
        return Err(Error::Ranks(format!(
            "Rank {rank} has reached rank 0 at {host}:{port}, which did not go on: {error}; see its \
             own message"
        )));
    }
    if &answer != GREETING {
        return Err(Error::Ranks(format!(
            "What listens at {host}:{port} is no rank 0 of this run"
        )));
    }
    let mut streams: Vec<Option<TcpStream>> = (0..*size).map(|_| None).collect();
    streams[0] = Some(stream);
    Ok(streams)
}

fn addresses(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}

fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for address in addresses(host, port)? {
        match TcpStream::connect_timeout(&address, GREETING_TIME) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Writes messages until their sender is gone or the run is closed, then a farewell.
fn write_frames(
    mut stream: TcpStream,
    peer: usize,
    messages: &Receiver<Message>,
    (alarm, closing): (&Alarm, &AtomicBool),
) {
    let mut written = Instant::now();
    let mut told = false;
    loop {
        let sent = match messages.recv_timeout(TICK) {
            Ok(message) => write_data(&mut stream, &message),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if closing.load(Ordering::Relaxed) => break,
            Err(RecvTimeoutError::Timeout) => match alarm.lost() {
                Some(rank) if !told => {
                    told = true;
                    write_head(&mut stream, LOST, rank as u64)
                }
                _ if written.elapsed() > BEAT => write_head(&mut stream, ALIVE, 0),
                _ => continue,
            },
        };
        if sent.is_err() {
            // The reader says why, if the peer has not taken its leave.
            return alarm.raise(peer);
        }
        written = Instant::now();
    }
    let last = match alarm.lost() {
        Some(rank) if !told => write_head(&mut stream, LOST, rank as u64),
        Some(_) => Ok(()),
        None => write_head(&mut stream, FAREWELL, 0),
    };
    // A peer that is gone needs no farewell.
    let _ = last.and_then(|()| stream.flush());
    let _ = stream.shutdown(std::net::Shutdown::Write);
}

fn write_head(stream: &mut TcpStream, kind: u8, number: u64) -> io::Result<()> {
    let mut head = [kind; 9];
    head[1..].copy_from_slice(&number.to_le_bytes());
    stream.write_all(&head)
}

fn write_data(stream: &mut TcpStream, message: &Message) -> io::Result<()> {
    write_head(stream, DATA, message.len() as u64)?;
    for words in message {
        stream.write_all(&(words.len() as u64).to_le_bytes())?;
        stream.write_all(bytemuck::cast_slice(words))?;
    }
    Ok(())
}

/// Reads frames until the peer's farewell; anything else that ends them is a loss.
fn read_frames(mut stream: TcpStream, peer: usize, messages: &Sender<Message>, alarm: &Alarm) {
    if stream.set_read_timeout(Some(SILENCE)).is_err() {
        return alarm.raise(peer);
    }
    loop {
        match read_frame(&mut stream) {
            Ok(Frame::Data(message)) => {
                // Nobody waits for what comes after an error of this rank's own.
                let _ = messages.send(message);
            }
            Ok(Frame::Alive) => {}
            Ok(Frame::Farewell) => return,
            Ok(Frame::Lost(rank)) => return alarm.raise(rank),
            Err(_) => return alarm.raise(peer),
        }
    }
}

enum Frame {
    Data(Message),
    Alive,
    Farewell,
    Lost(usize),
}

fn read_frame(stream: &mut TcpStream) -> io::Result<Frame> {
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    let number = read_number(stream)?;
    match kind[0] {
        ALIVE => Ok(Frame::Alive),
        FAREWELL => Ok(Frame::Farewell),
        LOST => Ok(Frame::Lost(number as usize)),
        DATA => {
            let mut message = Vec::new();
            for _ in 0..number {
                let count = read_number(stream)?;
                if count > MOST_WORDS {
                    return Err(io::Error::from(ErrorKind::InvalidData));
                }
                let mut words = vec![0_u32; count as usize];
                stream.read_exact(bytemuck::cast_slice_mut(&mut words))?;
                message.push(words);
            }
            Ok(Frame::Data(message))
        }
        _ => Err(io::Error::from(ErrorKind::InvalidData)),
    }
}

fn read_number(stream: &mut TcpStream) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
