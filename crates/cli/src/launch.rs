//! What a launcher says of the processes that it has started: torchrun, srun and mpirun set
//! variables, and a person who starts processes by hand can set the same.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use gptq_compute::Launch;

use crate::hint::advised;

/// How long processes wait for each other: nodes of a cluster do not start at once. `GPTQ_JOIN_TIMEOUT`
/// sets another number of seconds.
const PATIENCE: Duration = Duration::from_secs(300);
/// The port where torch's own processes meet by default.
const PORT: u16 = 29_500;
/// A day.
const MOST_SECONDS: u64 = 86_400;

/// This process among others.
#[derive(Clone, Debug)]
pub(crate) struct Launched {
    pub(crate) launch: Launch,
    /// Number of this process among those of its host.
    pub(crate) local_rank: usize,
}

/// Variables of a launcher.
struct Launcher {
    /// Rank, number of ranks, rank on the host.
    place: [&'static str; 3],
    /// What distinguishes runs: the first list whose first variable is set.
    run: &'static [&'static [&'static str]],
}

// A job that was put back into the queue keeps its number.
const SLURM_RUN: &[&[&str]] = &[&["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"]];

const LAUNCHERS: [Launcher; 5] = [
    Launcher {
        place: ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
        // Not the count of restarts, which each node's torchrun counts for itself.
        run: &[&["TORCHELASTIC_RUN_ID"]],
    },
    Launcher { place: ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"], run: SLURM_RUN },
    // A batch script has these two as well, though it is no rank: they need MASTER_ADDR beside them.
    Launcher { place: ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"], run: SLURM_RUN },
    Launcher {
        place: ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"],
        run: &[&["PMIX_NAMESPACE"], &["OMPI_MCA_ess_base_jobid"]],
    },
    Launcher { place: ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"], run: &[&["PMIX_NAMESPACE"]] },
];

/// The place of this process; `None` when it was started alone.
pub(crate) fn launched() -> Result<Option<Launched>> {
    read(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

/// The rank of a process that is not the first, for its messages.
pub(crate) fn follower() -> Option<usize> {
    launched().ok().flatten().map(|l| l.launch.rank).filter(|&rank| rank > 0)
}

fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Launched>> {
    let host = get("MASTER_ADDR");
    let used = |launcher: &&Launcher| {
        let [rank, size, _] = launcher.place;
        get(rank).is_some() && get(size).is_some() && (size != "SLURM_NTASKS" || host.is_some())
    };
    let Some(launcher) = LAUNCHERS.iter().find(used) else { return Ok(None) };
    let [rank_name, size_name, local_name] = launcher.place;
    let number = |name: &str| -> Result<usize> {
        let text = get(name).unwrap_or_default();
        text.parse().with_context(|| format!("`{name}={text}` in the environment is no number"))
    };
    let (rank, size) = (number(rank_name)?, number(size_name)?);
    let most = Launch::MOST_RANKS;
    if !(1..=most).contains(&size) {
        bail!("`{size_name}={size}` in the environment is no number of processes from 1 to {most}");
    }
    if rank >= size {
        bail!(
            "`{rank_name}={rank}` and `{size_name}={size}` in the environment do not fit: ranks are \
             numbered from 0"
        );
    }
    if size == 1 {
        return Ok(None);
    }
    let one_host = ["SLURM_STEP_NUM_NODES", "OMPI_MCA_orte_num_nodes", "GROUP_WORLD_SIZE"]
        .iter()
        .any(|name| get(name).is_some_and(|nodes| nodes == "1"));
    let host = match host {
        Some(host) => unbracketed(&host).to_owned(),
        None if one_host => "127.0.0.1".to_owned(),
        None => {
            let message = format!("`{rank_name}` says that this is one of {size} processes");
            let hint = format!(
                "set MASTER_ADDR to the host of the first (with Slurm: scontrol show hostnames | \
                 head -n 1), or unset `{rank_name}`"
            );
            return Err(advised(message, hint));
        }
    };
    let mut port = PORT;
    if let Some(text) = get("MASTER_PORT") {
        port = text.parse().ok().filter(|&port| port > 0).with_context(|| {
            format!("`MASTER_PORT={text}` in the environment is no port from 1 to 65535")
        })?;
    }
    // There torchrun itself listens at that port.
    if get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|v| v == "True") {
        port = port.checked_add(1).context("`MASTER_PORT=65535` leaves no port for the ranks")?;
    }
    let local_rank = if get(local_name).is_some() { number(local_name)? } else { rank };
    let mut patience = PATIENCE;
    if let Some(text) = get("GPTQ_JOIN_TIMEOUT") {
        let seconds = text.parse().ok().filter(|seconds| (1..=MOST_SECONDS).contains(seconds));
        let seconds = seconds.with_context(|| {
            format!(
                "`GPTQ_JOIN_TIMEOUT={text}` in the environment is no number of seconds from 1 to \
                 {MOST_SECONDS}"
            )
        })?;
        patience = Duration::from_secs(seconds);
    }
    let run_id = run_id(launcher, get);
    let launch = Launch { rank, size, host, port, run_id, patience };
    Ok(Some(Launched { launch, local_rank }))
}

/// An address of IPv6 without the brackets that it has beside a port.
fn unbracketed(host: &str) -> &str {
    let inner = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    inner.filter(|inner| inner.contains(':')).unwrap_or(host)
}

/// Which run this is: `GPTQ_RUN_ID`, or what the launcher that started it calls it.
fn run_id(launcher: &Launcher, get: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    if let Some(id) = get("GPTQ_RUN_ID") {
        return Some(format!("GPTQ_RUN_ID={id}"));
    }
    // torchrun calls a run `none` where nobody has given it a name.
    let set = |name: &&str| Some(format!("{name}={}", get(name).filter(|id| id != "none")?));
    let variables =
        launcher.run.iter().find(|names| names.iter().take(1).any(|n| set(n).is_some()));
    Some(variables?.iter().filter_map(set).collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hint::hints;

    fn from(variables: &[(&str, &str)]) -> Result<Option<Launched>> {
        let variables: Vec<(String, String)> =
            variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        read(&move |name| variables.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()))
    }

    #[test]
    fn launchers_are_understood() {
        let torchrun = [
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "node0"),
            ("MASTER_PORT", "29400"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("TORCHELASTIC_RUN_ID", "none"),
        ];
        let found = from(&torchrun).unwrap().unwrap();
        let Launch { rank, size, host, port, run_id, patience } = found.launch;
        assert_eq!((run_id, patience), (None, PATIENCE));
        assert_eq!((rank, size, host.as_str(), port, found.local_rank), (3, 4, "node0", 29401, 1));

        let srun = [
            ("SLURM_PROCID", "1"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_STEP_NUM_NODES", "1"),
        ];
        let found = from(&srun).unwrap().unwrap();
        assert_eq!((found.launch.host.as_str(), found.launch.port), ("127.0.0.1", PORT));

        let batch_script = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")];
        assert!(from(&batch_script).unwrap().is_none());
        assert!(from(&[]).unwrap().is_none());
        assert!(from(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap().is_none());

        for (given, host) in [("[::1]", "::1"), ("::1", "::1"), ("[fe80::1%eth0]", "fe80::1%eth0")]
        {
            let run = [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", given)];
            let launch = from(&run).unwrap().unwrap().launch;
            assert_eq!(launch.host, host);
            assert_eq!(launch.meeting_place(), format!("[{host}]:{PORT}"));
        }
    }

    /// What the launcher calls the run of a process with these variables.
    fn run_of(launcher: &[(&str, &str)], more: &[(&str, &str)]) -> Option<String> {
        let host = [("MASTER_ADDR", "node0")];
        from(&[launcher, more, &host].concat()).unwrap().unwrap().launch.run_id
    }

    #[test]
    fn runs_are_distinguished_by_what_their_launcher_calls_them() {
        let torchrun = [("RANK", "0"), ("WORLD_SIZE", "2")];
        assert_eq!(run_of(&torchrun, &[]), None);
        let run = [("TORCHELASTIC_RUN_ID", "7f"), ("SLURM_JOB_ID", "12")];
        assert_eq!(run_of(&torchrun, &run).unwrap(), "TORCHELASTIC_RUN_ID=7f");
        let own = [("TORCHELASTIC_RUN_ID", "7f"), ("GPTQ_RUN_ID", "mine")];
        assert_eq!(run_of(&torchrun, &own).unwrap(), "GPTQ_RUN_ID=mine");

        let srun = [("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "2")];
        let step = [("SLURM_JOB_ID", "12"), ("SLURM_STEP_ID", "0")];
        assert_eq!(run_of(&srun, &step).unwrap(), "SLURM_JOB_ID=12 SLURM_STEP_ID=0");
        assert_eq!(run_of(&srun, &step[1..]), None);

        let mpirun = [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
        let old = run_of(&mpirun, &[("OMPI_MCA_ess_base_jobid", "9")]);
        assert_eq!(old.unwrap(), "OMPI_MCA_ess_base_jobid=9");
        let new = [("OMPI_MCA_ess_base_jobid", "9"), ("PMIX_NAMESPACE", "prterun-9")];
        assert_eq!(run_of(&mpirun, &new).unwrap(), "PMIX_NAMESPACE=prterun-9");
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let at = |rank, size| vec![("RANK", rank), ("WORLD_SIZE", size), ("MASTER_ADDR", "a")];
        let port = |port| [at("0", "2"), vec![("MASTER_PORT", port)]].concat();
        for (variables, named) in [
            (at("0", "18446744073709551615"), "WORLD_SIZE=18446744073709551615"),
            (at("0", "10000000000"), "from 1 to 4096"),
            (at("0", "4097"), "WORLD_SIZE=4097"),
            (at("0", "0"), "WORLD_SIZE=0"),
            (at("1", "1"), "RANK=1"),
            (vec![("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "1")], "SLURM_STEP_NUM_TASKS=1"),
            (port("0"), "MASTER_PORT=0"),
            (port("65536"), "MASTER_PORT=65536"),
            (vec![("RANK", "0"), ("WORLD_SIZE", "2")], "MASTER_ADDR"),
            (vec![("RANK", "x"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")], "RANK=x"),
            (vec![("RANK", "2"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")], "WORLD_SIZE=2"),
            (
                vec![
                    ("RANK", "0"),
                    ("WORLD_SIZE", "2"),
                    ("MASTER_ADDR", "a"),
                    ("MASTER_PORT", "-1"),
                ],
                "MASTER_PORT=-1",
            ),
            (
                vec![
                    ("RANK", "0"),
                    ("WORLD_SIZE", "2"),
                    ("MASTER_ADDR", "a"),
                    ("GPTQ_JOIN_TIMEOUT", "0"),
                ],
                "GPTQ_JOIN_TIMEOUT=0",
            ),
        ] {
            let error = from(&variables).unwrap_err();
            // What is missing is named where it is asked for.
            let text = format!("{error:#} {}", hints(&error).join(" "));
            assert!(text.contains(named), "{text}");
        }
    }
}
