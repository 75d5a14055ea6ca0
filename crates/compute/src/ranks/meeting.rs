//! How the processes of a run find each other: rank 0 listens here, the others call (`calling.rs`).
//!
//! Rank 0's port may be open to a network, so every caller is a stranger until its greeting says
//! otherwise. Strangers are turned away and counted; none of them ends the run, holds up another, or
//! takes a seat. A rank that is turned away, or reaches something else, tries again: what listens at
//! the port may be the end of an earlier run.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::abort::TICK;
use super::greeting::{Answer, Greeting, RunDigest, Verdict};
use super::launch::Launch;
use super::run_id::Place;
use crate::error::{Error, Result};

/// Time for a whole greeting or answer, and for a connection to come about.
pub(super) const GREETING_TIME: Duration = Duration::from_secs(5);
/// Callers that are listened to at once, and taken in one look at the port.
const MOST_CALLERS: usize = 1024;
const AT_ONCE: usize = 64;
/// Strangers whom a message names.
pub(super) const MOST_REASONS: usize = 4;
/// Ranks that a message names.
const MOST_NAMED: usize = 8;
/// How long rank 0 waits before it says for whom.
const QUIET: Duration = Duration::from_secs(5);

/// The streams to the other ranks, by rank, and who was turned away on the way.
pub(super) struct Met {
    pub(super) streams: BTreeMap<usize, TcpStream>,
    pub(super) strangers: Option<String>,
}

/// Rank 0: waits for all others. `announce` hears once for whom, when it takes a while.
pub(super) fn listen(launch: &Launch, announce: &dyn Fn(&str)) -> Result<Met> {
    let start = Instant::now();
    let end = start + launch.patience;
    let mut announced = false;
    let listeners = bind(launch)?;
    // Given up before the port is, which is what makes its place this run's own.
    let mut drawn = None;
    let id = match &launch.run_id {
        Some(id) => id,
        None => &drawn.insert(Place::new(launch.port)?.publish()?).id,
    };
    let mut reception = Reception::new(launch.size, RunDigest::of(id));
    while !reception.is_complete() {
        for listener in &listeners {
            reception.admit(listener);
        }
        reception.hear();
        reception.look_at_admitted();
        if Instant::now() > end {
            return Err(Error::ranks(reception.missing(launch)));
        }
        if !announced && start.elapsed() > QUIET {
            announced = true;
            announce(&reception.waiting(launch));
        }
        std::thread::sleep(TICK / 10);
    }
    reception.begin(launch)
}

/// Everything that listens to what MASTER_ADDR names.
fn bind(launch: &Launch) -> Result<Vec<TcpListener>> {
    let Launch { host, port, .. } = launch;
    let resolved = addresses(host, *port).map_err(|error| {
        Error::ranks(format!(
            "Rank 0 cannot listen at `{host}`: the name does not resolve: {error}"
        ))
    })?;
    let mut last = io::Error::from(ErrorKind::AddrNotAvailable);
    let mut wanted = places(host, &resolved);
    loop {
        let mut listeners = Vec::new();
        for place in &wanted {
            match TcpListener::bind((*place, *port))
                .and_then(|l| l.set_nonblocking(true).map(|()| l))
            {
                Ok(listener) => listeners.push(listener),
                // Two systems of addresses may share one socket.
                Err(_) if place.is_unspecified() && !listeners.is_empty() => {}
                Err(error) => last = error,
            }
        }
        if !listeners.is_empty() && last.kind() != ErrorKind::AddrInUse {
            return Ok(listeners);
        }
        // An address that is none of this host's may still lead here, as a service's does.
        if last.kind() == ErrorKind::AddrNotAvailable && wanted != ANY {
            wanted = ANY.to_vec();
            continue;
        }
        let taken = last.kind() == ErrorKind::AddrInUse;
        return Err(Error::Ranks {
            message: format!(
                "Rank 0 cannot listen on port {port} of `{host}` for the other ranks: {last}"
            ),
            advice: taken.then_some("set MASTER_PORT to another, as another run may be using it"),
        });
    }
}

/// Every address of this host. The first takes calls by IPv4 as well, on most systems.
const ANY: [IpAddr; 2] = [IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)];

