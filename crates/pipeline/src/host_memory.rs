//! Host memory, as far as the system shows it: how much there is, was held, and may still be taken.
//!
//! What may be taken is the least of what the machine has free, what each control group above the
//! process leaves it (a container's limit is one), and what its address space may grow by. Linux
//! kills a process that takes more, or refuses and the allocator aborts; either way it is too late
//! for an error message, so what is large is checked before.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Bytes of the machine's memory; `None` where the system does not show it.
#[must_use]
pub fn total() -> Option<u64> {
    field(Path::new("/proc/meminfo"), "MemTotal:", 1024)
}

/// The most bytes that this process has held at once; `None` where the system does not show it.
#[must_use]
pub fn peak() -> Option<u64> {
    field(Path::new("/proc/self/status"), "VmHWM:", 1024)
}

/// Bytes that may still be taken; `None` where the system does not show it.
#[must_use]
pub fn available() -> Option<u64> {
    available_under(Path::new("/"))
}

/// Refuses what certainly does not fit: `needed` bytes for `what`.
///
/// # Errors
/// [`Error::HostMemory`], with both numbers and `advice`.
pub(crate) fn ensure(what: &str, needed: u64, advice: &'static str) -> Result<()> {
    match available() {
        Some(available) if needed > available => {
            Err(Error::HostMemory { what: what.to_owned(), needed, available, advice })
        }
        _ => Ok(()),
    }
}

fn available_under(root: &Path) -> Option<u64> {
    let machine = field(&root.join("proc/meminfo"), "MemAvailable:", 1024);
    let limits = [machine, address_space(root), control_groups(root)];
    limits.into_iter().flatten().min()
}

/// The number behind a name in a file of such lines, in bytes.
fn field(file: &Path, name: &str, unit: u64) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(unit)
}

/// What `ulimit -v` leaves.
fn address_space(root: &Path) -> Option<u64> {
    // "unlimited" is no number.
    let limit = field(&root.join("proc/self/limits"), "Max address space", 1)?;
    let used = field(&root.join("proc/self/status"), "VmSize:", 1024)?;
    Some(limit.saturating_sub(used))
}

/// What the tightest control group above this process leaves.
fn control_groups(root: &Path) -> Option<u64> {
    let text = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mut least: Option<u64> = None;
    for line in text.lines() {
        // hierarchy:controllers:path, with an empty list of controllers in version 2.
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (mount, files) = match controllers {
            "" => ("sys/fs/cgroup", ["memory.max", "memory.current", "inactive_file "]),
            list if list.split(',').any(|name| name == "memory") => (
                "sys/fs/cgroup/memory",
                ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "],
            ),
            _ => continue,
        };
        let mount = root.join(mount);
        let group: PathBuf = mount.join(path.trim_start_matches('/'));
        // In a container the path may be the host's; then the mount itself is the group.
        let above = group.ancestors().take_while(|folder| folder.starts_with(&mount));
        let left = above.filter_map(|folder| left_of_group(folder, files)).min();
        least = least.into_iter().chain(left).min();
    }
    least
}

fn left_of_group(folder: &Path, [limit, usage, inactive]: [&str; 3]) -> Option<u64> {
    // "max" is no number.
    let limit = field(&folder.join(limit), "", 1)?;
    let usage = field(&folder.join(usage), "", 1)?;
    // Cached files are given up when memory is needed.
    let cached = field(&folder.join("memory.stat"), inactive, 1).unwrap_or(0);
    Some(limit.saturating_sub(usage.saturating_sub(cached)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system(files: &[(&str, &str)]) -> Option<u64> {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        available_under(folder.path())
    }

    const MACHINE: (&str, &str) =
        ("proc/meminfo", "MemTotal:       100 kB\nMemFree: 7 kB\nMemAvailable:       50 kB\n");

    #[test]
    fn the_tightest_limit_counts() {
        assert_eq!(system(&[]), None);
        assert_eq!(system(&[MACHINE]), Some(50 << 10));
        let unlimited = "Limit  Soft\nMax address space         unlimited   unlimited  bytes\n";
        assert_eq!(system(&[MACHINE, ("proc/self/limits", unlimited)]), Some(50 << 10));
        let limited = "Max address space         20480                30000 bytes\n";
        let status = ("proc/self/status", "Name: gptq\nVmSize:\t 15 kB\n");
        assert_eq!(system(&[MACHINE, ("proc/self/limits", limited), status]), Some(5 << 10));
    }

    #[test]
    fn every_group_above_the_process_has_a_say() {
        let groups = [
            MACHINE,
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.current", "9000\n"),
            ("sys/fs/cgroup/a/memory.max", "10000\n"),
            ("sys/fs/cgroup/a/memory.current", "9000\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 500\n"),
        ];
        assert_eq!(system(&groups), Some(1500));
        // A path of the host's, where the container's mount is the group.
        let container = [
            MACHINE,
            ("proc/self/cgroup", "0::/docker/x\n"),
            ("sys/fs/cgroup/memory.max", "10000\n"),
            ("sys/fs/cgroup/memory.current", "4000\n"),
        ];
        assert_eq!(system(&container), Some(6000));
        let old = [
            MACHINE,
            ("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/x\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "10000\n"),
            ("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "12000\n"),
            ("sys/fs/cgroup/memory/x/memory.stat", "total_inactive_file 5000\n"),
        ];
        assert_eq!(system(&old), Some(3000));
    }
}
