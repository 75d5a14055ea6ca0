//! How the other ranks find rank 0, which listens in `meeting.rs`: each calls until the one that
//! answers is of its own run.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use super::abort::TICK;
use super::greeting::{Answer, Greeting, RunDigest, Verdict};
use super::launch::Launch;
use super::meeting::{GREETING_TIME, MOST_REASONS, Met, addresses};
use super::run_id::Place;
use crate::error::{Error, Result};

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
pub(super) fn answer(stream: &mut TcpStream, end: Instant) -> io::Result<Option<Answer>> {
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