/// Where rank 0 listens for a host of these addresses.
///
/// Nowhere but where the others call: what is not listened to need not be defended. One case is
/// different. Debian gives a machine's own name the address 127.0.1.1 in its /etc/hosts, while other
/// machines know it by a real one. Rank 0 cannot tell by which it will be called, so where a name
/// that is not `localhost` leads to this machine's loopback alone, it listens on all of them.
fn places(host: &str, resolved: &[SocketAddr]) -> Vec<IpAddr> {
    let mut places: Vec<IpAddr> = Vec::new();
    for ip in resolved.iter().map(SocketAddr::ip) {
        if !places.contains(&ip) {
            places.push(ip);
        }
    }
    let literal = host.parse::<IpAddr>().is_ok() || host.eq_ignore_ascii_case("localhost");
    let loopback = places.iter().all(IpAddr::is_loopback);
    if loopback && !literal { ANY.to_vec() } else { places }
}

/// A connection whose greeting is not whole.
struct Caller {
    stream: TcpStream,
    from: SocketAddr,
    heard: Vec<u8>,
    until: Instant,
}

/// Whom rank 0 has seated, is listening to, and has turned away.
struct Reception {
    run: RunDigest,
    /// Number of ranks, rank 0 included.
    size: usize,
    streams: BTreeMap<usize, TcpStream>,
    callers: Vec<Caller>,
    turned_away: usize,
    reasons: Vec<String>,
    /// Why connections could not be taken.
    trouble: Option<io::Error>,
}

impl Reception {
    fn new(size: usize, run: RunDigest) -> Self {
        let (streams, callers, reasons) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { run, size, streams, callers, turned_away: 0, reasons, trouble: None }
    }

    fn is_complete(&self) -> bool {
        self.streams.len() + 1 == self.size
    }

