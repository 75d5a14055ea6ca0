//! Splitting a sweep over machines: which branches are whose.
//!
//! Every job works it out for itself from the configuration alone, so jobs need not talk.

use std::str::FromStr;

/// The `index`th of `of` jobs, from 1, written `2/4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    index: usize,
    of: usize,
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/').and_then(|(index, of)| {
            Some(Self { index: index.parse().ok()?, of: of.parse().ok()? })
        });
        parts
            .filter(|share| (1..=share.of).contains(&share.index))
            .ok_or_else(|| "use I/N with I from 1 to N, such as 2/4".to_owned())
    }
}

impl Share {
    /// Positions of the items that are this job's, in order. `work` gives the cost of each item; the
    /// heaviest goes first, always to the job that has the least to do.
    pub fn of(self, work: &[f64]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..work.len()).collect();
        order.sort_by(|&a, &b| work[b].total_cmp(&work[a]));
        // Jobs beyond the number of items get none: each item goes to one that has none yet.
        let jobs = self.of.min(work.len());
        let mut loads = vec![(0.0_f64, 0_usize); jobs];
        let mut mine = Vec::new();
        for item in order {
            // Of jobs with equally much, the one with fewer items, then the first.
            let least = (0..jobs)
                .min_by(|&a, &b| {
                    loads[a].0.total_cmp(&loads[b].0).then(loads[a].1.cmp(&loads[b].1))
                })
                .unwrap_or(0);
            loads[least].0 += work[item];
            loads[least].1 += 1;
            if least + 1 == self.index {
                mine.push(item);
            }
        }
        mine.sort_unstable();
        mine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(work: &[f64], of: usize) -> Vec<Vec<usize>> {
        (1..=of).map(|index| Share { index, of }.of(work)).collect()
    }

    #[test]
    fn equal_branches_are_dealt_out_in_turn() {
        assert_eq!(shares(&[5.0; 9], 4), [vec![0, 4, 8], vec![1, 5], vec![2, 6], vec![3, 7]]);
        // Round to nearest costs nothing to speak of.
        assert_eq!(shares(&[0.0; 4], 2), [[0, 2], [1, 3]]);
        assert_eq!(shares(&[1.0, 1.0], 3), [vec![0], vec![1], vec![]]);
        assert_eq!(shares(&[1.0, 1.0], 1), [vec![0, 1]]);
        // As many jobs as a number can say take no more memory than the items.
        for (index, mine) in [(1, vec![1]), (3, vec![2]), (4, vec![]), (usize::MAX, vec![])] {
            assert_eq!(Share { index, of: usize::MAX }.of(&[2.0, 3.0, 1.0]), mine, "{index}");
        }
    }

    #[test]
    fn heavy_branches_are_spread() {
        let work = [3.0, 1.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0];
        for share in shares(&work, 2) {
            assert_eq!(share.iter().map(|&i| work[i]).sum::<f64>(), 6.0, "{share:?}");
        }
    }

    #[test]
    fn every_item_is_one_jobs() {
        let work: Vec<f64> = (0..37).map(|i| f64::from((i * 7919) % 13)).collect();
        for of in 1..40 {
            let mut all: Vec<usize> = shares(&work, of).concat();
            all.sort_unstable();
            assert_eq!(all, (0..37).collect::<Vec<_>>());
        }
    }

    #[test]
    fn shares_are_read_as_typed() {
        assert_eq!("2/4".parse(), Ok(Share { index: 2, of: 4 }));
        for wrong in ["", "2", "0/4", "5/4", "a/b", "1/0", "-1/4", "1/4/2"] {
            assert!(wrong.parse::<Share>().is_err(), "{wrong}");
        }
    }
}
