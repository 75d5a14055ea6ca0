use std::net::TcpListener;
use std::time::Duration;

use ndarray::Array2;

use super::*;

/// Runs `part` on every one of `handles`, a thread each; outcomes in rank order.
fn on_threads<R: Send>(
    handles: Vec<RankHandle>,
    part: impl Fn(&Ranks) -> Result<R> + Sync,
) -> Vec<Result<R>> {
    std::thread::scope(|scope| {
        let part = &part;
        let spawn = |handle: RankHandle| scope.spawn(move || handle.run(&Device::Cpu, part));
        let threads: Vec<_> = handles.into_iter().map(spawn).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// Seats whose ranks talk by TCP, though they are threads.
fn sockets(size: usize) -> Vec<RankHandle> {
    let joined = join_all(launches(size, Duration::from_secs(20)));
    joined.into_iter().map(|handle| handle.unwrap()).collect()
}

fn join_all(launches: Vec<Launch>) -> Vec<Result<RankHandle>> {
    std::thread::scope(|scope| {
        let spawn = |launch: Launch| scope.spawn(move || RankHandle::join(&launch));
        let threads: Vec<_> = launches.into_iter().map(spawn).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn launches(size: usize, patience: Duration) -> Vec<Launch> {
    // A free port: the system's choice, given back.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let run_id = Some("test".to_owned());
    let host = "127.0.0.1".to_owned();
    let launch = Launch { rank: 0, size, host, port, run_id, patience };
    (0..size).map(|rank| Launch { rank, ..launch.clone() }).collect()
}

#[test]
fn shares_part_the_whole() {
    for (total, unit, size) in
        [(128, 1, 2), (5, 1, 3), (1, 1, 4), (0, 1, 2), (576, 64, 2), (100, 64, 3)]
    {
        let mut at = 0;
        for rank in 0..size {
            let range = share(total, unit, rank, size);
            assert_eq!(range.start, at.min(total));
            assert!(range.start.is_multiple_of(unit) || range.is_empty());
            at = range.end;
        }
        assert_eq!(at, total);
    }
    assert_eq!(share(576, 64, 0, 2), 0..320);
}

/// Exchanged words, the number of collected ones, a sum and gathered rows.
type Everything = (Vec<Vec<u32>>, Option<usize>, Array2<f32>, Array2<f32>);

fn everything(ranks: &Ranks) -> Result<Everything> {
    let rank = ranks.rank();
    let words = ranks.exchange(vec![rank as u32; rank + 1])?;
    let collected = ranks.collect(vec![vec![7; rank], Vec::new()])?;
    // 1e8 + 1 − 1e8 depends on the order of addition.
    let value = [1e8, 1.0, -1e8][rank];
    let mut sum = Tensor::from_host(Array2::from_elem((2, 3), value));
    ranks.sum(&mut sum)?;
    let range = ranks.share(70, 32);
    let own = Array2::from_shape_fn((range.len(), 2), |(i, j)| (2 * (range.start + i) + j) as f32);
    let whole = ranks.gather_rows(Tensor::from_host(own), 70, 32)?;
    let all = collected.map(|all| all.iter().map(|message| message[0].len()).sum());
    Ok((words, all, sum.to_host()?, whole.to_host()?))
}

#[test]
fn threads_and_sockets_exchange_and_add_alike() {
    for handles in [RankHandle::threads(3), sockets(3)] {
        let outcomes = on_threads(handles, everything);
        for (rank, outcome) in outcomes.into_iter().enumerate() {
            let (words, collected, sum, whole) = outcome.unwrap();
            assert_eq!(words, [vec![0], vec![1, 1], vec![2, 2, 2]]);
            assert_eq!(collected, (rank == 0).then_some(3));
            assert!(sum.iter().all(|&v| v == (1e8 + 1.0_f32) - 1e8));
            let expected = Array2::from_shape_fn((70, 2), |(i, j)| (2 * i + j) as f32);
            assert_eq!(whole, expected);
        }
    }
}

#[test]
fn one_rank_changes_nothing() {
    let ranks = Ranks::alone();
    let tensor = Tensor::from_host(Array2::ones((3, 2)));
    assert_eq!(ranks.share(3, 1), 0..3);
    assert_eq!(ranks.exchange(vec![5]).unwrap(), [[5]]);
    assert_eq!(ranks.gather_rows(tensor, 3, 1).unwrap().shape(), (3, 2));
}

#[test]
fn a_rank_that_fails_ends_the_others() {
    for handles in [RankHandle::threads(3), sockets(3)] {
        let outcomes = on_threads(handles, |ranks| {
            if ranks.rank() == 1 {
                return Err(Error::ranks("full disk".to_owned()));
            }
            // Waits for words that never come.
            ranks.exchange(vec![1])
        });
        assert!(
            matches!(&outcomes[1], Err(Error::Ranks { message, .. }) if message == "full disk")
        );
        for rank in [0, 2] {
            assert!(
                matches!(outcomes[rank], Err(Error::RankLost { rank: Some(1) })),
                "{outcomes:?}"
            );
        }
    }
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let launches = launches(3, Duration::from_millis(300));
    let alone = RankHandle::join(&launches[0]).err().unwrap().to_string();
    assert!(alone.contains("rank 1, 2 of 3"), "{alone}");
    let unheard = RankHandle::join(&launches[2]).err().unwrap().to_string();
    assert!(unheard.contains("Rank 2") && unheard.contains("127.0.0.1"), "{unheard}");
}

/// What is held and said is about the ranks that came, however many were announced.
#[test]
fn announced_ranks_take_no_room() {
    let mut launch = launches(2, Duration::from_millis(300)).swap_remove(0);
    launch.size = Launch::MOST_RANKS;
    let alone = RankHandle::join(&launch).err().unwrap().to_string();
    assert!(alone.contains("rank 1, 2, 3, 4, 5, 6, 7, 8 and 4087 others of 4096"), "{alone}");
    for (rank, size, named) in
        [(0, usize::MAX, "at most 4096"), (0, 0, "not one"), (1, 1, "not one")]
    {
        let wrong = Launch { rank, size, ..launch.clone() };
        let error = RankHandle::join(&wrong).err().unwrap().to_string();
        assert!(error.contains(named), "{error}");
    }
}

#[test]
fn what_ranks_do_not_have_alike_is_reported_by_all_of_them() {
    for differing in [0, 2] {
        let outcomes = on_threads(sockets(3), |ranks| {
            let seed = if ranks.rank() == differing { 7 } else { 0 };
            ranks.agree(|| Ok::<_, Error>(Agreement::new(0).with("bits", 4).with("seed", seed)))
        });
        for outcome in outcomes {
            let error = outcome.unwrap_err();
            assert!(matches!(error, Error::Disagreement(_)), "{error}");
            let error = error.to_string();
            assert!(error.contains(": `7`") && error.contains(": `0`"), "{error}");
            assert!(error.contains("differ in seed (rank 0") && !error.contains("bits"), "{error}");
        }
    }
}

#[test]
fn ranks_of_runs_of_two_sizes_say_so() {
    let mut launches = launches(2, Duration::from_secs(20));
    launches[1].size = 3;
    let handles = join_all(launches).into_iter().map(|handle| handle.unwrap()).collect();
    for outcome in on_threads(handles, |_| Ok(())) {
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains("the number of ranks (rank 0: `2`, rank 1: `3`)"), "{error}");
    }
}

#[test]
fn the_work_that_ranks_agree_on_says_how_much_they_may_send() {
    let send = |ranks: &Ranks, words: u64| {
        ranks.agree(|| Ok::<_, Error>(Agreement::new(words)))?;
        ranks.exchange(vec![3; 1 << 20])
    };
    for outcome in on_threads(sockets(2), |ranks| send(ranks, 1 << 20)) {
        assert_eq!(outcome.unwrap(), vec![vec![3; 1 << 20]; 2]);
    }
    for outcome in on_threads(sockets(2), |ranks| send(ranks, 1 << 10)) {
        assert!(matches!(outcome, Err(Error::RankLost { .. })), "{outcome:?}");
    }
}

#[test]
fn threads_of_a_process_have_nothing_to_compare() {
    for outcome in on_threads(RankHandle::threads(2), |ranks| {
        ranks.agree(|| -> Result<Agreement> { panic!("no digest is needed") })
    }) {
        outcome.unwrap();
    }
}
