use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::Device;
use crate::ranks::{RankHandle, calling::answer, frames::Frame, greeting::VERSION};

const RUN: &str = "this run";

/// Ranks of a run at a free port: the system's choice, given back.
fn launches(size: usize, patience: Duration) -> Vec<Launch> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (host, run_id) = ("127.0.0.1".to_owned(), Some(RUN.to_owned()));
    let first = Launch { rank: 0, size, host, port, run_id, patience };
    (0..size).map(|rank| Launch { rank, ..first.clone() }).collect()
}

/// A connection to a rank 0 that has begun to listen.
fn stranger(launch: &Launch) -> TcpStream {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match TcpStream::connect((launch.host.as_str(), launch.port)) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Greets, and gives what rank 0 makes of it.
fn greet(launch: &Launch, greeting: &Greeting) -> (TcpStream, Verdict) {
    let mut stream = stranger(launch);
    stream.write_all(&greeting.to_bytes()).unwrap();
    let answer = answer(&mut stream, Instant::now() + Duration::from_secs(20)).unwrap();
    (stream, answer.unwrap().verdict)
}

fn of_run(rank: u32) -> Greeting {
    Greeting::new(rank, RunDigest::of(RUN))
}

/// Strangers of every kind call before rank 1 does; two of them stay on the line.
#[test]
fn strangers_take_no_seat_and_hold_nobody_up() {
    let launches = launches(2, Duration::from_secs(60));
    std::thread::scope(|scope| {
        let first = scope.spawn(|| RankHandle::join(&launches[0]));
        let start = Instant::now();
        let mut drip = stranger(&launches[0]);
        drip.write_all(b"gptq").unwrap();
        let _silent = stranger(&launches[0]);
        drop(stranger(&launches[0]));
        stranger(&launches[0]).write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let other_run = Greeting::new(1, RunDigest::of("another run"));
        assert_eq!(greet(&launches[0], &other_run).1, Verdict::OtherRun);
        let other_version = Greeting { version: "0.0.9".to_owned(), ..of_run(1) };
        assert_eq!(greet(&launches[0], &other_version).1, Verdict::OtherVersion);
        for rank in [2, u32::MAX] {
            assert_eq!(greet(&launches[0], &of_run(rank)).1, Verdict::NoSuchRank);
        }
        assert_eq!(greet(&launches[0], &of_run(0)).1, Verdict::Taken);
        drip.write_all(b"r").unwrap();

        RankHandle::join(&launches[1]).unwrap();
        let first = first.join().unwrap().unwrap();
        assert!(start.elapsed() < GREETING_TIME, "{:?}", start.elapsed());
        let strangers = first.strangers().unwrap();
        assert!(strangers.contains("turned away 7 calls"), "{strangers}");
        for what in ["left without a greeting", "spoke of something else", "another run", "3 more"]
        {
            assert!(strangers.contains(what), "{strangers}");
        }
    });
}

#[test]
fn a_seat_is_one_process_and_free_when_that_is_gone() {
    let launches = launches(3, Duration::from_secs(60));
    std::thread::scope(|scope| {
        let first = scope.spawn(|| RankHandle::join(&launches[0]));
        let (stale, verdict) = greet(&launches[0], &of_run(1));
        assert_eq!(verdict, Verdict::Admitted);
        assert_eq!(greet(&launches[0], &of_run(1)).1, Verdict::Taken);
        drop(stale);
        let second = scope.spawn(|| RankHandle::join(&launches[1]));
        let third = scope.spawn(|| RankHandle::join(&launches[2]));
        for joined in [first, second, third] {
            joined.join().unwrap().unwrap();
        }
    });
}

/// As a port scanner, a health check or somebody with bad intentions does.
#[test]
fn patience_ends_whatever_happens_at_the_port() {
    let launches = launches(2, Duration::from_millis(500));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut open = Vec::new();
            while !over.load(Ordering::Relaxed) {
                if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", launches[0].port)) {
                    let _ = stream.write_all(b"g");
                    open.push(stream);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let start = Instant::now();
        let error = RankHandle::join(&launches[0]).err().unwrap().to_string();
        over.store(true, Ordering::Relaxed);
        assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
        assert!(error.contains("for rank 1 of 2"), "{error}");
    });
}