    /// Takes the connections that wait, though not for ever.
    fn admit(&mut self, listener: &TcpListener) {
        for _ in 0..AT_ONCE {
            let taken = listener.accept().and_then(|(stream, from)| {
                stream.set_nonblocking(true)?;
                Ok((stream, from))
            });
            match taken {
                Ok((stream, from)) => {
                    if self.callers.len() == MOST_CALLERS {
                        let oldest = self.callers.remove(0);
                        self.turn_away(oldest.from, "held a connection while many others called");
                    }
                    let until = Instant::now() + GREETING_TIME;
                    self.callers.push(Caller { stream, from, heard: Vec::new(), until });
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // A connection that is gone again, or too many open files: neither is the run's end.
                Err(error) => {
                    self.trouble = Some(error);
                    return;
                }
            }
        }
    }

    /// Reads what callers say, without waiting for any of them.
    fn hear(&mut self) {
        for mut caller in std::mem::take(&mut self.callers) {
            match hear(&mut caller) {
                Heard::Nothing => self.callers.push(caller),
                Heard::Stranger(what) => self.turn_away(caller.from, what),
                Heard::Greeting(greeting) => self.judge(caller, &greeting),
            }
        }
    }

    fn judge(&mut self, caller: Caller, greeting: &Greeting) {
        let rank = greeting.rank as usize;
        let ours = Greeting::new(greeting.rank, self.run);
        let verdict = if greeting.run != ours.run {
            Verdict::OtherRun
        } else if greeting.version != ours.version {
            Verdict::OtherVersion
        } else {
            match rank {
                _ if rank >= self.size => Verdict::NoSuchRank,
                0 => Verdict::Taken,
                _ if self.streams.contains_key(&rank) => Verdict::Taken,
                _ => Verdict::Admitted,
            }
        };
        let Caller { mut stream, from, .. } = caller;
        // So little fits into what a connection sends by itself; a caller that is gone is found
        // later.
        let _ = stream.write(&self.answer(verdict));
        let what = match verdict {
            Verdict::Admitted | Verdict::Begin => {
                self.streams.insert(rank, stream);
                return;
            }
            Verdict::OtherRun => "belongs to another run".to_owned(),
            Verdict::OtherVersion => {
                format!(
                    "is rank {rank} of version {}, and rank 0 is of {}",
                    greeting.version, ours.version
                )
            }
            Verdict::NoSuchRank => format!("says that it is rank {rank} of {}", self.size),
            Verdict::Taken => format!("says that it is rank {rank} as another process does"),
        };
        self.turn_away(from, &what);
    }

    fn answer(&self, verdict: Verdict) -> Vec<u8> {
        Answer::new(verdict, self.size as u32).to_bytes()
    }

    /// Gives up the seats of ranks that have left again. A seated rank has nothing to say yet.
    fn look_at_admitted(&mut self) {
        let left = self.streams.extract_if(.., |_, stream| {
            !matches!(
                stream.peek(&mut [0]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
            )
        });
        for (rank, _) in left.collect::<Vec<_>>() {
            self.turned_away += 1;
            self.announce(format!("rank {rank} left before all were there"));
        }
    }

    fn turn_away(&mut self, from: SocketAddr, what: &str) {
        self.turned_away += 1;
        self.announce(format!("{from} {what}"));
    }

    fn announce(&mut self, what: String) {
        if self.reasons.len() < MOST_REASONS {
            self.reasons.push(what);
        }
    }

    fn strangers(&self) -> Option<String> {
        let count = self.turned_away;
        let more = count - self.reasons.len();
        let more = if more > 0 { format!("; {more} more") } else { String::new() };
        let calls = if count == 1 { "1 call".to_owned() } else { format!("{count} calls") };
        (count > 0)
            .then(|| format!("rank 0 turned away {calls}: {}{more}", self.reasons.join("; ")))
    }

    /// The ranks that are not there.
    fn absent(&self) -> String {
        let absent = (1..self.size).filter(|rank| !self.streams.contains_key(rank));
        let named: Vec<String> = absent.take(MOST_NAMED).map(|rank| rank.to_string()).collect();
        let others = self.size - 1 - self.streams.len() - named.len();
        let others = if others > 0 { format!(" and {others} others") } else { String::new() };
        format!("{}{others}", named.join(", "))
    }

    fn waiting(&self, launch: &Launch) -> String {
        format!(
            "rank 0 is waiting for rank {} of {} at {}, for up to {} s",
            self.absent(),
            self.size,
            launch.meeting_place(),
            launch.patience.as_secs()
        )
    }

    fn missing(&self, launch: &Launch) -> String {
        let (absent, size, place) = (self.absent(), self.size, launch.meeting_place());
        let mut text = format!(
            "Rank 0 has waited {} s on {place} for rank {absent} of {size}: are all started, and can \
             they reach this host?",
            launch.patience.as_secs(),
        );
        let strangers = self.strangers().map(|strangers| format!(" Meanwhile {strangers}."));
        let trouble =
            self.trouble.as_ref().map(|e| format!(" A connection could not be taken: {e}."));
        text.extend(strangers.into_iter().chain(trouble));
        text
    }

    /// Tells all ranks that all are there.
    fn begin(self, launch: &Launch) -> Result<Met> {
        let begin = self.answer(Verdict::Begin);
        for (&rank, mut stream) in &self.streams {
            let sent = stream
                .set_nonblocking(false)
                .and_then(|()| stream.set_nodelay(true))
                .and_then(|()| stream.set_write_timeout(Some(GREETING_TIME)))
                .and_then(|()| stream.write_all(&begin));
            sent.map_err(|e| launch.trouble(rank, &e))?;
        }
        let strangers = self.strangers();
        Ok(Met { streams: self.streams, strangers })
    }
}

/// What a caller has said.
enum Heard {
    Nothing,
    Greeting(Greeting),
    Stranger(&'static str),
}

fn hear(caller: &mut Caller) -> Heard {
    let mut bytes = [0; Greeting::LENGTH];
    loop {
        let missing = Greeting::LENGTH - caller.heard.len();
        match caller.stream.read(&mut bytes[..missing]) {
            Ok(0) => return Heard::Stranger("left without a greeting"),
            Ok(count) => caller.heard.extend(&bytes[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                return match Instant::now() < caller.until {
                    true => Heard::Nothing,
                    false => Heard::Stranger("did not greet in time"),
                };
            }
            Err(_) => return Heard::Stranger("left without a greeting"),
        }
        if !Greeting::may_begin(&caller.heard) {
            return Heard::Stranger("spoke of something else");
        }
        if let Ok(whole) = caller.heard.as_slice().try_into() {
            return match Greeting::parse(whole) {
                Some(greeting) => Heard::Greeting(greeting),
                None => Heard::Stranger("spoke of something else"),
            };
        }
    }
}

pub(super) fn addresses(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}

#[cfg(test)]
#[path = "meeting_tests.rs"]
mod tests;
