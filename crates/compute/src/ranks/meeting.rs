//! How the processes of a run find each other: rank 0 listens, the others call.
//!
//! Rank 0's port may be open to a network, so every caller is a stranger until its greeting says
//! otherwise. Strangers are turned away and counted; none of them ends the run, holds up another, or
//! takes a seat. A rank that is turned away, or reaches something else, tries again: what listens at
//! the port may be the end of an earlier run.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::greeting::{Answer, Greeting, RunDigest, Verdict};
use super::run_id::Place;
use super::{Launch, TICK};
use crate::error::{Error, Result};

/// Time for a whole greeting or answer, and for a connection to come about.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// Callers that are listened to at once, and taken in one look at the port.
const MOST_CALLERS: usize = 1024;
const AT_ONCE: usize = 64;
/// Strangers whom a message names.
const MOST_REASONS: usize = 4;
/// Ranks that a message names.
const MOST_NAMED: usize = 8;
/// How long rank 0 waits before it says for whom.
const QUIET: Duration = Duration::from_secs(5);

/// The streams to the other ranks, by rank, and who was turned away on the way.
pub(super) struct Met {
    pub(super) streams: BTreeMap<usize, TcpStream>,
    pub(super) strangers: Option<String>,
}

/// Rank 0: waits for all others. `say` is told once for whom, when it takes a while.
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

/// Why a call to rank 0 came to nothing.
enum Refusal {
    /// That may be different soon.
    Again(String),
    Final(Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Again(error.to_string())
    }
}

/// Another rank: the stream to rank 0.
pub(super) fn call(launch: &Launch) -> Result<Met> {
    let Launch { rank, port, patience, .. } = launch;
    let end = Instant::now() + *patience;
    // Each once: what was refused first says more than that nobody listens any more.
    let mut reasons: Vec<String> = Vec::new();
    let place = if launch.run_id.is_none() { Some(Place::new(*port)?) } else { None };
    let stream = loop {
        match attempt(launch, place.as_ref()) {
            Ok(stream) => break stream,
            Err(Refusal::Final(error)) => return Err(error),
            Err(Refusal::Again(why)) if !reasons.contains(&why) && reasons.len() < MOST_REASONS => {
                reasons.push(why);
            }
            Err(Refusal::Again(_)) => {}
        }
        if Instant::now() + TICK > end {
            return Err(Error::ranks(format!(
                "Rank {rank} has tried for {} s to reach rank 0 at {}: {}",
                patience.as_secs(),
                launch.meeting_place(),
                reasons.join("; ")
            )));
        }
        std::thread::sleep(TICK);
    };
    Ok(Met { streams: BTreeMap::from([(0, stream)]), strangers: None })
}

fn attempt(launch: &Launch, place: Option<&Place>) -> std::result::Result<TcpStream, Refusal> {
    let Launch { rank, host, port, patience, .. } = launch;
    let addresses = addresses(host, *port)?;
    let id = match (&launch.run_id, place) {
        (Some(id), _) => id.clone(),
        (None, Some(place)) if addresses.iter().any(is_here) => {
            place.find().map_err(Refusal::Again)?
        }
        (None, _) => {
            return Err(Refusal::Final(Error::Ranks {
                message: format!(
                    "Rank {rank} is on another host than rank 0 (`{host}`), and the launcher gives \
                     the run no id"
                ),
                advice: Some("set GPTQ_RUN_ID to the same text for all ranks"),
            }));
        }
    };
    let greeting = Greeting::new(*rank as u32, RunDigest::of(&id));
    let mut stream = connect(&addresses)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(GREETING_TIME))?;
    stream.write_all(&greeting.to_bytes())?;
    let heard = answer(&mut stream, Instant::now() + GREETING_TIME)?;
    let Some(Answer { verdict, size, version }) = heard else {
        return Err(Refusal::Again("what listens there is no rank 0".to_owned()));
    };
    let refused = |what: String| Err(Refusal::Final(Error::ranks(what)));
    match verdict {
        Verdict::Admitted => {}
        Verdict::Begin | Verdict::OtherRun => {
            let why = "what listens there is rank 0 of another run";
            return Err(Refusal::Again(why.to_owned()));
        }
        Verdict::Taken => {
            let why = format!("another process says that it is rank {rank}");
            return Err(Refusal::Again(why));
        }
        Verdict::OtherVersion => {
            let ours = greeting.version;
            return refused(format!("Rank {rank} is of version {ours}, and rank 0 of {version}"));
        }
        Verdict::NoSuchRank => {
            return refused(format!(
                "Rank {rank} is none of the {size} ranks that rank 0 waits for"
            ));
        }
    }
    // Rank 0 says more when all are there. It may have started later, and so waits longer.
    let left = |error: &dyn std::fmt::Display| {
        Refusal::Final(Error::Ranks {
            message: format!(
                "Rank {rank} has reached rank 0 at {}, which did not go on: {error}",
                launch.meeting_place()
            ),
            advice: Some("see rank 0's own message"),
        })
    };
    match answer(&mut stream, Instant::now() + *patience + GREETING_TIME) {
        Ok(Some(Answer { verdict: Verdict::Begin, .. })) => Ok(stream),
        Ok(_) => Err(left(&"it spoke of something else")),
        Err(error) => Err(left(&error)),
    }
}

/// What rank 0 says until `end`; `None` for what is no answer.
fn answer(stream: &mut TcpStream, end: Instant) -> io::Result<Option<Answer>> {
    let mut bytes = [0; Answer::LENGTH];
    let mut heard = 0;
    while heard < bytes.len() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes[heard..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => heard += count,
            Err(error)
                if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Answer::parse(&bytes))
}

fn addresses(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}

/// True for an address of this host.
fn is_here(address: &SocketAddr) -> bool {
    std::net::UdpSocket::bind((address.ip(), 0)).is_ok()
}

fn connect(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match TcpStream::connect_timeout(address, GREETING_TIME) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
#[path = "meeting_tests.rs"]
mod tests;