#[test]
fn a_frame_that_claims_more_than_the_work_needs_loses_its_rank() {
    let launches = launches(2, Duration::from_secs(60));
    std::thread::scope(|scope| {
        let first = scope.spawn(|| RankHandle::join(&launches[0]));
        let (mut stream, verdict) = greet(&launches[0], &of_run(1));
        assert_eq!(verdict, Verdict::Admitted);
        let handle = first.join().unwrap().unwrap();
        // One part of 2^33 words: 17 bytes that ask for 34 GB.
        let mut claim = Vec::new();
        Frame::Data(vec![Vec::new()]).write(&mut claim).unwrap();
        claim[9..].copy_from_slice(&(1_u64 << 33).to_le_bytes());
        assert_eq!(claim.len(), 17);
        stream.write_all(&claim).unwrap();
        let outcome = handle.run(&Device::Cpu, |_| Ok::<_, Error>(()));
        assert!(matches!(outcome, Err(Error::RankLost { rank: Some(1) })), "{outcome:?}");
    });
}

#[test]
fn a_rank_of_another_run_or_version_is_warned() {
    let mut launches = launches(2, Duration::from_millis(700));
    launches[1].run_id = Some("another run".to_owned());
    std::thread::scope(|scope| {
        let first = scope.spawn(|| RankHandle::join(&launches[0]));
        let error = RankHandle::join(&launches[1]).err().unwrap().to_string();
        assert!(error.contains("rank 0 of another run"), "{error}");
        let error = first.join().unwrap().err().unwrap().to_string();
        assert!(error.contains("belongs to another run"), "{error}");
    });

    // A rank 0 of the version before.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut launch = launches.swap_remove(1);
    launch.port = listener.local_addr().unwrap().port();
    launch.patience = Duration::from_secs(60);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; Greeting::LENGTH]).unwrap();
            let verdict = Verdict::OtherVersion;
            let answer = Answer { verdict, size: 2, version: "0.0.9".to_owned() };
            stream.write_all(&answer.to_bytes()).unwrap();
        });
        let error = RankHandle::join(&launch).err().unwrap().to_string();
        assert!(error.contains(VERSION) && error.contains("rank 0 of 0.0.9"), "{error}");
    });
}

#[test]
fn ranks_meet_at_any_address_of_their_host_and_find_the_id_of_their_run() {
    let mut hosts = vec!["127.0.0.1", "127.0.1.1", "localhost"];
    if TcpListener::bind("[::1]:0").is_ok() {
        hosts.push("::1");
    }
    for host in hosts {
        let mut launches = launches(2, Duration::from_secs(20));
        for launch in &mut launches {
            launch.host = host.to_owned();
            launch.run_id = None;
        }
        std::thread::scope(|scope| {
            let first = scope.spawn(|| RankHandle::join(&launches[0]));
            RankHandle::join(&launches[1]).unwrap_or_else(|e| panic!("{host}: {e}"));
            first.join().unwrap().unwrap_or_else(|e| panic!("{host}: {e}"));
        });
    }
}

#[test]
fn a_host_without_the_runs_id_says_what_to_do() {
    let mut launch = launches(2, Duration::from_secs(20)).swap_remove(1);
    launch.run_id = None;
    // An address kept for documentation: no host has it.
    launch.host = "192.0.2.1".to_owned();
    let error = RankHandle::join(&launch).err().unwrap();
    assert!(error.to_string().contains("another host"), "{error}");
    assert!(error.hint().unwrap().contains("GPTQ_RUN_ID"), "{error}");
}

#[test]
fn rank_0_listens_where_the_others_call() {
    let at = |ips: &[&str]| -> Vec<SocketAddr> {
        ips.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), 1)).collect()
    };
    let found = |host: &str, ips: &[&str]| places(host, &at(ips));
    let expected =
        |ips: &[&str]| -> Vec<IpAddr> { ips.iter().map(|i| i.parse().unwrap()).collect() };
    assert_eq!(found("127.0.1.1", &["127.0.1.1"]), expected(&["127.0.1.1"]));
    assert_eq!(found("::1", &["::1"]), expected(&["::1"]));
    assert_eq!(found("localhost", &["::1", "127.0.0.1"]), expected(&["::1", "127.0.0.1"]));
    assert_eq!(found("node0", &["10.0.0.7", "10.0.0.7"]), expected(&["10.0.0.7"]));
    // As Debian's /etc/hosts has it: others know this host by another address.
    assert_eq!(found("node0", &["127.0.1.1"]), ANY);
}
